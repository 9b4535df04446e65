"""Which settings do the papers give, and which does a card need? --preset of grpo_vl.py.

Differences from Config's defaults. A card's stand beside a task's: --preset pr1-grounding,3b-24gb.

[PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, 2507.05255 · [ORZ]
Open-Reasoner-Zero, 2503.24290. The cold start's stand in sft_coldstart.py.
"""
from tiny import BASE, COUNTING

PR1 = dict(  # what its tasks share, where it differs from the defaults  [PR1 §4.3, code]
    model="Qwen/Qwen2.5-VL-3B-Instruct", prompts=14, beta=0.04, schedule="linear", seed=42)
CARD_3B = dict(model="Qwen/Qwen2.5-VL-3B-Instruct")
CARD_7B = dict(model="Qwen/Qwen2.5-VL-7B-Instruct")
ADAPTERS = dict(lora=32, lr=1e-5)  # ten times [PR1 §4.3]'s lr
PRESETS = {
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
