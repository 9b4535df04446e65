"""eval.py: averages of checkpoints, and runs of tiny models; its metrics are in test_protocols.py."""
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
from safetensors.torch import load_file, save_file
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
HERE = ROOT / "tests" / "fixtures" / "eval"


# ---- averages ----
def save_model(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def test_average_by_hand(tmp_path):
    # In bf16 1 + 1/128 is exact and 3·(1 + 1/128) is not: adding in fp32 keeps the mean exact.
    fine = torch.tensor([1 + 1 / 128, 0.0], dtype=torch.bfloat16)
    models = [save_model(tmp_path / str(i), w=torch.tensor([float(i), -1.0]), b=fine)
              for i in (1, 2, 6)]
    evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean["w"].tolist() == [3.0, -1.0] and mean["b"].dtype == torch.bfloat16
    assert torch.equal(mean["b"], fine)
    assert (tmp_path / "mean" / "config.json").read_text() == '{"a": 1}'


def test_average_reads_like_any_file(tmp_path):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    mask = os.umask(0o027)
    try:
        evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    finally:
        os.umask(mask)
    assert (tmp_path / "mean" / "model.safetensors").stat().st_mode & 0o777 == 0o640  # 666 less 027


def test_average_of_checkpoints_that_are_cut_otherwise(tmp_path):
    """One file there, two here: tensors are found by name, and the first one's files are kept."""
    one = save_model(tmp_path / "one", w=torch.tensor([1.0]), v=torch.tensor([2.0]))
    two = tmp_path / "two"
    two.mkdir()
    for name, value in (("w", 3.0), ("v", 6.0)):
        save_file({name: torch.tensor([value])}, two / f"model-{name}.safetensors")
    evaluation.main(["average", str(two), str(one), "--out", str(tmp_path / "mean")])
    got = {file.name: load_file(file) for file in (tmp_path / "mean").glob("*.safetensors")}
    assert got["model-w.safetensors"]["w"].item() == 2 and got["model-v.safetensors"]["v"].item() == 4


def test_averages_that_can_not_be_made(tmp_path):
    out = tmp_path / "out"
    one = save_model(tmp_path / "one", w=torch.zeros(2))
    wide = save_model(tmp_path / "wide", w=torch.zeros(3))
    assert "w is [2] in" in (said := refused("average", one, wide, "--out", out)) and "[3] in" in said
    more = save_model(tmp_path / "more", **{"w": torch.zeros(2), "lm_head.weight": torch.zeros(2)})
    for pair in ((one, more), (more, one)):
        said = refused("average", *pair, "--out", out)
        assert "do not have the same tensors" in said and f"lm_head.weight is in {more} alone" in said
    assert "no safetensors" in refused("average", one, HERE, "--out", out)
    broken = save_model(tmp_path / "broken", w=torch.zeros(2))
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "broken/model.safetensors: " in refused("average", one, broken, "--out", out)
    assert "must be a new folder" in refused("average", one, one, "--out", tmp_path)
    assert "two checkpoints" in refused("average", one, "--out", out)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"one", "wide", "more", "broken"}  # nothing was written


def test_a_failed_average_does_not_block_the_next_try(tmp_path, monkeypatch):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    command = ["average", *models, "--out", tmp_path / "mean"]

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        assert "no space left" in refused(*command)
    assert not (tmp_path / "mean").exists()
    evaluation.main([*map(str, command)])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "mean"}


# ---- with a model ----
SCENES = "synthetic:grounding?size=56x56&distractors=0-1&reach=0.3-0.5"


def run_script(*arguments, ranks=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "eval.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_every_option_has_a_place_in_the_help(capsys):
    for command in ("demo", "run", "metrics", "behaviours", "plot", "show", "average"):
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
    evaluation.check_data(config, "math")  # these two may mix


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
    assert set(table) == set(rewards.TASKS) == set(protocols.PROMPTS)
    grounding = table["grounding"]
    assert (grounding.max_tokens, grounding.samples, grounding.penalty) == (512, 1, 1.05)
    assert [task for task in table if table[task].penalty != 1] == ["grounding"]


def test_curriculum_keeps_a_band_and_sorts_easy_to_hard(tmp_path, monkeypatch, alone):
    """Four samples right in 4, 1, 0 and 3 of 4 tries; the band is 0.2 … 0.9."""
    rows = [f'{{"task": "math", "id": "s{i}", "question": "{i}+0", "answer": "{i}"}}\n' for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    right = {"s0": 4, "s1": 1, "s2": 0, "s3": 3}

    def answers(run, count, *, tries, max_tokens, greedy):
        assert (count, tries, greedy, run.eval_data) == (0, 4, False, run.data)
        return [dict(id=key, task="math", completion=f"\\boxed{{{key[1] if i < n else 99}}}", answer=key[1],
                     image_size=None) for key, n in right.items() for i in range(4)]

    monkeypatch.setattr(training, "answer_heldout", answers)
    in_this_process(monkeypatch, alone)
    evaluation.main(["curriculum", "--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--out",
                     str(tmp_path / "out"), "--low", "0.2", "--samples-per-question", "4"])
    kept = [json.loads(line) for line in (tmp_path / "out" / "curriculum.jsonl").read_text().splitlines()]
    assert [(row["id"], row["pass_rate"]) for row in kept] == [("s3", 0.75), ("s1", 0.25)]
    mix = datasets.open_data([f"{tmp_path}/out/curriculum.jsonl?in_order=1"])
    assert [mix[draw].question for draw in range(2)] == ["3+0", "1+0"]


def test_curriculum_writes_the_images_that_it_keeps(tmp_path, monkeypatch, alone):
    in_this_process(monkeypatch, alone)
    evaluation.main(["curriculum", "--model", "tiny", "--data", "synthetic:grounding?size=56x56", "--out",
                     str(tmp_path), "--low", "0", "--samples", "2", "--samples-per-question", "2", "--max-tokens", "4"])
    (first, _) = datasets.open_data([f"{tmp_path}/curriculum.jsonl"]).sources[0]
    assert first.images[0].size == (56, 56) and first.answer == datasets.open_data(
        ["synthetic:grounding?size=56x56"]).at(0).answer
