"""grpo_vl.py held to naive_grpo.py: the same rollouts give the same loss, gradients and weights."""
import ast
import json
import random
import re
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import fsdp
import grpo_vl
import naive_grpo
import qwen_vl
import rewards
import tiny
import training
from qwen_vl import Completion, Group

TEMPERATURE = 0.8
FAR = 0.5  # a learning rate at which one SGD step moves ratios over the clip's borders


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """The CPU's constants on any machine, and few answers."""
    few = dict(GPU=False, SIZE=84, LARGEST=9999, MAX_TOKENS=6, PROMPTS=2, GROUP=3, STEPS=2, TEMPERATURE=TEMPERATURE)
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
# Two prompts with images of different size, so of different length, three answers each: of different
# lengths, most with a stop token (-1: <|im_end|>, -2: <|endoftext|>), the second one cut.
SIZES = [(56, 56), (140, 56)]
ANSWERS = [[[5, 9, 33, -1], [70, 7, 7, 12, 81, 6], [44, -1]], [[301, -2], [21, 22, 23, -1], [8, -1]]]
REWARDS = [[1.5, 0.0, 1.2], [0.3, 0.9, 0.0]]


def noise_image(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def naive_groups(tokenizer, image_processor):
    stops = {-1: "<|im_end|>", -2: "<|endoftext|>"}
    groups = []
    for size, answers, grades in zip(SIZES, ANSWERS, REWARDS):
        prompt = naive_grpo.encode(tokenizer, image_processor, noise_image(*size))
        tokens = []
        for answer in answers:
            tokens.append([tokenizer.convert_tokens_to_ids(stops[t]) if t < 0 else t for t in answer])
        advantages = naive_grpo.group_advantages(grades)
        groups.append({"prompt": prompt, "answers": tokens, "advantages": advantages})
    return groups


def keep_logprobs(model, groups, reference=None):
    """What train_step does after sampling."""
    with torch.no_grad():
        for group in groups:
            group["old_logps"] = naive_grpo.token_logprobs(model, group["prompt"], group["answers"])
            if reference:
                group["ref_logps"] = naive_grpo.token_logprobs(reference, group["prompt"], group["answers"])


@dataclass
class Trained:
    """What training on the given rollouts did."""
    loss: float  # mean over the inner steps
    gradients: list  # {name: gradient} at each inner step, before its norm is clipped
    before: dict  # weights by name
    weights: dict
    metrics: dict  # of train_step
    groups: list  # naive_grpo's, with their log-probs


def naive_side(folder, other, *, beta, inner_steps, optimizer_class, lr):
    """What naive_grpo.train_step does after sampling; log π_ref is `other`'s."""
    model, tokenizer, image_processor = naive_grpo.load(folder)
    groups = naive_groups(tokenizer, image_processor)
    keep_logprobs(model, groups, naive_grpo.load(other)[0] if beta else None)
    before = weights_of(model)
    optimizer = optimizer_class(model.parameters(), lr=lr, weight_decay=0.0)
    losses, gradients = [], []
    for _ in range(inner_steps):
        parts = [naive_grpo.grpo_loss(model, **group) / len(groups) for group in groups]
        sum(parts).backward()
        losses.append(sum(parts).item())
        gradients.append(gradients_of(model))
        model.zero_grad()
        naive_grpo.update(model, optimizer, groups)
    return Trained(sum(losses) / inner_steps, gradients, before, weights_of(model), {}, groups)


DRAWS = [4, 7]  # numbers of the prompts in the run's order of data


def fast_side(ranks, folder, other, groups, *, beta, inner_steps, optimizer_class, lr):
    """grpo_vl.train_step on the rollouts of the naive groups, on one rank or on several.

    Sampling alone is replaced, by what was sampled. A rank has every world-th group, the last one
    first. All that knows names of the fast side.
    """
    config = grpo_vl.Config(
        model=folder, data=("synthetic:ocr",), temperature=TEMPERATURE, beta=beta, lr=lr, prompts=2, group=3,
        inner_steps=inner_steps, micro_tokens=60, pictures_every=0)
    run = training.prepare(config, ranks, folder)
    if beta:
        run.reference, _, _ = fsdp.load_policy(other, ranks, config, frozen=True)
    run.optimizer = optimizer_class(fsdp.trainable_parameters(run.policy), lr=lr, weight_decay=0.0)
    before, gradients = weights_of(run.policy.model), []

    def given(run, step):
        rollouts = [rollouts_of(run, *row) for row in zip(SIZES, groups, REWARDS, DRAWS)]
        own = rollouts[ranks.rank :: ranks.world]
        return own[::-1], dict(zip(DRAWS, REWARDS)), {}

    clip_gradients = fsdp.clip_gradients

    def clip(policy, max_norm):
        gradients.append(gradients_of(policy.model))
        return clip_gradients(policy, max_norm)

    with mock.patch.object(grpo_vl, "collect_groups", given), mock.patch.object(fsdp, "clip_gradients", clip):
        metrics = grpo_vl.train_step(run, 0)
    return Trained(metrics["loss"], gradients, before, weights_of(run.policy.model), metrics, [])


def rollouts_of(run, size, group, grades, draw):
    """A group of the naive side as one of the fast side, through its own reader of prompts."""
    prompt = qwen_vl.encode_chat(run.tokenizer, run.special, rewards.prompt("ocr"), [noise_image(*size)])
    assert prompt.ids == group["prompt"]["ids"]
    torch.testing.assert_close(prompt.pixels_ND, group["prompt"]["pixel_values"])
    completions = []
    for tokens, old_T, reward in zip(group["answers"], group["old_logps"], grades):
        completions.append(Completion(tokens, old_T.tolist(), reward=reward))
    return Group(prompt, completions, draw=draw)


def gradients_of(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def weights_of(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def whole(tensor):
    """A copy, of all ranks' parts together."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def distance(ours, theirs):
    """Norm of the difference over the norm, of all tensors together."""
    assert ours.keys() == theirs.keys()
    apart = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return (apart / sum(theirs[name].double().square().sum() for name in ours)).sqrt().item()


def hold(fast, naive, *, off_policy):
    """Loss, each gradient and the weights are the same; the metrics say what was trained on."""
    assert fast.loss == pytest.approx(naive.loss, rel=1e-5, abs=1e-6)
    assert len(fast.gradients) == len(naive.gradients)
    for fast_gradients, gradients in zip(fast.gradients, naive.gradients):
        assert fast_gradients.keys() == gradients.keys()
        for name in gradients:
            norm = gradients[name].norm()
            assert (fast_gradients[name] - gradients[name]).norm() <= 1e-5 * norm, name
    assert distance(fast.weights, naive.weights) <= 1e-5
    change = {name: naive.weights[name] - naive.before[name] for name in naive.before}
    fast_change = {name: fast.weights[name] - fast.before[name] for name in fast.before}
    assert distance(fast_change, change) <= 1e-3
    assert fast.metrics["sampler_gap"] < 1e-5  # its π_old is the naive one's
    assert fast.metrics["reward"] == pytest.approx(0.65)  # (1.5 + 1.2 + 0.3 + 0.9) / 6
    clipped = fast.metrics["clip_low"] + fast.metrics["clip_high"]
    assert (clipped > 0) == off_policy


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
# The second of two inner steps is off policy: after so long a first one some ratios are clipped.
STEPS = {"one SGD step": (1, SGD, 1e-3), "one AdamW step": (1, ADAMW, 1e-3), "two SGD steps": (2, SGD, FAR)}


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("steps", STEPS)
def test_train_step_is_this_algorithm(alone, folder, tmp_path, monkeypatch, steps, beta):
    monkeypatch.setattr(naive_grpo, "BETA", beta)
    other = write_model(tmp_path, tied=True, seed=1)
    inner_steps, optimizer_class, lr = STEPS[steps]
    common = dict(beta=beta, inner_steps=inner_steps, optimizer_class=optimizer_class, lr=lr)
    naive = naive_side(folder, other, **common)
    fast = fast_side(alone, folder, other, naive.groups, **common)
    hold(fast, naive, off_policy=inner_steps > 1)


def test_train_step_on_two_ranks_is_this_algorithm(pair, folder, tmp_path, monkeypatch):
    """Each rank has one of the two prompts."""
    monkeypatch.setattr(naive_grpo, "BETA", 0.5)
    other = write_model(tmp_path, tied=True, seed=1)
    common = dict(beta=0.5, inner_steps=2, optimizer_class=SGD, lr=FAR)
    naive = naive_side(folder, other, **common)
    for fast in pair.run("test_naive_grpo.fast_side", folder=folder, other=other, groups=naive.groups, **common):
        hold(fast, naive, off_policy=True)


# ── its parts ──
def test_it_stands_alone():
    allowed = {"torch", "transformers", "PIL", "numpy", "tqdm"}
    standard = {"random", "statistics"}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "naive_grpo.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= allowed | standard


def extent(image):
    """[height, width] of what is darker than gray."""
    ink = np.argwhere(np.array(image.convert("L")) < 128)
    return ink.max(0) - ink.min(0) + 1


@pytest.mark.parametrize("size, largest", [(84, 9999), (448, 10**24)])
def test_a_drawn_number_is_whole_in_the_picture(monkeypatch, size, largest):
    """Nothing of it is cut: it has the ink's height and width that it has on a large sheet."""
    monkeypatch.setattr(naive_grpo, "SIZE", size)
    monkeypatch.setattr(naive_grpo, "LARGEST", largest)
    rng, lengths = random.Random(4), set()
    for _ in range(100):
        image, number = naive_grpo.draw_number(rng)
        assert image.size == (size, size) and 10 <= int(number) <= largest
        sheet = Image.new("L", (600, 100), "white")
        ImageDraw.Draw(sheet).text((50, 50), number, "black", ImageFont.load_default(25))
        assert np.abs(extent(image) - extent(sheet)).max() <= 1  # a pixel: places are no whole numbers
        lengths.add(len(number))
    assert max(lengths) == len(str(largest - 1))


CASES = [  # the number is 4071
    ("4071<|im_end|>", 1.0),
    ("4171<|im_end|>", 0.75),
    ("1704<|im_end|>", 0.0),  # the same digits, none in its place
    ("4017<|im_end|>", 0.5),
    ("407<|im_end|>", 0.0),
    ("40711<|im_end|>", 0.0),
    ("4071", 0.0),  # cut
    ("4071<|endoftext|>", 0.0),
    (" 4071<|im_end|>", 0.0),
    ("<|im_end|>", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize("text, reward", CASES)
def test_grades(text, reward):
    assert naive_grpo.grade(text, "4071") == reward


def test_advantages_of_one_and_zero():
    # mean 0.5, sample standard deviation √0.5 = 0.70711: ±0.5 / 0.70721
    assert naive_grpo.group_advantages([1.0, 0.0]) == pytest.approx([0.70700, -0.70700], abs=1e-5)


def test_answers_end_with_their_stop_token(folder, monkeypatch):
    """What `generate` puts behind the shorter answers of a group is no part of them."""
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0]["prompt"]
    config = model.generation_config
    assert config.pad_token_id in config.suppress_tokens  # so no answer loses a token that it wrote
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    said = {5, 6, *stops}  # the only tokens left, about equally likely
    monkeypatch.setattr(config, "suppress_tokens", [t for t in range(model.config.text_config.vocab_size) if t not in said])
    monkeypatch.setattr(config, "temperature", 50.0)
    monkeypatch.setattr(naive_grpo, "GROUP", 64)
    torch.manual_seed(0)
    answers = naive_grpo.sample(model, prompt)
    for answer in answers:
        assert not set(stops) & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == naive_grpo.MAX_TOKENS
    assert {answer[-1] for answer in answers} == said
    assert {len(answer) for answer in answers} == {1, 2, 3, 4, 5, 6}


def test_padding_does_not_matter(folder):
    """Log-probs of an answer alone, and beside longer answers; the stop counts."""
    model, tokenizer, image_processor = naive_grpo.load(folder)
    for group in naive_groups(tokenizer, image_processor):
        with torch.no_grad():
            together = naive_grpo.token_logprobs(model, group["prompt"], group["answers"])
            for tokens, logp_T in zip(group["answers"], together):
                assert len(logp_T) == len(tokens)
                (alone_T,) = naive_grpo.token_logprobs(model, group["prompt"], [tokens])
                torch.testing.assert_close(logp_T, alone_T, atol=1e-5, rtol=1e-5)


def test_stopping_is_learned(folder):
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0]["prompt"]
    stop = model.generation_config.eos_token_id[0]
    advantages = naive_grpo.group_advantages([1.0, 0.0])
    group = {"prompt": prompt, "answers": [[5, stop], [5, 6]], "advantages": advantages}
    keep_logprobs(model, [group])
    naive_grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.01), [group])
    with torch.no_grad():
        change = naive_grpo.token_logprobs(model, prompt, group["answers"][:1])[0] - group["old_logps"][0]
    assert change[1] > 0.01


def test_placeholders_are_neither_sampled_nor_scored(tmp_path):
    """Their rows of lm_head are made to win every draw, were they not banned."""
    folder = write_model(tmp_path, tied=False, seed=0)
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0]["prompt"]
    banned = model.generation_config.suppress_tokens
    special = qwen_vl.SpecialIds.read(tokenizer, model.config)
    assert set(banned) == set(special.banned_V.nonzero().flatten().tolist())
    with torch.no_grad():
        model.lm_head.weight[banned[0::2]] = 9.0
        model.lm_head.weight[banned[1::2]] = -9.0
        answers = naive_grpo.sample(model, prompt) + naive_grpo.sample(model, prompt)
        assert len(answers) == 6 and not set(banned) & {token for answer in answers for token in answer}
        # probabilities of all that may be said add up to 1
        allowed = [token for token in range(len(special.banned_V)) if token not in banned]
        logps = torch.cat(naive_grpo.token_logprobs(model, prompt, [[token] for token in allowed]))
        assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        vision_start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        (logp_T,) = naive_grpo.token_logprobs(model, prompt, [[vision_start]])
        assert logp_T.item() == -float("inf")


def test_sampling_ignores_the_checkpoints_generation_config(tmp_path):
    """Qwen2.5-VL's own says temperature 1e-6: all answers of a group would be equal."""
    folder = write_model(tmp_path, tied=True, seed=0)
    config = dict(do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=1.05)
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    model, tokenizer, image_processor = naive_grpo.load(folder)
    prompt = naive_groups(tokenizer, image_processor)[0]["prompt"]
    torch.manual_seed(0)
    answers = naive_grpo.sample(model, prompt)
    assert len({tuple(answer) for answer in answers}) == 3


# ── all of it ──
@pytest.mark.parametrize("beta, inner_steps", [(0.0, 1), (0.1, 2)])
def test_it_trains(folder, monkeypatch, capsys, beta, inner_steps):
    monkeypatch.setattr(naive_grpo, "BETA", beta)
    monkeypatch.setattr(naive_grpo, "INNER_STEPS", inner_steps)
    monkeypatch.setattr(naive_grpo, "grade", lambda text, number: float(len(text)))
    monkeypatch.setattr(naive_grpo, "MODEL", folder)
    naive_grpo.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and re.match(r"step +2  reward \d+\.\d+  accuracy [01]\.\d+$", lines[0])
