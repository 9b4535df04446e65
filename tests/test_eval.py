"""eval.py: runs of tiny models, and its commands; its metrics are in test_protocols.py."""
import dataclasses
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_plots import make_run, refused, shows_something, write
from test_protocols import close

import data as datasets
import eval as evaluation
import grpo_vl
import protocols
import rewards
import tiny
import training

ROOT = Path(__file__).parent.parent


# ---- with a model ----
SCENES = "synthetic:grounding?size=56x56&distractors=0-1&reach=0.3-0.5"


def run_script(*arguments, ranks=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "eval.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_every_command_has_help_and_what_is_unknown_is_refused(capsys):
    for command in ("demo", "run", "metrics", "behaviours", "plot", "show", "average", "curriculum"):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([command, "--help"])
        assert stop.value.code == 0 and command in capsys.readouterr().out
    for unknown in (["plot", "x", "--colour", "red"], ["fly"], []):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(unknown)
        assert stop.value.code == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two untrained tiny models."""
    import grpo_vl

    folders = []
    for seed, name in enumerate(("coldstart", "grpo")):
        folders.append(make_run(tmp_path_factory.mktemp("runs") / name))
        tokenizer = tiny.tiny_tokenizer()
        model = tiny.tiny_model(tokenizer, seed=seed)
        model.save_pretrained(folders[-1] / "model")
        tokenizer.save_pretrained(folders[-1] / "model")
        config = grpo_vl.Config(model="tiny", data=[SCENES], max_tokens=12, checkpointing=False)
        text = json.dumps(dataclasses.asdict(config))
        (folders[-1] / "config.json").write_text(text)
    return folders


def test_demo_compares_a_model_and_a_run(runs, tmp_path):
    before, grpo = runs
    out, _ = run_script("demo", before / "model", grpo, "--samples", 6, "--out", tmp_path)
    assert "held-out accuracy of the answer alone, 6 samples" in out and "before GRPO" in out
    table = json.loads((tmp_path / "table.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert table["data"] == [SCENES] and table["metric"] == "accuracy"
    for model in ("before", "after"):
        for mode in ("greedy", "sampled"):
            rows = [r for r in answers if (r["model"], r["mode"]) == (model, mode)]
            right = [rewards.correct("grounding", r["completion"], r["answer"]) for r in rows]
            assert len(rows) == 6 and table[model][mode] == sum(right) / 6
        several = [r for r in answers if (r["model"], r["mode"]) == (model, "several")]
        assert Counter(r["id"] for r in several) == {r["id"]: 8 for r in rows}  # each scene eight times
        assert several[0]["completion"] == rows[0]["completion"]  # the first of the eight is the sampled one
    assert len(answers) == 2 * 6 * (1 + 1 + 8)
    assert {r["id"].split("-")[2] for r in answers} == {"heldout"}
    assert shows_something(tmp_path / "curve.png") and shows_something(tmp_path / "rollouts.png")
    assert not any(runs[1].glob("eval"))  # all went to --out


def test_demo_shows_twelve_scenes_of_more_and_calls_detection_by_f1(runs, tmp_path, monkeypatch, alone, capsys):
    in_this_process(monkeypatch, alone)
    world = "synthetic:detection?size=56x56&shapes=2&objects=1-2"
    evaluation.main(["demo", *map(str, runs), "--samples", "14", "--data", world, "--out", str(tmp_path)])
    assert "held-out F1 of the answer alone, 14 samples, ± at most" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    several = Counter(row["id"] for row in rows if row["mode"] == "several" and row["model"] == "after")
    assert len(several) == 12 and set(several.values()) == {8}
    with Image.open(tmp_path / "rollouts.png") as page:
        assert page.size == (6 * 240 + 10, 44 + 4 * (24 + 230 + 18 + 15 + 10))  # two scenes under each other, twice


def test_demo_needs_models(tmp_path, runs):
    assert "finish the run" in refused("demo", tmp_path, runs[1])
    old = tmp_path / "old"
    (old / "model").mkdir(parents=True)
    (old / "model" / "model.safetensors").write_bytes(b"")
    (old / "config.json").write_text('{"colour": "red"}')
    assert "old/config.json: the field 'eval_data'" in refused("demo", runs[0], old)


def test_run_answers_and_scores_on_two_ranks(runs, tmp_path):
    out, beside = run_script("run", "--model", runs[0] / "model", "--task", "grounding", "--data",
                             SCENES, "--out", tmp_path, "--samples", 5, "--max-tokens", 8,
                             "--samples-per-question", 2, ranks=2)
    got = json.loads(out)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert got["samples"] == len(rows) == 10 and len({row["id"] for row in rows}) == 5
    assert "Perception-R1 2B" in beside and "measured here" in beside
    again = protocols.read_predictions(tmp_path / "predictions.jsonl", answers=True)
    close(got, **protocols.score_predictions("grounding", again))


def in_this_process(monkeypatch, alone):
    """The command shares the tests' world of one and leaves it standing."""
    import fsdp

    monkeypatch.setattr(fsdp, "start_processes", lambda timeout: alone)
    monkeypatch.setattr(fsdp, "leave", lambda: None)


@pytest.mark.parametrize("task, penalty", [("grounding", 1.05), ("counting", 1.0)])
def test_only_grounding_is_decoded_with_a_repetition_penalty(tmp_path, monkeypatch, alone, task, penalty):
    from sampler import Sampler

    seen, generate = [], Sampler.generate

    def record(self, prompts, noise, max_tokens, **options):
        seen.append((len(prompts), noise, max_tokens, options))
        return generate(self, prompts, noise, max_tokens, **options)

    monkeypatch.setattr(Sampler, "generate", record)
    in_this_process(monkeypatch, alone)
    evaluation.main(["run", "--model", "tiny", "--task", task, "--data", f"synthetic:{task}?size=56x56",
                     "--out", str(tmp_path), "--samples", "2", "--max-tokens", "4"])
    assert seen == [(2, None, 4, {"repetition_penalty": penalty})]  # greedily
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_run_asks_as_in_training_if_told_and_leaves_several_answers_to_an_image_unscored(tmp_path, monkeypatch, alone, capsys):
    """[PR1 code] evaluates detection with another prompt than it trains; AP takes one answer an image."""
    from sampler import Sampler

    asked, penalties, generate = [], [], Sampler.generate

    def record(self, prompts, noise, max_tokens, **options):
        asked.extend(prompt.ids for prompt in prompts)
        penalties.append(options["repetition_penalty"])
        return generate(self, prompts, noise, max_tokens, **options)

    monkeypatch.setattr(Sampler, "generate", record)
    in_this_process(monkeypatch, alone)
    run = ["run", "--model", "tiny", "--out", str(tmp_path), "--samples", "2", "--max-tokens", "4", "--task"]
    evaluation.main([*run, "grounding", "--data", "synthetic:grounding?size=56x56", "--prompts", "training"])
    detection = [*run, "detection", "--data", "synthetic:detection?size=56x56", "--samples-per-question", "2"]
    evaluation.main(detection)
    evaluation.main([*detection, "--prompts", "training"])
    assert penalties == [1.0] * 3
    tokenizer = tiny.tiny_tokenizer()
    asked_for = [tokenizer.decode(ids).partition("<|vision_end|>")[2] for ids in asked[2:]]
    assert all(text.startswith("Locate every item") for text in asked_for[:2])
    assert all(text.startswith("Please output bbox coordinates and names of circle") for text in asked_for[2:])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and said.err.count("unscored: AP is of one answer an image") == 2
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4


def test_models_that_only_answer_are_kept_in_the_dtype_to_compute_with(tmp_path, monkeypatch, alone, runs):
    import fsdp

    kept, prepare = [], training.prepare

    def watched(*arguments, **options):
        run = prepare(*arguments, **options)
        kept.append({weight.dtype for weight in run.policy.parameters()})
        return run

    in_this_process(monkeypatch, alone)
    monkeypatch.setattr(fsdp, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(training, "prepare", watched)
    short = ["--data", SCENES, "--samples", "2", "--max-tokens", "4"]
    evaluation.main(["run", "--model", "tiny", "--task", "grounding", *short, "--out", str(tmp_path)])
    evaluation.main(["curriculum", "--model", "tiny", *short, "--out", str(tmp_path)])
    evaluation.main(["demo", *map(str, runs), "--samples", "2", "--out", str(tmp_path)])
    assert kept == [{torch.bfloat16}] * 4


def test_run_refuses_data_of_another_task_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("a model was loaded"))
    row = {"task": "math", "question": "1+1", "answer": "2"}
    mixed = write(tmp_path / "mixed.jsonl", row, row | {"task": "choice", "answer": "B"})
    run = ["run", "--model", "tiny", "--out", tmp_path / "out", "--task"]
    for task, data, own in (("grounding", "synthetic:counting?size=56x56", "counting"), ("ocr", mixed, "math")):
        said = refused(*run, task, "--data", data)
        assert f"this row's task is {own}, but --task is {task}" in said
    assert "mixed.jsonl:1: " in said and not (tmp_path / "out").exists()
    assert "none.jsonl" in refused(*run, "ocr", "--data", tmp_path / "none.jsonl")
    assert "none.json" in refused(*run, "detection", "--data", mixed, "--annotations", "none.json")
    config = grpo_vl.Config(model="tiny", data=(str(mixed),), eval_data=(str(mixed),), eval_every=1)
    evaluation.check_task_of_data(config, "math")  # these two may mix


@pytest.fixture
def no_model(monkeypatch):
    import fsdp

    monkeypatch.setattr(fsdp, "start_processes", lambda *_: pytest.fail("processes were started"))


def hub_with(monkeypatch, *, reply=None, offline=False, cached=None):
    """A hub that replies with an exception, or that may not be asked."""
    import huggingface_hub

    def ask(request, timeout):
        assert request.full_url.endswith("/api/models/who/what") and timeout <= 10
        raise reply

    monkeypatch.setattr(urllib.request, "urlopen", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)


def test_a_model_that_is_not_there_is_said_at_once(tmp_path, monkeypatch, no_model):
    run = ["run", "--task", "counting", "--data", "synthetic:counting?size=56x56", "--out", tmp_path, "--model"]
    assert "no such folder" in refused(*run, "runs/none/model")
    assert "of a run, give RUN/model" in refused(*run, tmp_path)
    hub_with(monkeypatch, reply=urllib.error.URLError("Name or service not known"))
    assert "can not be reached" in (said := refused(*run, "who/what")) and "give the folder" in said
    hub_with(monkeypatch, reply=urllib.error.URLError("down"), cached="/cache/config.json")
    assert "set HF_HUB_OFFLINE=1: it is on this machine" in refused(*run, "who/what")
    hub_with(monkeypatch, reply=urllib.error.HTTPError("", 401, "Unauthorized", {}, None))
    assert "says 401 Unauthorized: is the name right" in refused(*run, "who/what")
    hub_with(monkeypatch, offline=True)
    assert "is not on this machine (HF_HUB_OFFLINE)" in refused(*run, "who/what")
    with pytest.raises(SystemExit, match="no such folder"):
        evaluation.main(["curriculum", "--model", "a b", "--data", "x", "--out", str(tmp_path)])


@pytest.mark.parametrize("task, module, package", [
    ("ocr", "rapidfuzz", "rapidfuzz"), ("detection", "pycocotools", "pycocotools"), ("math", "math_verify", "math-verify"),
])
def test_a_missing_package_is_said_before_anything_is_answered(tmp_path, monkeypatch, no_model, task, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    run = ["run", "--task", task, "--data", f"synthetic:{task}?size=56x56", "--out", tmp_path, "--model", "tiny"]
    assert f"pip install {package}" in refused(*run)


@pytest.fixture
def questions(monkeypatch, alone):
    """(system prompt, images) of each question that a run asks; no model answers."""
    import qwen_vl
    from sampler import Sampler

    asked, encode = [], qwen_vl.encode_chat

    def record(tokenizer, special, text, images, system):
        asked.append((system, images))
        return encode(tokenizer, special, text, images, system)

    def say_nothing(self, prompts, noise, max_tokens, **_):
        return [[qwen_vl.Completion(tokens=[])] for _ in prompts]

    monkeypatch.setattr(qwen_vl, "encode_chat", record)
    monkeypatch.setattr(Sampler, "generate", say_nothing)
    in_this_process(monkeypatch, alone)
    return asked


RUN = ["run", "--model", "tiny", "--task", "grounding", "--data", "synthetic:grounding?size=84x56", "--samples", "2"]


@pytest.mark.parametrize("option, system", [
    ([], "You are a helpful assistant."), (["--system-prompt", "Look twice."], "Look twice."),
    (["--system-prompt", ""], ""),
])
def test_run_takes_a_system_prompt(tmp_path, questions, option, system):
    evaluation.main([*RUN, "--out", str(tmp_path), *option])
    assert [asked for asked, _ in questions] == [system] * 2


def test_a_blind_run_sees_grey_images_of_the_same_size(tmp_path, questions, capsys):
    evaluation.main([*RUN, "--out", str(tmp_path), "--blind"])
    assert json.loads(capsys.readouterr().out)["blind"] is True
    for _, (image,) in questions:
        assert image.size == (84, 56) and image.getcolors() == [(84 * 56, (128, 128, 128))]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert len(rows) == 2 and rows[0]["image_size"] == [84, 56]  # the same questions and answers
    assert rows[0]["answer"] == datasets.open_data(RUN[6:7], split="heldout").at(0).answer


def test_the_protocol_has_every_task():
    """Tokens, samples, penalty: [PR1 code] answers greedily, with 1.05 for grounding alone."""
    table = protocols.PROTOCOLS
    assert set(table) == set(rewards.TASKS)
    grounding = table["grounding"]
    assert (grounding.max_tokens, grounding.samples, grounding.penalty) == (512, 1, 1.05)
    assert [task for task in table if table[task].penalty != 1] == ["grounding"]
