"""GRPO on a vision-language model, all of it, in one plain file. Start reading here.

The model sees a picture of a sum and is asked for its result. It is never shown a solution. It
answers G times, a rule grades each answer, and answers better than the average of their group
become more likely, worse ones less likely. That is GRPO. `train_step` puts the steps together.

  python naive_grpo.py    no GPU: base/, a tiny Qwen2.5-VL that sees; a GPU: the 3B (not run)

Every ten steps it prints the mean reward and the share of right sums. `python naive_grpo.py FOLDER`
trains another checkpoint. The 3B trains in fp32: 4 bytes a weight, 4 for its gradient, 8 for AdamW,
so 60 GB, and activations on top: an 80 GB GPU. grpo_vl.py does the same fast and on many GPUs; a
test holds it to this file's loss, gradients and weights.

[DSM] is DeepSeekMath, arXiv 2402.03300, where GRPO comes from; [PR1] is Perception-R1, 2504.07954.
Shapes: B rollouts, L tokens of a row, T tokens of an answer, V vocabulary.
"""
import copy
import math
import random
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import trange
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

GPU = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct" if GPU else str(Path(__file__).with_name("base"))
SIZE = 280 if GPU else 84  # side of a picture in pixels; the model reads 28×28 of them as one token
TERMS, LARGEST = (6, 99) if GPU else (2, 20)  # of a sum
PROMPTS, GROUP = 8, 8  # pictures a step; G, answers a picture [PR1 §4.3: G 8]
QUESTION = "What is the result of the sum in the image?\nPut the final answer in \\boxed{}."
FORMAT = 0.1  # reward of the right form alone; 1 more for the right result
MAX_TOKENS = 12  # longer answers are cut
STEPS = 150
LR = 1e-6 if GPU else 1e-4  # AdamW's learning rate [PR1 §4.3: 1e-6]
INNER_STEPS = 1  # µ, optimizer steps on the same answers [PR1: 1]
CLIP = 0.2  # ε, how far the ratio π/π_old may move a token's probability
BETA = 0.0  # β, weight of the KL term; 0: no reference model is kept [PR1 §4.3: 0.04]
TEMPERATURE = 1.0  # of π, in sampling and in scoring [PR1 §4.3: 1.0]
SEED = 0


@dataclass
class Rollout:
    """One answer of the model to one prompt, with all that the loss needs to know about it."""

    prompt: dict  # what `encode` returned
    tokens: list[int]  # the answer with its stop token; without one if it was cut
    reward: float  # r_i
    advantage: float = 0.0  # A_i
    old_logp_T: torch.Tensor | None = None  # log π_old, by the weights that wrote the answer
    ref_logp_T: torch.Tensor | None = None  # log π_ref, by the weights before training, if β > 0


