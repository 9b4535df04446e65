"""The cold start: loss on completion tokens only, packed without leaks, text and images together."""
import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ranks
import torch
from conftest import ROOT
from test_run_folder import finished_run

import data
import fsdp
import grpo_vl
import packing
import sft_coldstart
import training
from qwen_vl import Completion, Group

MIXED = (f"{ranks.WORLD}:0.5", "synthetic:math?text=1:0.5")


def make_run(processes, **changes):
    small = dict(model="tiny", data=MIXED, train="all", batch=6, steps=3, lr=1e-3, warmup=0, max_tokens=256,
                 checkpointing=False, micro_tokens=400)
    config = sft_coldstart.Config(**(small | changes))
    run = training.prepare(config, processes, config.model, freeze_vision=config.train == "llm", imitates=True)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    return run


def steps(processes, count=3, **changes):
    run = make_run(processes, **changes)
    metrics = [sft_coldstart.sft_step(run, step) for step in range(count)]
    weights = ranks.full_weights(run.policy)
    return metrics, weights if processes.rank == 0 else None


def test_loss_is_huggingfaces_on_the_response_alone(alone):
    """−Σ log π / all response tokens, each sample through the stock model by itself."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    run = make_run(alone)
    twin = Qwen2_5_VLForConditionalGeneration(run.policy.model.config).eval()
    twin.load_state_dict({n.removeprefix("model."): w for n, w in ranks.full_weights(run.policy).items()})
    total, count, tasks = 0.0, 0, set()
    for draw in range(6):
        sample = run.data[draw]
        tasks.add(sample.task)
        prompt, response = training.make_prompt(run, sample), sft_coldstart.response_tokens(run, sample)
        assert response[-1] == run.special.im_end
        ids = torch.tensor([prompt.ids + response])
        kinds = torch.zeros_like(ids)
        kinds[0, prompt.image_slots] = 1
        images = {}
        if prompt.pixels_ND is not None:
            images = dict(pixel_values=prompt.pixels_ND, image_grid_thw=torch.tensor(prompt.grids))
        with torch.no_grad():
            logits = twin(input_ids=ids, mm_token_type_ids=kinds, **images).logits[0]
        logp = logits.masked_fill(run.special.banned_V, float("-inf")).log_softmax(-1)
        scored = logp[len(prompt.ids) - 1 : -1].gather(1, torch.tensor(response)[:, None])
        total, count = total - scored.sum().item(), count + len(response)
    assert tasks == {"grounding", "math"}
    metrics = sft_coldstart.sft_step(run, 0)
    assert metrics["tokens"] == count
    assert metrics["loss"] == pytest.approx(total / count, abs=1e-5)


def test_two_ranks_learn_as_one_and_cuts_do_not_matter(alone, pair):
    want, weights = steps(alone)
    for got, other in (steps(alone, micro_tokens=120), pair.run("test_sft_coldstart.steps")[0]):
        for one, two in zip(want, got):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert max((weights[n] - other[n]).abs().max().item() for n in weights) < 1e-4
    assert want[2]["loss"] < want[0]["loss"]


def test_samples_do_not_see_each_other(alone):
    """Another neighbour in the row leaves a sample's log-probs alone."""
    run = make_run(alone)
    groups = []
    for draw in range(4):
        sample = run.data[draw]
        response = Completion(sft_coldstart.response_tokens(run, sample))
        groups.append(Group(training.make_prompt(run, sample), [response]))
    def logps(chosen):
        (pack,) = packing.pack_for_ranks(chosen, 10**6, run.special, alone)
        with torch.no_grad():
            return run.policy(pack)[0]
    last = len(groups[3].completions[0].tokens)
    one, two = logps([groups[0], groups[3]]), logps([groups[2], groups[1], groups[3]])
    torch.testing.assert_close(one[-last:], two[-last:], atol=1e-5, rtol=0)


