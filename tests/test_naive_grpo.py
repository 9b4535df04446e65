"""grpo_vl.py held to naive_grpo.py: the same rollouts give the same loss, gradients and weights."""
import ast
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import fsdp
import grpo_vl
import naive_grpo
import packing
import qwen_vl
import rewards
import tiny
from naive_grpo import Rollout
from policy import Policy
from qwen_vl import Completion, Group

TEMPERATURE = 0.8
LR = 1e-3


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """The CPU's constants on any machine, and few answers."""
    few = dict(GPU=False, SIZE=56, FORMAT=1.0, MAX_TOKENS=6, PROMPTS=2, GROUP=3, STEPS=2, TEMPERATURE=TEMPERATURE)
    for name, value in few.items():
        monkeypatch.setattr(naive_grpo, name, value)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    """An untrained tiny model as a Hugging Face folder."""
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param == "tied", seed=0)


def write_model(path, *, tied, seed):
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_model(tokenizer, tied=tied, seed=seed, layers=2)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(path)
    return str(path)


# ── the same rollouts on both sides ──
# Two prompts of different length with images of different size, three answers each: of different
# lengths, most with a stop token (-1: <|im_end|>, -2: <|endoftext|>), the second one cut.
QUESTIONS = [("red circle", (56, 56)), ("the small green square in blue", (84, 56))]
ANSWERS = [[[5, 9, 33, -1], [70, 7, 7, 12, 81, 6], [44, -1]], [[301, -2], [21, 22, 23, -1], [8, -1]]]
REWARDS = [[1.5, 0.0, 1.2], [0.3, 0.9, 0.0]]


