"""GRPO on a vision-language model, all of it, in one plain file. Start reading here.

The model sees a picture of a number, is asked to read it, and is never shown the truth. It answers
G times, a rule grades each answer, and answers better than the mean of their group become more
likely, worse ones less likely. `python naive_grpo.py` trains a small model, base/, and prints the
mean reward and the accuracy (the share of answers with every digit right) of ten steps at a time.
On a GPU it is Qwen2.5-VL-3B (not run): 60 GB of fp32 weights, gradients and AdamW, plus by estimate
75 for the backward of eight answers; with SIZE = 224 and LARGEST = 10**12 the sum may fit in 80.

(1) … (10) are the README's ten lines. grpo_vl.py does the same fast and on many GPUs; a test holds
it to this file. [DSM] DeepSeekMath, arXiv 2402.03300; [PR1] Perception-R1, 2504.07954.
A tensor's last letters are its shape: G answers to a prompt, L tokens of a row, T tokens of an
answer (in a batch: of the longest one), V vocabulary. π(o_t): how likely the model finds token o_t.
"""
import random
import statistics

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

GPU = torch.cuda.is_available()
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct" if GPU else "base"
SIZE = 448 if GPU else 84  # side of a picture in pixels; the model reads 28×28 of them as one token
LARGEST = 10**24 - 1 if GPU else 9999  # numbers are from 10 to this: most have as many digits
MAX_TOKENS = 32 if GPU else 8  # longer answers are cut
PROMPTS = 8  # pictures per step
GROUP = 8  # G, answers per picture [PR1 §4.3: 8]
STEPS = 100
LR = 1e-6 if GPU else 1e-4  # AdamW's learning rate [PR1 §4.3: 1e-6]
INNER_STEPS = 1  # µ, optimizer steps on the same answers [PR1: 1]
CLIP = 0.2  # ε: no gradient where π/π_old > 1 + ε and the answer was good, or < 1 − ε and bad
BETA = 0.0  # β, weight of the KL term; 0: no reference model is kept [PR1 §4.3: 0.04]
TEMPERATURE = 1.0  # of π, sampled from and trained [PR1 §4.3: 1.0]


def draw_number(rng):
    """(image, the number in it as text): black on white, anywhere."""
    number = str(rng.randint(10, LARGEST))
    image = Image.new("RGB", (SIZE, SIZE), "white")
    font = ImageFont.load_default(25)
    left, top, right, bottom = font.getbbox(number)
    place = rng.uniform(-left, SIZE - right), rng.uniform(-top, SIZE - bottom)
    ImageDraw.Draw(image).text(place, number, "black", font)
    return image, number


def encode(tokenizer, image_processor, image):
    """The question in Qwen's chat format, up to where the model speaks, and the image's pixels."""
    pixels = image_processor(image, return_tensors="pt")
    image_tokens = int(pixels["image_grid_thw"].prod()) // 4  # 2×2 patches of 14×14 are one token
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
        "OCR this image.<|im_end|>\n<|im_start|>assistant\n")
    return {"ids": tokenizer.encode(text, add_special_tokens=False), **pixels}


def grade(text, number):
    """The reward: the share of digits that are right; 0 for another length, or no end of turn."""
    said = text.removesuffix("<|im_end|>")
    if not text.endswith("<|im_end|>") or len(said) != len(number):
        return 0.0
    return statistics.mean(float(a == b) for a, b in zip(said, number))


