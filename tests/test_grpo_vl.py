"""The step of GRPO: ranks, micro-batches, variants, rewards; on the tiny stand-in. Its loss: test_loss.py."""
import math
import re

import pytest
import ranks
import torch
from ranks import by_length, full_weights, make_run
from references import ATTENTION, Operations
from small import write
from test_training import close

import data as datasets
import grpo_vl
import packing
import rewards
import training
from options import parse_config
from qwen_vl import Completion, Group


def first_rollouts(ranks, **changes):
    """{draw: (tokens, logps, rewards)} of the first step's groups, of all ranks."""
    run = make_run(ranks, **changes)
    groups, rewards_of, _ = grpo_vl.collect_groups(run, 0)
    found = {g.draw: ([c.tokens for c in g.completions], [c.logps for c in g.completions]) for g in groups}
    merged = {draw: value for part in ranks.gather(found) for draw, value in part.items()}
    return merged, rewards_of


def test_rollouts_are_the_same_on_one_and_two_ranks(alone, pair):
    want, rewards_of = first_rollouts(alone)
    for got, got_rewards in pair.run("test_grpo_vl.first_rollouts"):
        assert list(got_rewards) == [0, 1, 2, 3] and got_rewards == rewards_of
        for draw, (tokens, logps) in want.items():
            assert got[draw][0] == tokens
            for a, b in zip(got[draw][1], logps):
                assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)


FEWER_THAN_A_BATCH = {"question": "How much is 2 + 3?", "task": "math", "answer": "5"}


def test_a_sample_that_comes_twice_in_a_batch_is_answered_anew(alone, pair, tmp_path):
    """Three samples, seven prompts: draws 0-2 are a pass over the data, 3-5 another, 6 begins a third."""
    rows = [FEWER_THAN_A_BATCH | {"id": name} for name in "abc"]
    data = (write(tmp_path, *rows),)
    small = dict(data=data, eval_every=0)
    once, _ = first_rollouts(alone, prompts=3, **small)
    batch, _ = first_rollouts(alone, prompts=7, **small)
    for draw in range(3):  # what a batch without repetition gives
        assert batch[draw][0] == once[draw][0]
    answers = [tuple(tokens) for draw in range(7) for tokens in batch[draw][0]]
    assert len(set(answers)) == 7 * 3
    for got, _ in pair.run("test_grpo_vl.first_rollouts", prompts=7, **small):
        assert {draw: got[draw][0] for draw in batch} == {draw: batch[draw][0] for draw in batch}


def test_a_resumed_run_answers_a_repeated_sample_as_it_would_have(alone, tmp_path):
    """Also where the cache holds few rows at a time."""
    rows = [FEWER_THAN_A_BATCH | {"id": name} for name in "abc"]
    small = dict(data=(write(tmp_path, *rows),), eval_every=0, prompts=7)
    run = make_run(alone, **small)
    grpo_vl.collect_groups(run, 0)
    whole, *_ = grpo_vl.collect_groups(run, 1)
    resumed = make_run(alone, **small, kv_gb=1e-4)
    resumed.cursor = 7
    again, *_ = grpo_vl.collect_groups(resumed, 1)
    assert [group.draw for group in again] == [7, 8, 9, 10, 11, 12, 13]
    assert [[c.tokens for c in g.completions] for g in again] == [[c.tokens for c in g.completions] for g in whole]


def one_rank_meets_a_bad_row(ranks):
    """What ends the step: draw 1, of rank 1, cannot be read."""
    run = make_run(ranks, prompts=2)
    good = run.data

    class Faulty:
        def __getitem__(self, draw):
            if draw == 1:
                raise datasets.DataError("rows.jsonl:2: unusable")
            return good[draw]

    run.data = Faulty()
    with pytest.raises(datasets.DataError) as ended:
        grpo_vl.collect_groups(run, 0)
    return str(ended.value)