def noise_image(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def naive_groups(tokenizer, image_processor):
    stops = {-1: "<|im_end|>", -2: "<|endoftext|>"}
    groups = []
    for (name, size), answers, grades in zip(QUESTIONS, ANSWERS, REWARDS):
        prompt = naive_grpo.encode(tokenizer, image_processor, noise_image(*size), name)
        group = []
        for answer, reward in zip(answers, grades):
            tokens = [tokenizer.convert_tokens_to_ids(stops[t]) if t < 0 else t for t in answer]
            group.append(Rollout(prompt, tokens, reward))
        groups.append(group)
    return groups


def fast_side(folder, groups, *, beta, reference_folder, optimizer_class):
    """grpo_vl on the naive rollouts: (loss, gradients, weights after a step), as train_step does it.

    All that knows names of the fast side. Log-probs of π_old are the rollouts'; packing, scoring,
    advantages, reference, weights, loss and step are grpo_vl's own.
    """
    def policy_of(source):
        model, tokenizer = qwen_vl.load(source)
        special = qwen_vl.SpecialIds.read(tokenizer, model.config)
        return Policy(model, special.banned_V), tokenizer, special

    policy, tokenizer, special = policy_of(folder)
    reference = policy_of(reference_folder)[0] if beta else None
    config = grpo_vl.Config(temperature=TEMPERATURE, beta=beta, lr=LR, prompts=2, group=3)
    optimizer = optimizer_class(policy.parameters(), lr=LR, weight_decay=0.0)
    run = SimpleNamespace(policy=policy, reference=reference, optimizer=optimizer, config=config)

    packable = []
    for (name, size), group in zip(QUESTIONS, groups):
        text = rewards.prompt("grounding", name)
        prompt = qwen_vl.encode_chat(tokenizer, special, text, [noise_image(*size)])
        assert prompt.ids == group[0].prompt["ids"]
        torch.testing.assert_close(prompt.pixels_ND, group[0].prompt["pixel_values"])
        completions = [Completion(r.tokens, r.old_logp_T.tolist(), reward=r.reward) for r in group]
        packable.append(Group(prompt, completions, row=3 * len(packable)))
    rollouts = [completion for group in packable for completion in group.completions]
    device = torch.device("cpu")
    packs = [packing.prepare_attention(packing.pack_groups(part), device)
             for part in packing.split_groups(packable, 60)]
    assert len(packs) == 2
    old_logp = packing.sampled_logps(rollouts, packs, device)
    ref_logp = grpo_vl.reference_logps(run, packs)
    advantages_B = grpo_vl.group_advantages(torch.tensor(REWARDS)).flatten()
    ranks = fsdp.Processes(0, 1, device)
    weight_B = grpo_vl.rollout_weights(config, 0, ranks, rollouts, len(rollouts))

    total, clipped = 0.0, 0.0
    for pack, old_S, ref_S in zip(packs, old_logp, ref_logp):
        logp_S, _ = policy(pack, TEMPERATURE)
        loss, stats = grpo_vl.policy_loss(
            logp_S, old_S, advantages_B[pack.row_S], weight_B[pack.row_S], row_S=pack.row_S,
            beta=beta, ref_logp_S=ref_S)
        loss.backward()
        total += loss.item()
        clipped += stats["clip_low"][0] + stats["clip_high"][0]
    gradients = gradients_of(policy.model)
    grpo_vl.optimizer_step(run, 0)
    return total, gradients, weights_of(policy.model), clipped


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(ours, theirs):
    """Norm of the difference over the norm, of all tensors together."""
    assert ours.keys() == theirs.keys()
    apart = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return (apart / sum(theirs[name].double().square().sum() for name in ours)).sqrt().item()


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_grpo_vl_is_this_algorithm(alone, folder, tmp_path, monkeypatch, beta, off_policy):
    monkeypatch.setattr(naive_grpo, "BETA", beta)
    other = write_model(tmp_path, tied=True, seed=1)
    model, tokenizer, image_processor = naive_grpo.load(folder)
    groups = naive_groups(tokenizer, image_processor)
    for group in groups:
        naive_grpo.set_advantages(group)
        naive_grpo.keep_logprobs(model, naive_grpo.load(other)[0], group)
    if off_policy:  # ratios between e^−0.6 and e^0.6, the clip's borders are e^−0.22 and e^0.18
        generator = torch.Generator().manual_seed(0)
        for rollout in (rollout for group in groups for rollout in group):
            shift_T = torch.rand(len(rollout.tokens), generator=generator)
            rollout.old_logp_T = rollout.old_logp_T + 1.2 * shift_T - 0.6

    before = weights_of(model)
    loss = 0.0
    for group in groups:
        part = naive_grpo.grpo_loss(model, group) / len(groups)
        part.backward()
        loss += part.item()
    gradients = gradients_of(model)
    model.zero_grad()
    for optimizer_class in (torch.optim.SGD, torch.optim.AdamW):
        model.load_state_dict(before, strict=False)
        optimizer = optimizer_class(model.parameters(), lr=LR, weight_decay=0.0)
        naive_grpo.update(model, optimizer, groups)
        fast_loss, fast_gradients, fast_weights, clipped = fast_side(
            folder, groups, beta=beta, reference_folder=other, optimizer_class=optimizer_class)
        assert (clipped > 0) == off_policy
        assert fast_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        for name in gradients:
            norm = gradients[name].norm()
            assert (fast_gradients[name] - gradients[name]).norm() <= 1e-5 * norm, name
        weights = weights_of(model)
        assert distance(fast_weights, weights) <= 1e-5
        change = {name: weights[name] - before[name] for name in before}
        fast_change = {name: fast_weights[name] - before[name] for name in before}
        assert distance(fast_change, change) <= 1e-3


# ── its parts ──
def test_it_stands_alone():
    allowed = {"torch", "transformers", "PIL", "numpy", "tqdm"}
    standard = {"copy", "dataclasses", "math", "pathlib", "random", "re", "statistics", "sys", "time"}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "naive_grpo.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= allowed | standard


def test_a_drawn_box_holds_its_shape_and_nothing_else():
    rng = random.Random(4)
    for _ in range(30):
        image, name, box = naive_grpo.draw_scene(rng)
        colour = Image.new("RGB", (1, 1), name.split()[0]).getpixel((0, 0))
        ours = np.all(np.array(image) == colour, axis=-1)
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 56 and 0 <= y1 < y2 <= 56
        inside = ours[y1:y2, x1:x2]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        assert inside.all() == name.endswith("square")


GOOD = '[{"bbox_2d": [0, 0, 10, 10], "label": "red circle"}]'
CASES = [  # the true box is [0, 0, 10, 20]
    (GOOD + "<|im_end|>", 1.5),  # 1 + 100/200
    ("```json\n" + GOOD + "\n```<|im_end|>", 1.5),
    (GOOD.replace("0, 0, 10, 10", "5, 10, 15, 30") + "<|im_end|>", 1.0 + 50 / 350),
    (GOOD.replace("0, 0, 10, 10", "30, 30, 40, 40") + "<|im_end|>", 1.0),
    (GOOD.replace("0, 0, 10, 10", "10, 10, 0, 0") + "<|im_end|>", 0.0),  # corners exchanged
    (GOOD[:-1] + "<|im_end|>", 0.0),
    ("I see " + GOOD + "<|im_end|>", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize("text, reward", CASES)
def test_grades(text, reward):
    assert naive_grpo.grade(text, (0, 0, 10, 20)) == pytest.approx(reward)


def test_an_answer_without_its_stop_token_earns_nothing():
    assert naive_grpo.grade(GOOD, (0, 0, 10, 20)) == 0.0


def test_advantages_of_one_and_zero():
    # mean 0.5, sample standard deviation √0.5 = 0.70711: ±0.5 / 0.70721
    group = [Rollout({}, [], reward) for reward in (1.0, 0.0)]
    naive_grpo.set_advantages(group)
    assert [r.advantage for r in group] == pytest.approx([0.70700, -0.70700], abs=1e-5)


def test_answers_end_with_their_stop_token():
    stops = [77, 70]  # 70 is padding too
    assert naive_grpo.cut_after_stop([5, 6, 77, 70, 70], stops) == [5, 6, 77]
    assert naive_grpo.cut_after_stop([5, 6, 70, 70, 70], stops) == [5, 6, 70]
    assert naive_grpo.cut_after_stop([5, 6, 8], stops) == [5, 6, 8]


def test_padding_does_not_matter(folder):
    """Log-probs of an answer alone, and between longer prompts and longer answers; the stop counts."""
    model, tokenizer, image_processor = naive_grpo.load(folder)
    groups = naive_groups(tokenizer, image_processor)
    rollouts = groups[0] + groups[1]
    with torch.no_grad():
        together = naive_grpo.token_logprobs(model, rollouts)
        for rollout, logp_T in zip(rollouts, together):
            assert len(logp_T) == len(rollout.tokens)
            (alone_T,) = naive_grpo.token_logprobs(model, [rollout])
            torch.testing.assert_close(logp_T, alone_T, atol=1e-5, rtol=1e-5)


def test_stopping_is_learned(folder):
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0][0].prompt
    stop = model.generation_config.eos_token_id[0]
    group = [Rollout(prompt, [5, stop], 1.0), Rollout(prompt, [5, 6], 0.0)]
    naive_grpo.set_advantages(group)
    naive_grpo.keep_logprobs(model, None, group)
    naive_grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.01), [group])
    with torch.no_grad():
        change = naive_grpo.token_logprobs(model, group[:1])[0] - group[0].old_logp_T
    assert change[1] > 0.01