def load(folder):
    """(model, tokenizer, image processor). Weights are fp32: bf16 would lose most small updates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen.from_pretrained(folder, dtype=torch.float32).to("cuda" if GPU else "cpu")
    # Two kinds of tokens are banned. A placeholder that the model wrote would be taken for an image
    # when the answer is read again (and <|vision_pad|> is our padding); and Qwen's vocabulary has
    # rows for ids the tokenizer lacks.
    placeholders = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    banned = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in placeholders])
    banned += range(len(tokenizer), model.config.text_config.vocab_size)
    # A checkpoint's own generation_config may cut off the tail of π: it is replaced.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, repetition_penalty=1.0,
        suppress_tokens=banned, max_new_tokens=MAX_TOKENS,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|vision_pad|>"))
    return model, tokenizer, AutoImageProcessor.from_pretrained(folder)


def make_batch(model, prompt, answers):
    """Rows [prompt | answer | padding], each with the image. Attention is causal: padding comes
    last, so that no answer sees it, and the mask can be all ones."""
    rows = [torch.tensor(prompt["ids"] + tokens) for tokens in answers]
    ids_GL = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=model.generation_config.pad_token_id)
    batch = {
        "input_ids": ids_GL,
        "attention_mask": torch.ones_like(ids_GL),
        "mm_token_type_ids": (ids_GL == model.config.image_token_id).long(),  # 1: image, 0: text
        "pixel_values": prompt["pixel_values"].repeat(len(rows), 1),
        "image_grid_thw": prompt["image_grid_thw"].repeat(len(rows), 1)}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def sample(model, prompt):
    """G answers o_1 … o_G ~ π(· | q) to a prompt q: token ids, with the stop token unless cut."""
    no_answers_yet = [[]] * GROUP
    ids_GL = model.generate(**make_batch(model, prompt, no_answers_yet))
    padded_GT = ids_GL[:, len(prompt["ids"]) :].tolist()
    # Padding follows the stop token. The stop token stays: when to stop is learned, too.
    pad = model.generation_config.pad_token_id
    return [[token for token in tokens if token != pad] for tokens in padded_GT]


def token_logprobs(model, prompt, answers):
    """log π(o_t | q, o_<t) of each token o_t of each answer: one tensor [T] per answer."""
    # A place's logits predict the next token. So those of the prompt's last place and of all places
    # of an answer are kept, and then the last place's dropped: nothing follows it.
    places = 1 + max(len(tokens) for tokens in answers)
    batch = make_batch(model, prompt, answers)
    logits_GTV = model(**batch, logits_to_keep=places, use_cache=False).logits[:, :-1]
    # The same π as in sampling: its temperature, and nothing for what is banned.
    logits_GTV = logits_GTV / model.generation_config.temperature
    logits_GTV[..., model.generation_config.suppress_tokens] = -torch.inf
    logps_GTV = logits_GTV.log_softmax(-1)
    return [logp_TV[range(len(tokens)), tokens] for tokens, logp_TV in zip(answers, logps_GTV)]


def group_advantages(rewards):
    """How much better each answer is than its group's mean, in units of the group's spread. (3)"""
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    # A_i = (r_i − mean(r)) / (std(r) + 10⁻⁴)  [DSM §4.1.2]; 10⁻⁴, as all rewards may be equal
    return [(reward - mean) / (std + 1e-4) for reward in rewards]


def grpo_loss(model, prompt, answers, advantages, old_logps, ref_logps=None):
    """Minus the objective of the G answers to one prompt.

    old_logps: log π_old of the answers' tokens, one [T] per answer; π_old: π when it wrote them.
    ref_logps: log π_ref alike, if β > 0; π_ref: π before training.
    In the first of the µ steps π is π_old: every ratio is 1, no clip acts, and the loss (without
    KL) is 0, since advantages sum to 0. Its gradient, −mean(A·∇log π), is not, if rewards differ.
    """
    objective = 0.0
    logps = token_logprobs(model, prompt, answers)  # (4)
    for i, advantage in enumerate(advantages):
        # (5) min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i),  ρ_t = π(o_t) / π_old(o_t)  [DSM Eq.3]
        ratio_T = (logps[i] - old_logps[i]).exp()
        clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
        objective_T = torch.minimum(ratio_T * advantage, clipped_T * advantage)
        if BETA > 0:  # (6) − β·KL,  KL(π ‖ π_ref) ≈ π_ref/π − log(π_ref/π) − 1  [DSM Eq.4]
            log_ratio_T = ref_logps[i] - logps[i]
            objective_T = objective_T - BETA * (log_ratio_T.exp() - log_ratio_T - 1)
        # (7) 1/G · Σ_i 1/|o_i| · Σ_t  [DSM Eq.3]: the mean over tokens, and over answers
        objective = objective + objective_T.mean() / len(answers)
    return -objective


def update(model, optimizer, groups):
    """One optimizer step on the mean loss of all groups. Memory holds one group at a time."""
    for group in groups:
        loss = grpo_loss(model, **group) / len(groups)  # (7) the mean over prompts
        loss.backward()  # (8) gradients add up
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # (8)
    optimizer.step()  # (9)
    optimizer.zero_grad()


def train_step(model, reference, tokenizer, image_processor, optimizer, rng):
    """Ask, answer, grade, compare, learn [DSM Algorithm 1]. Returns the rewards of all answers."""
    groups, rewards_of_all = [], []
    for _ in range(PROMPTS):
        image, number = draw_number(rng)  # (1) a prompt
        prompt = encode(tokenizer, image_processor, image)
        answers = sample(model, prompt)  # (1) its G answers
        rewards = [grade(tokenizer.decode(tokens), number) for tokens in answers]  # (2)
        advantages = group_advantages(rewards)  # (3)
        group = {"prompt": prompt, "answers": answers, "advantages": advantages}
        with torch.no_grad():  # π still is what wrote the answers
            group["old_logps"] = token_logprobs(model, prompt, answers)  # (5) π_old
            if BETA > 0:
                group["ref_logps"] = token_logprobs(reference, prompt, answers)  # (6) π_ref
        groups.append(group)
        rewards_of_all += rewards
    for _ in range(INNER_STEPS):
        update(model, optimizer, groups)  # (4) … (9); the model is its own sampler: (10)
    return rewards_of_all


def main():
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer, image_processor = load(MODEL)
    reference = load(MODEL)[0] if BETA > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rewards = []
    for step in range(1, STEPS + 1):
        rewards += train_step(model, reference, tokenizer, image_processor, optimizer, rng)
        if step % 10 == 0 or step == STEPS:
            mean = statistics.mean(rewards)
            accuracy = rewards.count(1.0) / len(rewards)
            print(f"step {step:4}  reward {mean:.3f}  accuracy {accuracy:.3f}", flush=True)
            rewards = []


if __name__ == "__main__":
    main()