def test_a_bad_row_on_one_rank_ends_the_step_on_both(pair):
    assert pair.run("test_grpo_vl.one_rank_meets_a_bad_row") == ["rows.jsonl:2: unusable"] * 2


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_two_ranks_make_the_same_three_steps_as_one(alone, pair, loss):
    want, weights = ranks.steps(alone, loss=loss)
    got, other = pair.run("ranks.steps", loss=loss)
    for one, two in zip(want, got[0]):
        for name in ("loss", "grad_norm", "reward", "entropy", "length"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert [m["grad_norm"] > 1e-4 for m in want] == [True] * 3
    assert close(weights, got[1], 1e-5)
    same = [name for name in got[0][0] if not name.startswith("seconds")]
    assert all(got[0][i][n] == other[0][i][n] for i in range(3) for n in same)  # equal on all ranks


def test_the_gradient_does_not_depend_on_micro_batches(alone):
    _, whole = ranks.steps(alone, count=1, micro_tokens=10**6)
    _, cut = ranks.steps(alone, count=1, micro_tokens=90)
    assert close(whole, cut, 1e-6)


def test_checkpointing_does_not_matter(alone):
    _, plain = ranks.steps(alone, count=1)
    _, recomputed = ranks.steps(alone, count=1, checkpointing=True)
    assert close(plain, recomputed, 1e-6)


def test_a_step_that_keeps_attention_computes_it_as_often_as_one_without_checkpointing(alone):
    calls, weights = [], []
    for options in (dict(), dict(checkpointing=True), dict(checkpointing=True, keep_attention=True)):
        with Operations() as operations:
            weights.append(ranks.steps(alone, count=1, **options)[1])
        calls.append(operations.ran.count(ATTENTION))
    plain, again, kept = calls
    assert plain == kept < again
    assert close(weights[0], weights[2], 1e-6)


def test_the_entropy_is_measured_in_the_steps_asked_for(alone, monkeypatch):
    want, weights = ranks.steps(alone, beta=0.1)
    calls, entr = [], torch.special.entr
    monkeypatch.setattr(torch.special, "entr", lambda *given: calls.append(1) or entr(*given))
    for every, measured in ((2, [True, False, True]), (0, [False] * 3)):
        calls.clear()
        found, other = ranks.steps(alone, beta=0.1, entropy_every=every)
        assert ["entropy" in metrics for metrics in found] == measured
        assert len(calls) == sum(measured)  # a micro-batch a step, none of the reference
        assert [one["entropy"] for one in found if "entropy" in one] == [
            one["entropy"] for one, due in zip(want, measured) if due]
        assert close(weights, other, 1e-6)


@pytest.mark.parametrize("changes", [{}, dict(model="tiny-untied", beta=0.1), dict(freeze_vision=True)])
def test_sharding_by_hand_makes_the_same_three_steps(pair, changes):
    (want, weights), _ = pair.run("ranks.steps", **changes)
    (got, other), _ = pair.run("ranks.steps", sharding="by-hand", **changes)
    for one, two in zip(want, got):
        for name in ("loss", "grad_norm", "reward", "entropy", "length", "sampler_gap"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    if "model.lm_head.weight" not in other:  # tied: by hand it has one name
        torch.testing.assert_close(weights.pop("model.lm_head.weight"), other["model.model.language_model.embed_tokens.weight"])
    assert close(weights, other, 1e-6)


def mixed_modalities(ranks, text_rank):
    """A step in which one rank sees text alone and the other images."""
    run = make_run(ranks, prompts=2)
    text = datasets.open_data(["synthetic:math?text=1"], seed=0)
    plain = run.data

    class Mixed:
        def __getitem__(self, draw):
            return text[draw] if draw % 2 == text_rank else plain[draw]

    run.data = Mixed()
    return grpo_vl.train_step(run, 0)


@pytest.mark.parametrize("text_rank", [0, 1])
def test_text_on_one_rank_and_images_on_the_other(pair, text_rank):
    one, two = pair.run("test_grpo_vl.mixed_modalities", text_rank=text_rank)
    assert one["grad_norm"] == two["grad_norm"] > 0


def test_a_rank_without_prompts_goes_along(pair):
    (metrics, _), _ = pair.run("ranks.steps", count=1, prompts=1)
    assert metrics[0]["groups"] == 1 and metrics[0]["grad_norm"] > 0


def one_rank_drops_everything(ranks):
    """Dynamic sampling in which rank 1's groups never have variance: it trains on fillers."""
    run = make_run(ranks, dynamic_sampling=1, prompts=4)

    def reward(task, completion, answer, image_size=None, *, truncated=False, **options):
        return by_length(task, completion, answer) if ranks.rank == 0 else 0.5

    run.reward = reward
    return grpo_vl.train_step(run, 0)


def test_a_rank_whose_groups_are_all_dropped_goes_along(pair):
    one, _ = pair.run("test_grpo_vl.one_rank_drops_everything")
    assert one["groups"] == 4 and one["cursor"] == 8 and one["zero_variance"] == 0
    assert (one["groups_drawn"], one["groups_rejected"]) == (8, 4)  # draws 1, 3, 5, 7


def test_groups_drawn_and_rejected_are_logged_with_dynamic_sampling_alone(alone):
    """Draw 1 alone is rejected: 3 drawn, 2 to keep; 3 more, all to keep, of which two are more than wanted."""
    run = make_run(alone, dynamic_sampling=2, prompts=3)
    equal = run.data[1].answer

    def reward(task, completion, answer, image_size=None, *, truncated=False, **options):
        return 0.5 if answer == equal else by_length(task, completion, answer)

    run.reward = reward
    metrics = grpo_vl.train_step(run, 0)
    assert (metrics["groups"], metrics["groups_drawn"], metrics["groups_rejected"]) == (3, 6, 1)
    plain = grpo_vl.train_step(make_run(alone), 0)
    assert "groups_drawn" not in plain and "groups_rejected" not in plain


def nothing_to_learn(ranks):
    """All groups equal: every advantage is zero, dynamic sampling finds nothing."""
    run = make_run(ranks, dynamic_sampling=1, reward=lambda *a, **k: 1.0)
    before = full_weights(run.policy)
    metrics = grpo_vl.train_step(run, 0)
    after = full_weights(run.policy)
    return metrics, all(torch.equal(before[name], after[name]) for name in before)


def test_equal_rewards_everywhere_leave_the_weights_alone(alone, pair):
    for metrics, unchanged in [nothing_to_learn(alone), *pair.run("test_grpo_vl.nothing_to_learn")]:
        assert unchanged and metrics["groups"] == 0
        assert all(value == value for value in metrics.values())  # no NaN


@pytest.mark.parametrize("changes, learns", [
    (dict(overlong="zero"), True), (dict(overlong="soft", overlong_buffer=4), True),
    (dict(group=1), False), (dict(group=1, baseline="leave_one_out", scale="none"), True),
    (dict(max_tokens=1), True),
])
def test_degenerate_batches_are_defined(alone, changes, learns):
    metrics, _ = ranks.steps(alone, count=1, **changes)
    assert all(value == value for value in metrics[0].values())
    assert (metrics[0]["grad_norm"] > 0) == learns


def everything_truncated(ranks, **changes):
    """A step whose completions were all cut at the length limit."""
    run = make_run(ranks, **changes)
    generate = run.sampler.generate

    def cut(*arguments):
        groups = generate(*arguments)
        for completion in [completion for group in groups for completion in group]:
            completion.truncated = True
        return groups

    run.sampler.generate = cut
    return grpo_vl.train_step(run, 0)


@pytest.mark.parametrize("overlong, learns", [("mask", False), ("keep", True)])
def test_a_batch_of_truncated_completions_is_defined(alone, overlong, learns):
    metrics = everything_truncated(alone, overlong=overlong)
    assert metrics["truncated"] == 1 and (metrics["grad_norm"] > 0) == learns
    assert all(value == value for value in metrics.values())


@pytest.mark.parametrize("changes", [
    dict(scale="batch"), dict(scale="none", std="population"), dict(baseline="leave_one_out"),
    dict(ratio="sequence", inner_steps=2, lr=1e-6), dict(beta=0.1, kl="k2"), dict(beta=0.1, kl="k3"),
    dict(beta=0.1, kl="k1"), dict(tis=2.0), dict(freeze_vision=True), dict(dynamic_sampling=2),
    dict(temperature=0.7), dict(model="tiny-untied"), dict(inner_steps=3, lr=0.01),
])
def test_every_variant_takes_two_steps(alone, changes):
    metrics, _ = ranks.steps(alone, count=2, **(dict(lr=0.01) | changes))
    assert metrics[1]["grad_norm"] > 0 and metrics[0]["sampler_gap"] < 1e-5
    assert metrics[0]["ratio"] == pytest.approx(1.0, abs=0.2)


def test_inner_steps_move_the_ratio_away_from_one(alone):
    metrics, _ = ranks.steps(alone, count=1, inner_steps=4, lr=0.3)
    assert metrics[0]["clip_low"] + metrics[0]["clip_high"] > 0
    on_policy, _ = ranks.steps(alone, count=1, lr=0.3)
    assert on_policy[0]["clip_low"] == on_policy[0]["clip_high"] == 0
    assert on_policy[0]["ratio"] == 1.0


def test_kl_grows_as_the_policy_leaves_its_reference(alone):
    metrics, _ = ranks.steps(alone, count=3, beta=1e-3, lr=0.1)
    kls = [m["kl"] for m in metrics]
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[2] > kls[0] + 1e-5


def test_kl_in_the_reward_is_subtracted_before_advantages(alone, monkeypatch):
    seen, raw = [], []
    advantages, score = grpo_vl.group_advantages, grpo_vl.score_groups

    def spy_on_rewards(run, step, groups):
        score(run, step, groups)
        raw.append(groups)

    monkeypatch.setattr(grpo_vl, "group_advantages", lambda r, **k: seen.append(r) or advantages(r, **k))
    monkeypatch.setattr(grpo_vl, "score_groups", spy_on_rewards)
    run = ranks.make_run(alone, beta=0.5, kl="k1", lr=0.1)
    grpo_vl.train_step(run, 0)
    grpo_vl.train_step(run, 1)
    # at step 0 policy and reference are one, so the KL is 0; at step 1 it is the sum over the sequence
    before = torch.tensor([group.rewards for group in raw[0]], dtype=torch.float64)
    torch.testing.assert_close(seen[0], before, atol=1e-4, rtol=0)
    reference = ranks.make_run(alone)
    for index, group in enumerate(raw[1]):
        for g, c in enumerate(group.completions):
            pack = packing.pack_groups([Group(group.prompt, [c])])
            pack = packing.prepare_attention(pack, alone.device)
            with torch.no_grad():
                kl = sum(c.logps) - reference.policy(pack)[0].sum().item()
            assert seen[1][index, g].item() == pytest.approx(c.reward - 0.5 * kl, abs=1e-4)


def test_frozen_vision_stays_and_the_rest_moves(alone):
    start = ranks.full_weights(ranks.make_run(alone).policy)
    _, end = ranks.steps(alone, count=1, freeze_vision=True)
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved and not any(".visual." in name for name in moved)


def test_the_length_limit_by_step():
    config = grpo_vl.Config(max_tokens=24, max_tokens_at=("300:32", "700:48"))
    assert [grpo_vl.length_limit(config, step) for step in (0, 299, 300, 699, 700, 900)] == [24, 24, 32, 32, 48, 48]
    ovr = grpo_vl.Config(**grpo_vl.PRESETS["ovr-rl"])
    assert [grpo_vl.length_limit(ovr, step) for step in (0, 300, 700)] == [24576, 32768, 49152]


def test_overlong_rewards_by_hand(alone):
    run = ranks.make_run(alone, reward=lambda *a, **k: 1.0, max_tokens=10, overlong_buffer=4)
    sample = run.data[0]
    lengths = [5, 6, 8, 10]
    # zero: the truncated one gets 0. soft: 0 up to 6 tokens, −2/4 at 8, −4/4 at 10
    for mode, expected in (("zero", [1, 1, 1, 0]), ("keep", [1, 1, 1, 1]), ("mask", [1, 1, 1, 1]),
                           ("soft", [1, 1, 0.5, 0])):
        object.__setattr__(run.config, "overlong", mode)
        done = [Completion([1] * n, [0.0] * n, truncated=n == 10) for n in lengths]
        grpo_vl.score_groups(run, 0, [Group(None, done, sample=sample)])
        assert [c.reward for c in done] == expected


def test_a_frozen_tower_is_not_run_by_a_training_pass(alone, monkeypatch):
    """Sampling's features serve it: without a forward of its own the policy's tower is not missed."""
    run = ranks.make_run(alone, freeze_vision=True)
    monkeypatch.setattr(run.policy.vision, "forward", None)
    assert grpo_vl.train_step(run, 0)["grad_norm"] > 0


def test_clip_defaults_follow_the_ratio():
    assert grpo_vl.clip_range(grpo_vl.Config()) == (0.2, 0.2)
    assert grpo_vl.clip_range(grpo_vl.Config(ratio="sequence", clip_high=0.01)) == (3e-4, 0.01)
    for preset in ([], ["--preset", "pr1-counting"]):  # a preset's config is made before the command line's
        words = [*preset, "--ratio", "sequence", "--inner-steps", "4"]
        config = parse_config(grpo_vl.Config, words, grpo_vl.PRESETS, "", False)
        assert grpo_vl.clip_range(config) == (3e-4, 4e-4)


def test_a_soft_penalty_that_reaches_every_answer_is_refused():
    with pytest.raises(ValueError, match="--overlong-buffer is 128 and --max-tokens 100: every answer would be"):
        grpo_vl.Config(overlong="soft", max_tokens=100)
    assert grpo_vl.Config(overlong="soft", max_tokens=200).overlong_buffer == 128


def test_kl_in_the_reward_is_logged_beside_the_rules_own_reward(alone):
    metrics, _ = ranks.steps(alone, count=2, beta=0.5, kl="k1", lr=0.1)
    lengths = metrics[1]["length"]  # β · mean sequence KL lies between the two rewards
    difference = metrics[1]["reward"] - metrics[1]["reward_minus_kl"]
    assert difference == pytest.approx(0.5 * metrics[1]["kl"] * lengths, rel=1e-4) and abs(difference) > 1e-4
    plain, _ = ranks.steps(alone, count=1)
    assert metrics[0]["reward"] == pytest.approx(plain[0]["reward"], abs=1e-6) and "reward_minus_kl" not in plain[0]


def test_undecided_rewards_have_no_weight_and_are_counted(alone):
    """A fourth of the completions cannot be decided: they are in no mean, and the others learn."""
    def undecided(task, completion, answer, image_size=None, *, truncated=False, **options):
        unclear = len(completion) % 4 == 0
        parts = {"undecided": 1.0} if unclear else {}
        return rewards.Score(0.0 if unclear else ranks.by_length(task, completion, answer), parts)

    run = ranks.make_run(alone, reward=undecided)
    groups, rewards_of, _ = grpo_vl.collect_groups(run, 0)
    unclear = [math.isnan(reward) for group in groups for reward in group.rewards]
    rollouts = [completion for group in groups for completion in group.completions]
    assert 0 < sum(unclear) < len(unclear)
    assert unclear == [len(completion.text) % 4 == 0 for completion in rollouts]
    weight_B = grpo_vl.rollout_weights(run.config, 0, alone, rollouts, len(rollouts))
    assert [weight == 0 for weight in weight_B.tolist()] == unclear
    run.cursor = 0
    metrics = grpo_vl.train_step(run, 0)
    assert metrics["undecided"] == pytest.approx(sum(unclear) / len(unclear))
    known = [reward for rewards_G in rewards_of.values() for reward in rewards_G if not math.isnan(reward)]
    assert metrics["reward"] == pytest.approx(sum(known) / len(known)) and metrics["grad_norm"] > 0


def test_an_option_that_no_task_has_is_refused_before_training(tmp_path):
    with pytest.raises(SystemExit, match=r"--reward-options .*no task has an option 'iou_pwer'"):
        grpo_vl.main(["--model", "tiny", "--out", str(tmp_path / "run"), "--reward-options", '{"iou_pwer": 2}'])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("think, form", [("before", r"\s*<think>.*</answer>"), ("after", r"\s*<answer>.*</think>")])
def test_both_orders_of_thinking_are_asked_for_and_scored(alone, think, form):
    run = ranks.make_run(alone, think=think, reward=rewards.score, max_tokens=4)
    prompt = training.make_prompt(run, run.data[0])
    text = run.tokenizer.decode(prompt.ids)
    assert (text.index("<think>") < text.index("<answer>")) == (think == "before")
    sample = run.data[0]
    said = rewards.reference(sample.task, sample.answer, sample.question, think=think)
    assert re.fullmatch(form, said, re.S)
    done = [Completion(run.tokenizer.encode(said, add_special_tokens=False), [])]
    grpo_vl.score_groups(run, 0, [Group(None, done, sample=sample)])
    assert done[0].reward == pytest.approx(3, abs=0.2) and done[0].parts["think"] == 1  # format, IoU, form