def test_placeholders_are_neither_sampled_nor_scored(tmp_path):
    """Their rows of lm_head are made to win every draw, were they not banned."""
    folder = write_model(tmp_path, tied=False, seed=0)
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0][0].prompt
    banned = model.generation_config.suppress_tokens
    special = qwen_vl.SpecialIds.read(tokenizer, model.config)
    assert set(banned) == set(special.banned_V.nonzero().flatten().tolist())
    with torch.no_grad():
        model.lm_head.weight[banned[0::2]] = 9.0
        model.lm_head.weight[banned[1::2]] = -9.0
        answers = naive_grpo.sample(model, [prompt, prompt])
        assert not set(banned) & {token for group in answers for answer in group for token in answer}
        # probabilities of all that may be said add up to 1
        allowed = [token for token in range(len(special.banned_V)) if token not in banned]
        one_each = [Rollout(prompt, [token], 0.0) for token in allowed]
        logps = torch.cat(naive_grpo.token_logprobs(model, one_each))
        assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        vision_start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        (logp_T,) = naive_grpo.token_logprobs(model, [Rollout(prompt, [vision_start], 0.0)])
        assert logp_T.item() == -float("inf")


def test_sampling_ignores_the_checkpoints_generation_config(tmp_path):
    """Qwen2.5-VL's own says temperature 1e-6: all answers of a group would be equal."""
    folder = write_model(tmp_path, tied=True, seed=0)
    config = dict(do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=1.05)
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0][0].prompt
    torch.manual_seed(0)
    (answers,) = naive_grpo.sample(model, [prompt])
    assert len({tuple(answer) for answer in answers}) == 3


# ── all of it ──
@pytest.mark.parametrize("beta, inner_steps", [(0.0, 1), (0.1, 2)])
def test_it_trains(folder, monkeypatch, capsys, beta, inner_steps):
    monkeypatch.setattr(naive_grpo, "BETA", beta)
    monkeypatch.setattr(naive_grpo, "INNER_STEPS", inner_steps)
    monkeypatch.setattr(naive_grpo, "grade", lambda text, box: float(len(text)))
    naive_grpo.main(folder)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and re.match(r"step +2  reward \d+\.\d+  accuracy [01]\.\d+  \d+ s", lines[0])


def test_a_missing_cold_start_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"no/model is missing: `python sft_coldstart.py"):
        naive_grpo.main(str(tmp_path / "no" / "model"))