def test_no_entropy_is_computed(alone, monkeypatch):
    monkeypatch.setattr(torch.special, "entr", lambda *_: pytest.fail("nobody asks for it"))
    (metrics,), _ = steps(alone, count=1)
    assert metrics["loss"] > 0


def test_train_llm_leaves_tower_and_merger_alone(alone):
    start = ranks.full_weights(make_run(alone).policy)
    _, end = steps(alone, count=1, train="llm")
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved and not any(".visual." in name for name in moved)


def test_a_datas_own_response_is_learnt_and_think_is_written(alone, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"task": "math", "question": "1+1", "answer": "2", "response": "It is 2."}\n')
    run = make_run(alone, data=(str(tmp_path / "own.jsonl"),))
    tokens = sft_coldstart.response_tokens(run, run.data[0])
    assert run.tokenizer.decode(tokens[:-1]) == "It is 2."
    run = make_run(alone, data=(ranks.WORLD,), think="before")
    text = run.tokenizer.decode(sft_coldstart.response_tokens(run, run.data[0])[:-1])
    assert text.startswith("<think>") and text.endswith("</answer>") and "bbox_2d" in text


@pytest.mark.parametrize("response, said", [("x " * 300, "--max-tokens is 256"), ("<|image_pad|>", "placeholder")])
def test_a_response_that_cannot_be_learnt_is_refused(alone, tmp_path, response, said):
    row = f'{{"task": "math", "question": "1+1", "answer": "2", "response": "{response}"}}\n'
    (tmp_path / "long.jsonl").write_text(row)
    run = make_run(alone, data=(str(tmp_path / "long.jsonl"),))
    with pytest.raises(ValueError, match=said):
        sft_coldstart.response_tokens(run, run.data[0])


def test_the_ovr_preset_takes_two_steps_on_reasoning_traces(alone):
    """All of the preset's settings (the language model alone, cosine, lr 2e-4) on the tiny model, few samples."""
    config = sft_coldstart.PRESETS["ovr-coldstart"] | dict(
        model="tiny", data=(f"traces:{ROOT}/tests/fixtures/data/traces.jsonl",), batch=4)
    run = make_run(alone, **({name: getattr(sft_coldstart.Config(), name) for name in ("train", "lr", "warmup")} | config))
    metrics = [sft_coldstart.sft_step(run, step) for step in range(2)]
    assert run.config.train == "llm" and run.config.lr == 2e-4
    assert metrics[0]["lr"] == pytest.approx(2e-4 / 50) and metrics[1]["grad_norm"] > 0


def test_forms_of_thinking_are_mixed_by_sample_and_asked_for_as_written(alone):
    """--think all: half plain, a quarter of each form; the prompt asks for the form of the response."""
    run = make_run(alone, data=(ranks.WORLD,), think="all")
    forms = {"plain": 0, "before": 0, "after": 0}
    for draw in range(200):
        sample = run.data[draw]
        asked = run.tokenizer.decode(training.make_prompt(run, sample).ids)
        said = run.tokenizer.decode(sft_coldstart.response_tokens(run, sample)[:-1])
        form = "before" if said.startswith("<think>") else "after" if said.endswith("</think>") else "plain"
        assert ("and final answer in" in asked) == (form == "before")
        assert ("and after it the thinking" in asked) == (form == "after")
        forms[form] += 1
    assert 80 < forms["plain"] < 120 and 30 < forms["before"] < 70 and 30 < forms["after"] < 70  # ± 3 σ


