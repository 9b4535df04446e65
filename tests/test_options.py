"""Options: presets, saved configurations and the command line; what a wrong one is told; --check."""
import json
import re
from dataclasses import fields

import pytest

import grpo_vl
import sft_coldstart
from options import HEADINGS, parse_config, without_effect, without_effect_in_rl


def test_presets_and_command_line(tmp_path):
    tiny = parse_config(grpo_vl.Config, [], grpo_vl.PRESETS, "", False)
    assert tiny.model == "base"  # no GPU, nothing asked for
    changed = parse_config(grpo_vl.Config, ["--lr", "0.5", "--no-checkpointing"], grpo_vl.PRESETS, "", False)
    assert (changed.lr, changed.checkpointing, changed.model) == (0.5, False, "base")
    named = parse_config(grpo_vl.Config, ["--model", "x/y"], grpo_vl.PRESETS, "", False)
    assert (named.model, named.lr) == ("x/y", 1e-6)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"lr": 0.25, "data": ["a.jsonl"], "model": "x"}))
    replayed = parse_config(grpo_vl.Config, ["--config", str(saved), "--seed", "3"], grpo_vl.PRESETS, "", False)
    assert (replayed.lr, list(replayed.data), replayed.seed) == (0.25, ["a.jsonl"], 3)


def test_of_several_presets_a_later_one_overrides():
    parse = lambda *words: parse_config(grpo_vl.Config, [*words], grpo_vl.PRESETS, "", True)  # noqa: E731
    both = parse("--preset", "pr1-grounding,3b-24gb")
    assert (list(both.data), both.beta, both.prompts) == (["refcoco-pr1:refcoco_train.json"], 0.04, 14)  # the task's
    assert (both.lora, both.lr, both.kv_gb, both.micro_tokens) == (32, 1e-5, 2.0, 4096)  # the card's
    assert parse("--preset", "pr1-grounding,7b-48gb").model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert parse("--preset", "7b-48gb,pr1-grounding").model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert parse("--preset", "pr1-grounding,3b-24gb", "--lora", "8").lora == 8
    stage_1 = parse_config(sft_coldstart.Config, ["--preset", "tiny,ovr-coldstart"], sft_coldstart.PRESETS, "", True)
    assert (list(stage_1.data), stage_1.model) == (["traces:cold_start.jsonl"], "base")


