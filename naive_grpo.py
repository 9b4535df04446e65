"""GRPO on a vision-language model, all of it, in one plain file. Start reading here.

The model sees a drawn scene and is asked for "the bounding box of the red circle". It is never
shown an answer. It answers G times, a rule grades each answer, and answers better than the average
of their group become more likely, worse ones less likely. That is GRPO. The functions below are
its steps in order; `train_step` puts them together.

  python sft_coldstart.py    no GPU: a tiny stand-in learns the form of an answer, 3 minutes
  python naive_grpo.py       no GPU: GRPO on that stand-in
  python naive_grpo.py       with a GPU: Qwen2.5-VL-3B-Instruct (not run)

Every ten steps it prints the mean reward and the accuracy (the share of boxes with IoU above 0.5)
of the answers it sampled. The 3B trains in fp32: 4 bytes for a weight, 4 for its gradient, 8 for
AdamW, so 60 GB, and activations on top: an 80 GB GPU. `python naive_grpo.py FOLDER` trains another
checkpoint. The stand-in's cold start sees little: there the reward creeps up while the accuracy
falls (results/naive_grpo.txt), most likely because plain IoU pays a box that hedges; the demo of
grpo_vl.py squares the IoU.

grpo_vl.py does the same fast and on many GPUs; a test holds it to this file's loss, gradients and
weights. [DSM] is DeepSeekMath, arXiv 2402.03300, where GRPO comes from; [PR1] is Perception-R1,
arXiv 2504.07954. Shapes: B rollouts, L tokens of a row, T tokens of an answer, V vocabulary.
"""
import copy
import math
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

GPU = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct" if GPU else "runs/coldstart/model"
SIZE = 280 if GPU else 56  # side of a scene in pixels; the model reads 28×28 of them as one token
NAMES = ("red circle", "red square", "green circle", "green square", "blue circle", "blue square")
PROMPTS = 8  # scenes a step
GROUP = 8  # G, answers a scene [PR1 §4.3: 8]
FORMAT = 0.1  # reward of the right form alone; the box's IoU comes on top [PR1 §4.1: 1]
MAX_TOKENS = 64 if GPU else 24  # longer answers are cut
STEPS = 150
LR = 1e-6 if GPU else 3e-4  # AdamW's learning rate [PR1 §4.3: 1e-6]
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


# ── a scene, a question, a reward ──
def draw_scene(rng):
    """Two shapes on white: (image, the last shape's name, its box [x1, y1, x2, y2] in pixels)."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    half = SIZE // 2
    quarters = [(0, 0), (half, 0), (0, half), (half, half)]  # a shape in each, so none overlap
    for name, (left, top) in zip(rng.sample(NAMES, 2), rng.sample(quarters, 2)):
        side = rng.randint(SIZE * 3 // 10, half)
        x = left + rng.randint(0, half - side)
        y = top + rng.randint(0, half - side)
        box = (x, y, x + side, y + side)
        colour, shape = name.split()
        paint = pen.ellipse if shape == "circle" else pen.rectangle
        paint((x, y, x + side - 1, y + side - 1), fill=colour)
    return image, name, box


def encode(tokenizer, image_processor, image, name):
    """The question in Qwen's chat format, up to where the model speaks, and the image's pixels."""
    pixels = image_processor(image, return_tensors="pt")
    image_tokens = int(pixels["image_grid_thw"].prod()) // 4  # 2×2 patches of 14×14 are one token
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
        f"Output the bounding box of the {name} in the image.<|im_end|>\n<|im_start|>assistant\n")
    return {"ids": tokenizer.encode(text, add_special_tokens=False), **pixels}


FORM = re.compile(  # one box, perhaps in a fence, then the stop token
    r'(?:```json)?\s*\[\s*\{"bbox_2d": \[(\d+), (\d+), (\d+), (\d+)\], "label": "[^"]*"\}\s*\]\s*'
    r"(?:```)?<\|im_end\|>")


def grade(text, box):
    """The reward: FORMAT for an answer in the right form + its box's IoU, 0 in any other form."""
    form = FORM.fullmatch(text)
    if not form:
        return 0.0
    x1, y1, x2, y2 = map(int, form.groups())
    if x1 > x2 or y1 > y2:  # no box
        return 0.0
    left, top, right, bottom = box
    width = min(x2, right) - max(x1, left)
    height = min(y2, bottom) - max(y1, top)
    # r = format + |A ∩ B| / |A ∪ B|  [PR1 §4.1]
    both = max(width, 0) * max(height, 0)
    either = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - both
    return FORMAT + both / either


# ── the model as a policy π: sample answers, score them ──
def load(folder):
    """(model in fp32, tokenizer, image processor); `model.generation_config` says what π is."""
    if not folder.startswith("Qwen/") and not Path(folder).is_dir():
        sys.exit(f"{folder} is missing: `python sft_coldstart.py --preset tiny` writes "
                 "runs/coldstart/model in 3 minutes; or name a folder of Qwen2.5-VL")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen.from_pretrained(folder, dtype=torch.float32)
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
    model.to("cuda" if GPU else "cpu")
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
    scenes = [draw_scene(rng) for _ in range(PROMPTS)]
    prompts = [encode(tokenizer, image_processor, image, name) for image, name, _ in scenes]
    groups = []
    for prompt, (_, _, box), answers in zip(prompts, scenes, sample(model, prompts)):
        group = []
        for tokens in answers:
            reward = grade(tokenizer.decode(tokens), box)
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
    rewards, start = [], time.time()
    for step in range(1, STEPS + 1):
        rewards += train_step(model, reference, tokenizer, image_processor, optimizer, rng)
        if step % 10 == 0 or step == STEPS:
            accuracy = statistics.mean(reward > FORMAT + 0.5 for reward in rewards)
            print(f"step {step:4}  reward {statistics.mean(rewards):.3f}  accuracy {accuracy:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)
            rewards = []


if __name__ == "__main__":
    main(*sys.argv[1:])