def test_a_stage_runs_the_stages_before_it_once(alone, tmp_path, monkeypatch):
    """The second stage begins with the first one's weights; a third run of it finds them there."""
    small = dict(model="tiny", data=(ranks.WORLD,), train="all", batch=2, steps=1, max_tokens=256, warmup=0,
                 checkpointing=False)
    monkeypatch.setitem(sft_coldstart.PRESETS, "first", small | dict(lr=1e-2, out=str(tmp_path / "first")))
    second = small | dict(after="first", lr=1e-20, out=str(tmp_path / "second"))
    assert sft_coldstart.train_after(sft_coldstart.Config(**second), alone, None)
    first = load_weights(tmp_path / "first" / "model")
    for name, weight in load_weights(tmp_path / "second" / "model").items():
        torch.testing.assert_close(weight, first[name], atol=1e-12, rtol=0)  # its own step is lr 1e-20
    made = (tmp_path / "first" / "metrics.jsonl").stat().st_mtime_ns
    again = small | dict(after="first", out=str(tmp_path / "again"))
    assert sft_coldstart.train_after(sft_coldstart.Config(**again), alone, None)
    assert (tmp_path / "first" / "metrics.jsonl").stat().st_mtime_ns == made


def test_seconds_count_what_was_trained_before_a_resume(alone, tmp_path, monkeypatch):
    """A clock that goes on by 10 s a look: a look as the run begins, one after each step."""
    def run(now, **changes):
        looks = itertools.count(now, 10)
        monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
        small = dict(model="tiny", data=(ranks.WORLD,), train="all", batch=2, max_tokens=256, warmup=0, eval_every=0,
                     checkpointing=False, schedule="constant", out=str(tmp_path), seconds=35.0)
        assert sft_coldstart.train(sft_coldstart.Config(**(small | changes)), alone)
        return [json.loads(line)["seconds/total"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert run(0, steps=2) == [10, 20]
    assert run(1000, steps=9) == [10, 20, 30, 40]
    assert run(2000, steps=9, seconds=40.0) == [10, 20, 30, 40, 50]  # 40 is not more than 40
    assert run(3000, steps=9, seconds=40.0) == [10, 20, 30, 40, 50]


def load_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", sft_coldstart.PRESETS)
def test_every_presets_options_are_valid_and_its_drawn_data_opens(name):
    config = sft_coldstart.Config(**sft_coldstart.PRESETS[name])
    if config.data[0].startswith("synthetic:"):
        mix = data.open_data(config.data, seed=config.seed)
        named = {spec.removeprefix("synthetic:").partition("?")[0] for spec in config.data}
        assert {mix[draw].task for draw in range(60)} == named
        assert len(named) == 5 or config.think != "all"
    assert config.after in ("", *sft_coldstart.PRESETS)


def test_a_stage_after_nothing_that_is_known_is_refused():
    with pytest.raises(ValueError, match=r"--after is 'bse'; choose from .*base-1"):
        sft_coldstart.Config(after="bse")


def test_a_cold_start_is_found_by_its_run_and_by_its_model(alone, tmp_path):
    finished_run(alone, tmp_path / "run")
    assert sft_coldstart.find_model(tmp_path / "run") == tmp_path / "run" / "model"
    assert sft_coldstart.find_model(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    assert sft_coldstart.find_model(tmp_path / "new") is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="no run"):
        sft_coldstart.find_model(tmp_path / "other")


def test_a_cold_start_is_begun_for_the_stand_in_alone_and_into_a_folder_of_its_own(alone, tmp_path):
    config = grpo_vl.Config(model="some/model", cold_start=str(tmp_path / "mistyped"), out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"there is no cold start in .*mistyped: python sft_coldstart.py --model some"):
        sft_coldstart.model_for(config, alone, None)
    with pytest.raises(ValueError, match="--cold-start and --out are both runs/x"):
        grpo_vl.Config(cold_start="runs/x", out="runs/x")
    half = sft_coldstart.Config(**sft_coldstart.PRESETS["tiny"] | dict(out=str(tmp_path / "half"), lr=5e-3))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps(asdict(half)))
    config = grpo_vl.Config(model="base", cold_start=str(tmp_path / "half"), out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"--lr was 0\.005 and is 0\.001"):
        sft_coldstart.model_for(config, alone, None)