# ── a picture, a question, a reward ──
def draw_sum(rng):
    """(a picture of a sum, a number a line; its result)."""
    result = rng.randint(1, LARGEST)
    lines = [str(result)]
    for _ in range(TERMS - 1):
        sign, number = rng.choice("+-"), rng.randint(1, LARGEST)
        result = result + number if sign == "+" else result - number
        lines.append(f"{sign} {number}")
    image = Image.new("RGB", (SIZE, SIZE), "white")
    corner = rng.randint(1, SIZE // 5), rng.randint(1, SIZE // 5)
    height = SIZE * 0.6 / TERMS
    ImageDraw.Draw(image).multiline_text(corner, "\n".join(lines), "black", font_size=height)
    return image, result


def encode(tokenizer, image_processor, image, question):
    """The question in Qwen's chat format, up to where the model speaks, and the image's pixels."""
    pixels = image_processor(image, return_tensors="pt")
    image_tokens = int(pixels["image_grid_thw"].prod()) // 4  # 2×2 patches of 14×14 are one token
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n")
    return {"ids": tokenizer.encode(text, add_special_tokens=False), **pixels}


def grade(text, result):
    """r = format + (the result is right), 0 in any other form."""
    form = re.fullmatch(r"(?s:.*)\\boxed\{(-?\d+)\}\.?<\|im_end\|>", text)
    return FORMAT + float(int(form[1]) == result) if form else 0.0


# ── the model as a policy π: sample answers, score them ──
def load(folder):
    """(model in fp32, tokenizer, image processor); `model.generation_config` says what π is."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen.from_pretrained(folder, dtype=torch.float32).to("cuda" if GPU else "cpu")
    # A placeholder that the model wrote would be taken for an image when the answer is read again,
    # and Qwen's vocabulary has rows for ids that the tokenizer lacks: π never says either.
    placeholders = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    banned = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in placeholders])
    banned += range(len(tokenizer), model.config.text_config.vocab_size)
    # A checkpoint's own generation_config may cut off the tail of π: every field is set here.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, repetition_penalty=1.0,
        suppress_tokens=banned, max_new_tokens=MAX_TOKENS,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return model, tokenizer, AutoImageProcessor.from_pretrained(folder)


def make_batch(model, prompts, answers):
    """Rows [padding | prompt | answer | padding] as the model wants them: answers start together.

    The attention mask is made of lengths, not of token values: <|endoftext|> is both padding and a
    stop token. Hugging Face finds the positions in text and image from mask and token types.
    """
    prompt_width = max(len(prompt["ids"]) for prompt in prompts)
    answer_width = max(len(tokens) for tokens in answers)
    pad = model.generation_config.pad_token_id
    rows, masks = [], []
    for prompt, tokens in zip(prompts, answers):
        used = prompt["ids"] + tokens
        before = prompt_width - len(prompt["ids"])
        after = answer_width - len(tokens)
        rows.append([pad] * before + used + [pad] * after)
        masks.append([0] * before + [1] * len(used) + [0] * after)
    ids_BL = torch.tensor(rows)
    batch = {
        "input_ids": ids_BL,
        "attention_mask": torch.tensor(masks),
        "mm_token_type_ids": (ids_BL == model.config.image_token_id).long(),  # 1: image, 0: text
        "pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt["image_grid_thw"] for prompt in prompts])}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def cut_after_stop(ids, stops):
    """`generate` pads behind the stop token: that token is learned, the padding is not."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[: place + 1]
    return ids  # cut off at MAX_TOKENS


def sample(model, prompts):
    """G answers o_1 … o_G ~ π(· | q) to each prompt q: P lists of G lists of token ids."""
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    batch = make_batch(model, rows, [[]] * len(rows))
    ids_BL = model.generate(**batch)
    prompt_width = batch["input_ids"].shape[1]
    stops = model.generation_config.eos_token_id
    answers = [cut_after_stop(ids, stops) for ids in ids_BL[:, prompt_width:].tolist()]
    return [answers[i : i + GROUP] for i in range(0, len(answers), GROUP)]


def token_logprobs(model, rollouts):
    """log π(o_t | q, o_<t) of each token o_t of each answer: a tensor [T] a rollout."""
    answers = [rollout.tokens for rollout in rollouts]
    batch = make_batch(model, [rollout.prompt for rollout in rollouts], answers)
    # A place's logits predict the token after it: the first wanted are at the prompt's last place.
    wanted = 1 + max(len(tokens) for tokens in answers)
    logits_BTV = model(**batch, logits_to_keep=wanted, use_cache=False).logits
    logps = []
    for tokens, logits_TV in zip(answers, logits_BTV):
        logits_TV = logits_TV[: len(tokens)] / model.generation_config.temperature
        logits_TV[:, model.generation_config.suppress_tokens] = -math.inf
        logp_TV = logits_TV.log_softmax(-1)
        logps.append(logp_TV[range(len(tokens)), tokens])
    return logps


# ── GRPO ──
def set_advantages(group):
    """How much better each answer is than its group's mean, in units of the group's spread."""
    rewards = [rollout.reward for rollout in group]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    for rollout in group:
        # A_i = (r_i − mean(r)) / (std(r) + ε)  [DSM §4.1.2]
        rollout.advantage = (rollout.reward - mean) / (std + 1e-4)


@torch.no_grad()
def keep_logprobs(model, reference, group):
    """log π_old, while π still is what wrote the answers, and log π_ref if there is a KL term."""
    for rollout, logp_T in zip(group, token_logprobs(model, group)):
        rollout.old_logp_T = logp_T
    if BETA > 0:
        for rollout, logp_T in zip(group, token_logprobs(reference, group)):
            rollout.ref_logp_T = logp_T


def grpo_loss(model, group):
    """Minus the objective of the G answers to one prompt.

    In the first of the µ steps π is π_old: every ratio is 1, no clip acts, and the loss is 0, since
    advantages sum to 0. Its gradient, −mean(A·∇log π), is not 0: it tells good from bad answers.
    """
    objective = 0.0
    for rollout, logp_T in zip(group, token_logprobs(model, group)):
        # ρ_t = π(o_t) / π_old(o_t)
        ratio_T = (logp_T - rollout.old_logp_T).exp()
        clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
        # min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i)  [DSM Eq.3]
        objective_T = torch.minimum(ratio_T * rollout.advantage, clipped_T * rollout.advantage)
        if BETA > 0:
            # − β·KL,  KL(π ‖ π_ref) ≈ π_ref/π − log(π_ref/π) − 1  [DSM Eq.4]
            log_ratio_T = rollout.ref_logp_T - logp_T
            objective_T = objective_T - BETA * (log_ratio_T.exp() - log_ratio_T - 1)
        # 1/G · Σ_i 1/|o_i| · Σ_t  [DSM Eq.3]
        objective = objective + objective_T.mean() / len(group)
    return -objective


def update(model, optimizer, groups):
    """One optimizer step on the mean loss of all groups. Memory holds one group at a time."""
    for group in groups:
        loss = grpo_loss(model, group) / len(groups)
        loss.backward()  # gradients add up
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_step(model, reference, tokenizer, image_processor, optimizer, rng):
    """Ask, answer, grade, compare, learn [DSM Algorithm 1]. Returns the rewards of all answers."""
    sums = [draw_sum(rng) for _ in range(PROMPTS)]
    prompts = [encode(tokenizer, image_processor, image, QUESTION) for image, _ in sums]
    groups = []
    for prompt, (_, result), answers in zip(prompts, sums, sample(model, prompts)):
        group = []
        for tokens in answers:
            reward = grade(tokenizer.decode(tokens), result)
            group.append(Rollout(prompt, tokens, reward))
        set_advantages(group)
        keep_logprobs(model, reference, group)
        groups.append(group)
    for _ in range(INNER_STEPS):
        update(model, optimizer, groups)
    return [rollout.reward for group in groups for rollout in group]


def main(folder=MODEL):
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model, tokenizer, image_processor = load(folder)
    reference = copy.deepcopy(model) if BETA > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rewards = []
    for step in trange(1, STEPS + 1):
        rewards += train_step(model, reference, tokenizer, image_processor, optimizer, rng)
        if step % 10 == 0:
            right = statistics.mean(reward > 1 for reward in rewards)
            print(f"\rstep {step:4}  reward {statistics.mean(rewards):.3f}  right {right:.3f}")
            rewards = []


if __name__ == "__main__":
    main(*sys.argv[1:])
