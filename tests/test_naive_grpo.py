"""grpo_vl.py held to naive_grpo.py: the same rollouts give the same loss, gradients and weights."""
import ast
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import grpo_vl
import naive_grpo
import qwen_vl
import rewards
from naive_grpo import Rollout
from sampler import Completion, Group

TEMPERATURE = 0.8
LR = 1e-3


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """The CPU's constants on any machine, and few answers."""
    few = dict(GPU=False, SIZE=56, MAX_TOKENS=6, PROMPTS=2, GROUP=3, STEPS=2, TEMPERATURE=TEMPERATURE)
    for name, value in few.items():
        monkeypatch.setattr(naive_grpo, name, value)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    """An untrained tiny model as a Hugging Face folder."""
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param == "tied", seed=0)


def write_model(path, *, tied, seed):
    tokenizer = qwen_vl.tiny_tokenizer()
    model = qwen_vl.tiny_model(tokenizer, tied=tied, seed=seed, layers=2)
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
    advantages, reference, loss and step are grpo_vl's own.
    """
    def policy_of(source):
        model, tokenizer = qwen_vl.load(source)
        special = qwen_vl.SpecialIds.read(tokenizer, model.config)
        return qwen_vl.Policy(model, special.banned_V), tokenizer, special

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
        packable.append(Group(prompt, [Completion(r.tokens) for r in group], row=3 * len(packable)))
    rollouts = [rollout for group in groups for rollout in group]
    packs = [qwen_vl.prepare_attention(qwen_vl.pack_groups(part), torch.device("cpu"))
             for part in qwen_vl.split_groups(packable, 60)]
    assert len(packs) == 2
    mask_BT = qwen_vl.pad_BT([[1] * len(r.tokens) for r in rollouts]).bool()
    old_logp_BT = qwen_vl.pad_BT([r.old_logp_T.tolist() for r in rollouts])
    ref_logp_BT = grpo_vl.reference_logps(run, packs, mask_BT.shape)
    advantages_B = grpo_vl.group_advantages(torch.tensor(REWARDS)).flatten()
    options = grpo_vl.loss_options(config, 0, len(rollouts), int(mask_BT.sum()))

    total, clipped = 0.0, 0.0
    for pack in packs:
        logp_S, _ = policy(pack, TEMPERATURE)
        logp_BT = qwen_vl.scatter_BT(logp_S, pack, mask_BT.shape)
        here_BT = qwen_vl.scatter_BT(torch.ones_like(logp_S), pack, mask_BT.shape).bool()
        loss, stats = grpo_vl.policy_loss(
            logp_BT, old_logp_BT, advantages_B, here_BT, ref_logp_BT=ref_logp_BT, **options)
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
def test_grpo_vl_is_this_algorithm(folder, tmp_path, monkeypatch, beta, off_policy):
    monkeypatch.setattr(naive_grpo, "BETA", beta)
    other = write_model(tmp_path, tied=True, seed=1)
    model, tokenizer, image_processor = naive_grpo.load(folder)
    groups = naive_groups(tokenizer, image_processor)
    for group in groups:
        naive_grpo.set_advantages(group)
        naive_grpo.score_group(model, naive_grpo.load(other)[0], group)
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