@pytest.mark.parametrize("arguments, said", [
    (["--preset", "pr1-grounding,huge"], "--preset 'huge': choose from tiny, pr1-grounding"),
    (["--preset", "tiny, 3b-24gb"], "--preset ' 3b-24gb': choose from"),
    (["--bogus", "1"], "bogus"), (["--loss", "foo"], "foo"), (["--group", "0"], "--group is 0"),
    (["--temperature", "0"], "--temperature is 0"), (["--preset", "huge"], "huge"),
])
def test_wrong_options_stop_with_a_sentence(arguments, said, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse_config(grpo_vl.Config, arguments, grpo_vl.PRESETS, "", False)
    assert said in capsys.readouterr().err + str(stopped.value)


@pytest.mark.parametrize("content, said", [
    ('{"lerning_rate": 1}', "lerning_rate"), ('{"loss": "foo"}', "--loss"), ("{", "Expecting"),
])
def test_wrong_config_files_stop_with_a_sentence(content, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit):
        parse_config(grpo_vl.Config, ["--config", str(tmp_path / "config.json")], grpo_vl.PRESETS, "", False)
    assert said in capsys.readouterr().err


def test_think_takes_a_form_or_none():
    parse = lambda *words: parse_config(grpo_vl.Config, [*words], grpo_vl.PRESETS, "", False)  # noqa: E731
    assert parse().think == "no" and parse("--think").think == "before" and parse("--think", "after").think == "after"
    config = parse("--think", "--seed", "3")
    assert (config.think, config.seed) == ("before", 3)


def test_check_prints_what_the_data_holds_and_the_first_prompt(tmp_path, capsys):
    rows = [{"task": "math", "question": f"What is {n} + 1?", "answer": str(n + 1)} for n in (1, 22)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo_vl.main(["--model", "tiny", "--data", f"{tmp_path}/sums.jsonl", "--check"])
    said = capsys.readouterr().out
    assert "2 samples of math" in said and "longest prompt:" in said and "(sums-2)" in said
    assert "<|im_start|>user\nWhat is 1 + 1?\nPut the final answer in \\boxed{}.<|im_end|>" in said


@pytest.mark.parametrize("changes, said", [
    (dict(clip_high=0.28), "--clip-high: no effect at --inner-steps 1"), (dict(clip_low=0.1), "--clip-low: no effect"),
    (dict(ratio="sequence"), "--ratio: no effect at --inner-steps 1"), (dict(kl="k2"), "--kl: no effect at --beta 0"),
    (dict(overlong_buffer=64), "--overlong-buffer: acts with --overlong soft only"),
    (dict(scale="none", std="population"), "--std: no effect at --scale none"),
    (dict(eval_samples=9), "--eval-samples: no effect at --eval-every 0"),
    (dict(blind=True), "--blind: no effect at --eval-every 0"),
    (dict(keep_attention=True, checkpointing=False), "--keep-attention: no effect with --no-checkpointing"),
    (dict(checkpoint_every=2, checkpointing=False), "--checkpoint-every: no effect with --no-checkpointing"),
    (dict(lora_alpha=8.0), "--lora-alpha: no effect without --lora"),
    (dict(freeze_vision=True, lora=4), "--freeze-vision: no effect beside --lora"),
    (dict(warmup=501), "--warmup 501: --lr is not reached in 500 steps"),
])
def test_options_that_act_only_with_others_say_so(changes, said):
    config = grpo_vl.Config(**changes)
    (sentence,) = without_effect(config) + without_effect_in_rl(config)
    assert said in sentence


@pytest.mark.parametrize("module, options, said", [
    (sft_coldstart, ["--eval-samples", "9"], ["--eval-samples: no effect at --eval-every 0"]),
    (grpo_vl, ["--eval-samples", "9", "--kl", "k2"],
     ["--eval-samples: no effect at --eval-every 0", "--kl: no effect at --beta 0"])])
def test_both_scripts_say_so_before_the_run_begins(tmp_path, monkeypatch, capsys, module, options, said):
    monkeypatch.setattr(module.training, "one_run", lambda: pytest.exit("here the run begins"))
    with pytest.raises(pytest.exit.Exception):
        module.main(["--model", "tiny", "--data", "synthetic:math?text=1", "--out", str(tmp_path / "run"), *options])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {sentence}" for sentence in said]


@pytest.mark.parametrize("changes", [
    {}, dict(clip_high=0.28, ratio="sequence", inner_steps=4), dict(kl="k2", beta=0.1), dict(std="population"),
    dict(overlong="soft", overlong_buffer=64), dict(eval_every=5, eval_samples=9, blind=True),
    dict(keep_attention=True, checkpoint_every=2), dict(lora=4, lora_alpha=8.0), dict(freeze_vision=True),
    dict(warmup=500),  # reached by the last step
])
def test_options_that_act_are_not_complained_of(changes):
    config = grpo_vl.Config(**changes)
    assert without_effect(config) + without_effect_in_rl(config) == []


# ── --help ──
@pytest.mark.parametrize("module", [grpo_vl, sft_coldstart])
def test_help_stands_under_headings(module, capsys):
    """Each option once, under a heading and with its paper's value; a preset's values are the defaults."""
    with pytest.raises(SystemExit) as stop:
        parse_config(module.Config, ["--preset", "tiny", "--help"], module.PRESETS, "What it is.", True)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    listed = re.findall(r"^  (--[a-z0-9-]+)", said, re.M)
    own = ["--" + field.name.replace("_", "-") for field in fields(module.Config)]
    assert sorted(listed) == sorted([*own, "--preset", "--config"])
    empty = {grpo_vl: [], sft_coldstart: ["the reward", "advantage and loss"]}[module]
    headings = [heading for heading in HEADINGS if heading not in empty]
    assert re.findall(r"^(\w.*):$", said, re.M) == ["options", *headings]
    words = " ".join(said.split())
    assert "What it is." in words and "[PR1 code: 3136]" in words and "(default: base)" in words
    data = said.split("the data:")[1].split("the prompt:")[0]
    assert re.findall(r"^  (--[a-z-]+)", data, re.M) == ["--data", "--fields", "--heldout", "--skip-bad", "--check"]


def test_headings_name_options_that_exist():
    known = {field.name for module in (grpo_vl, sft_coldstart) for field in fields(module.Config)}
    named = " ".join(HEADINGS.values()).split()
    assert set(named) == known and len(named) == len(known)


@pytest.mark.parametrize("changes, said", [
    (dict(overlong_buffer=0), "--overlong-buffer is 0"), (dict(dynamic_sampling=-1), "--dynamic-sampling is -1"),
    (dict(sharding="by-hand", offload=True), "--sharding by-hand"), (dict(heldout=1.0), "--heldout is 1.0"),
])
def test_options_out_of_range_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        grpo_vl.Config(**changes)
