"""Which settings do the papers give, and which does a card need? --preset of both stages.

Differences from Config's defaults. A card's stand beside a task's: --preset pr1-grounding,3b-24gb.

[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [ORZ]
Open-Reasoner-Zero, 2503.24290.
"""
from tiny import (
    BASE,
    COUNTING,
    DETECTION,
    FEW,
    GROUNDING,
    OCR,
    SUMS,
    SUMS_AS_TEXT,
    TRACES,
)

PR1 = dict(  # what its tasks share, where it differs from the defaults  [PR1 §4.3, code]
    model="Qwen/Qwen2.5-VL-3B-Instruct", prompts=14, beta=0.04, schedule="linear", seed=42)
CARD_3B = dict(model="Qwen/Qwen2.5-VL-3B-Instruct")
CARD_7B = dict(model="Qwen/Qwen2.5-VL-7B-Instruct")
ADAPTERS = dict(lora=32, lr=1e-5)  # ten times [PR1 §4.3]'s lr
PRESETS = {  # --preset of grpo_vl.py
    "tiny": dict(  # what a machine without a GPU trains in minutes; no paper's values
        model=BASE, data=(COUNTING,), max_tokens=80, prompts=32, steps=150, lr=1.5e-4, warmup=10,
        schedule="linear", eval_every=25, checkpointing=False, micro_tokens=4096),
    # steps: samples used / 14 prompts a step [PR1 T7, code]; max_tokens [PR1 code]
    "pr1-grounding": PR1 | dict(data=("refcoco-pr1:refcoco_train.json",), steps=357),
    "pr1-counting": PR1 | dict(data=("pixmo-pr1:pixmo_count_train.json",), steps=714),
    "pr1-ocr": PR1 | dict(data=("fox:page_ocr_train.json",), steps=357, max_tokens=2048),
    "pr1-detection": PR1 | dict(steps=7857, max_tokens=2048,
        data=("coco:annotations/instances_train2017.json?folder=../train2017",)),
    "ovr-rl": dict(  # [OVR §3.2, §4.1]; the loss as in its base, Open-Reasoner-Zero [ORZ code]
        model="Qwen/Qwen2.5-VL-7B-Instruct", data=("ovr_rl.jsonl",), cold_start="runs/coldstart",
        prompts=512, group=16, scale="batch", loss="dapo", warmup=50, beta2=0.95, steps=900,
        max_tokens=24 * 1024, max_tokens_at=("300:32768", "700:49152"), eval_every=10,
        timeout=4 * 86_400),  # a rank of 8 may sample for days: 1,024 rows, few of them at once
    # one card, beside a task's
    "3b-24gb": CARD_3B | ADAPTERS | dict(kv_gb=2.0, micro_tokens=4096),
    "3b-48gb": CARD_3B | dict(offload=True, kv_gb=8.0, micro_tokens=8192),  # all of it is trained
    "7b-48gb": CARD_7B | ADAPTERS | dict(kv_gb=2.0, micro_tokens=4096),
    "7b-80gb": CARD_7B | ADAPTERS | dict(kv_gb=16.0, micro_tokens=16384)}

# What the base's five stages draw. Boxes are learnt from boxes, and a named one among others first
# where it fills four image tokens.
SMALL_SCENES = "size=56x56&shapes=3&colours=3&reach=0.3-0.5"
BASE_BOXES = (f"{FEW}:2", f"{SUMS_AS_TEXT}:1")
BASE_SMALL = (
    f"{FEW}:5",
    f"synthetic:grounding?{SMALL_SCENES}&distractors=1-2:4",
    f"synthetic:counting?{SMALL_SCENES}&objects=1-3&distractors=1-1:1",
    f"{OCR}:2",
    f"{SUMS}:1.5",
    f"{SUMS_AS_TEXT}:1")
BASE_GROWING = (
    f"{DETECTION}:3",
    f"synthetic:grounding?{SMALL_SCENES}&distractors=1-2:2",
    f"{GROUNDING}:3",
    f"{COUNTING}:2",
    f"{OCR}:3",
    f"{SUMS}:2.5",
    f"{SUMS_AS_TEXT}:1")
BASE_LAGGING = (
    f"synthetic:grounding?{SMALL_SCENES}&distractors=1-2:3",
    f"{GROUNDING}:3",
    f"{SUMS}:2")
BASE_LAST = (
    f"{FEW}:3",
    f"{DETECTION}:1",
    f"{GROUNDING}:3",
    f"{COUNTING}:1.5",
    f"{OCR}:3",
    f"{SUMS}:2.5",
    f"{SUMS_AS_TEXT}:1")

SMALL = dict(batch=32, max_tokens=256, eval_every=100, checkpointing=False, micro_tokens=4096)
STAGE = dict(
    model="tiny", train="all", lr=1e-3, schedule="constant", max_tokens=512, eval_every=400,
    eval_tokens=256, save_every=400, keep=1, batch=40)
COLD_START = {  # --preset of sft_coldstart.py
    "ovr-coldstart": dict(data=("traces:cold_start.jsonl",)),  # the defaults are OVR's
    "tiny": SMALL | dict(  # OVR's stage 1 in minutes on a CPU: text-only traces, llm alone
        model=BASE, data=(TRACES,), think="before", steps=400, lr=1e-3, warmup=20,
        eval_tokens=256),
    # A longer one, in five stages: to see (every object's box in every answer), all tasks where one
    # shape fills an image token, the same tasks in larger images, what lags behind by itself, and
    # all of it more slowly.
    "base-1": SMALL | STAGE | dict(
        data=BASE_BOXES, batch=48, steps=2000, eval_tokens=160, out="runs/base/boxes"),
    "base-2": SMALL | STAGE | dict(
        after="base-1", data=BASE_SMALL, think="all", steps=2500, out="runs/base/small"),
    "base-3": SMALL | STAGE | dict(
        after="base-2", data=BASE_GROWING, think="all", steps=3500, seed=1,
        out="runs/base/growing"),
    "base-4": SMALL | STAGE | dict(
        after="base-3", data=BASE_LAGGING, steps=700, seed=3, out="runs/base/lagging"),
    "base": SMALL | STAGE | dict(
        after="base-4", data=BASE_LAST, think="all", steps=2500, lr=5e-4, seed=2,
        out="runs/base/last"),
}
