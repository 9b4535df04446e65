"""The papers' settings: each runs on a file in the true format, and waits long enough. A card's: each fits and runs."""
import json
import re

import pytest
import ranks
from conftest import ROOT

import fsdp
import grpo_vl
import rewards
import training
from options import parse_config

FILES = {"pr1-grounding": "refcoco-pr1:refcoco_pr1.json", "pr1-counting": "pixmo-pr1:pixmo_train.json",
         "pr1-ocr": "fox:en_page_ocr.json", "pr1-detection": "coco:instances_val.json", "ovr-rl": "math500.jsonl"}


@pytest.mark.parametrize("preset", FILES)
def test_every_preset_takes_two_steps_on_a_file_in_the_true_format(alone, preset, tmp_path):
    """All of the preset's own settings, on the tiny model and with fewer, shorter rollouts."""
    kind, _, file = FILES[preset].rpartition(":")
    spec = f"{kind or 'math500'}:{ROOT}/tests/fixtures/data/{file}"
    small = dict(model="tiny", data=(spec,), prompts=2, group=2, max_tokens=6, max_tokens_at=(), out=str(tmp_path), eval_every=0)
    config = grpo_vl.Config(**(grpo_vl.PRESETS[preset] | small))
    run = training.prepare(config, alone, config.model, beta=config.beta)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    metrics = [grpo_vl.train_step(run, step) for step in range(2)]
    assert metrics[1]["step"] == 1 and metrics[1]["sampler_gap"] < 1e-5 and metrics[1]["groups"] == 2
    assert (tmp_path / "samples" / "step-0.json").exists()
    assert ("kl" in metrics[0]) == preset.startswith("pr1")


# Layers, key/value heads and head width of the published 3B and 7B: bytes a token of keys and values, in bf16.
KV_BYTES = {"3B": 2 * 2 * 36 * 2 * 128, "7B": 2 * 2 * 28 * 4 * 128}


@pytest.mark.parametrize("preset", [name for name, options in grpo_vl.PRESETS.items() if "Qwen" in options.get("model", "")] + [None])
def test_a_presets_timeout_is_above_its_longest_rollout(preset):
    """On 8 GPUs, when every answer has the greatest length and a token of all rows takes 12 ms (7B's weights and 8 GiB
    of keys and values are 23 GB, 7 ms at an H100's 3.35 TB/s)."""
    config = grpo_vl.Config(**grpo_vl.PRESETS.get(preset, {}))
    limit = grpo_vl.length_limit(config, config.steps)
    rows = -(-config.prompts // 8) * config.group
    at_once = max(1, config.kv_gb * 2**30 // KV_BYTES[re.search("[37]B", config.model)[0]] // (limit + config.max_prompt / config.group))
    batches = -(-rows // min(at_once, rows))
    assert config.timeout > batches * limit * 0.012


def test_a_reward_option_goes_to_the_tasks_that_have_it(alone):
    """Grounding squares the IoU; counting has no such option and trains all the same."""
    options = '{"iou_power": 2}'
    run = ranks.make_run(alone, reward=rewards.score, reward_options=options, data=("synthetic:counting?size=56x56",))
    assert "reward/count" in grpo_vl.train_step(run, 0)


# ── a card's, beside a task's ──
@pytest.mark.parametrize("preset", ["3b-24gb", "3b-48gb", "7b-48gb", "7b-80gb"])
def test_a_cards_preset_fits_the_card_by_the_plan(preset, capsys):
    """With each paper's task, whose group and lengths it takes over; adapters take ten times the lr of PR1."""
    for task in ("pr1-detection", "ovr-rl", "pr1-grounding"):
        card = preset.split("-")[1].removesuffix("gb")
        arguments = ["--preset", f"{task},{preset}", "--plan", f"1x{card}"]
        grpo_vl.main(arguments)
        planned = capsys.readouterr().out
        assert planned.splitlines()[-1] == "fits", task
    (row,) = re.findall(rf"pr1-grounding,{preset}` \| ([\d.]+) GiB.*?\| (?:([\d.]+) GiB)?", (ROOT / "README.md").read_text())
    found = [re.search(rf"^{name}.* ([\d.]+) GiB$", planned, re.M) for name in ("peak", "together")]
    assert row == tuple(f"{float(number[1]):.1f}" if number else "" for number in found)
    config = parse_config(grpo_vl.Config, arguments, grpo_vl.PRESETS, "", True)
    assert config.lr == (1e-5 if config.lora else 1e-6)


@pytest.mark.parametrize("preset, trained", [("3b-24gb", 56), ("3b-48gb", None), ("7b-48gb", 56), ("7b-80gb", 56)])
def test_a_cards_preset_runs_on_the_stand_in(preset, trained, alone, tmp_path):
    """The preset's own flags, on the tiny model and two steps of one small scene."""
    small = [
        "--model", "tiny", "--data", "synthetic:grounding?size=56x56", "--steps", "2", "--prompts", "2", "--group",
        "2", "--max-tokens", "6", "--pictures-every", "0", "--eval-samples", "2", "--out", str(tmp_path / "run")]
    arguments = ["--preset", f"pr1-grounding,{preset}", *small]
    config = parse_config(grpo_vl.Config, arguments, grpo_vl.PRESETS, "", True)
    expected = grpo_vl.PRESETS[preset]
    assert {name: getattr(config, name) for name in expected} == expected | {"model": "tiny"}
    run = training.prepare(config, alone, config.model, beta=config.beta)
    kept = fsdp.trainable_parameters(run.policy)
    assert trained is None or len(kept) == trained  # A and B of 4 layers' 7 linears
    assert grpo_vl.train(run)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["kl"] == 0 and rows[0]["lr"] == config.lr
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
