"""Whole GRPO steps, timed: this project and, with --against trl, TRL's GRPOTrainer.

  python benchmarks/bench_step.py --steps 3                             tiny shape, ours alone
  python benchmarks/bench_step.py --against trl --rounds 3 --trl-python TRL_VENV/bin/python
  python benchmarks/bench_step.py --g-scaling --image-tokens 961 --length 32     G = 4, 8, 16, 32
  python benchmarks/bench_step.py --shape 3b --peak-tflops 989          a GPU; random weights, no hub

One JSON line on stdout, the rest on stderr. Each side of a round is a fresh process (ours, trl,
ours, trl, …); all load the same weights and get the same images, prompts and forced completion
lengths in the same precision: fp32 on a CPU; bf16 compute and fp32 master weights on CUDA. The
script fails if their `counts` differ. TRL is no dependency here: TRL_VENV is a venv of its own.

steps          seconds of each measured step, all rounds; a process's first step is left out
seconds        medians. ours: sample (encoding, generate; prefill is a part of that), reward, train
               (log-probs, backward, update), refresh. trl: sample, and all the rest
tokens_per_second   completion tokens over seconds, of sample and of train
train          FLOPs (see model_work) over seconds of train; mfu: over --peak-tflops
decode         a round is a token of every row; gbytes a second that it must read (see model_work),
               as a share of what a large copy_ reads and writes. Tiny weights lie in the cache
memory         GiB. peak (CPU: resident, CUDA: allocated) − baseline after imports = net
ratio          median step of trl / ours, ratios: each round's; memory_ratio: net of ours / trl
g_scaling      median seconds of train for G = 4, 8, 16, 32, and the last over the first
load           the machine's load average before and after: above `threads`, others were at work
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import transformers
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
import fsdp
import grpo_vl
import plan
import qwen_vl
import rewards
import tiny
import training
from sources import Sample

SHAPES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}  # plan.published
TEMPLATE = (  # Qwen's chat format, as qwen_vl.encode_chat writes it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.text %}"
    "{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QUESTION = "How many circles? 77777777777777777777"  # with a 961-token image a prompt of 1,025
NUMBERS = {  # options: default, help
    "image-tokens": (256, "of each prompt, a square number; 256 is 448×448 pixels"),
    "prompts": (8, "P of a step"), "group": (8, "G, completions of a prompt"),
    "length": (64, "tokens of every completion"), "rounds": (1, "processes of a side"),
    "steps": (2, "measured steps of a process"), "seed": (0, "of weights, images and noise"),
    "micro-tokens": (16384, "ours: tokens of a packed micro-batch"),
    "checkpoint-every": (1, "ours: with --checkpointing, of every n-th layer"),
    "entropy-every": (1, "ours: steps between those that measure the entropy; 0: never"),
    "trl-micro": (0, "trl: sequences of a micro-batch; 0: all"), "beta": (0.0, "KL weight"),
    "peak-tflops": (0.0, "of the device, for train.mfu; 0: unknown")}


def options():
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    for name, (default, text) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{text} [{default}]")
    add("--shape", choices=("tiny", *SHAPES), default="tiny")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--keep-attention", action="store_true", help="ours: checkpointing does not compute attention again")
    add("--against", choices=("trl",))
    add("--trl-python", default=sys.executable, help="has TRL installed")
    add("--g-scaling", action="store_true")
    for name in ("--side", "--folder"):  # what a process is to do, and where the weights are
        add(name, help=argparse.SUPPRESS)
    return parse.parse_args()


def build(a) -> None:
    """Random weights of the shape (bf16, tiny: fp32), the tiny tokenizer, and the question."""
    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_model(tokenizer, hidden=256, layers=4).config
    config.text_config.vocab_size = 2048
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]  # half a head: 256 / 4 / 2
    if a.shape in SHAPES:
        ids = {k: v for k, v in config.to_dict().items() if k.endswith("_token_id")}
        text, vision = plan.published(SHAPES[a.shape])
        config = type(config)(text_config=text, vision_config=vision,
                              tie_word_embeddings=text["tie_word_embeddings"], **ids)
    torch.manual_seed(a.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.to(torch.bfloat16 if a.shape in SHAPES else torch.float32).save_pretrained(a.folder)
    tokenizer.save_pretrained(a.folder)


def make_images(a) -> list:
    """Noise for every prompt: warm-up, steps, and one batch more, which the last step may fetch."""
    side, noise = 28 * round(a.image_tokens**0.5), torch.Generator().manual_seed(a.seed)
    how = dict(size=(side, side, 3), generator=noise, dtype=torch.uint8)
    count = a.prompts * (a.steps + 2)
    return [Image.fromarray(torch.randint(256, **how).numpy()) for _ in range(count)]


def count_tokens(a, prompts, completions, image_pad: int) -> dict:
    """What a step processed; `prompts` once each, not once a completion."""
    images, lengths = [p.count(image_pad) for p in prompts], [len(c) for c in completions]
    asked = [a.image_tokens] * a.prompts, [a.length] * a.prompts * a.group
    assert (images, lengths) == asked, f"not what was asked for: {images}, {lengths}"
    return dict(image_tokens=sum(images), prompt_tokens=sum(map(len, prompts)),
                completion_tokens=sum(lengths), ids_crc32=zlib.crc32(str(prompts).encode()))


def now() -> float:
    """Seconds, once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(owner, name: str, keep=lambda arguments, result: None) -> list:
    """Replace owner.name by itself with a log, which is returned: (seconds, what to keep)."""
    original, log = getattr(owner, name), []

    def timed(*arguments, **named):
        start = now()
        result = original(*arguments, **named)
        log.append((now() - start, keep(arguments, result)))
        return result

    setattr(owner, name, timed)
    return log


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def copy_bandwidth(device) -> float:
    """Bytes a second, read and written, of a copy far larger than the caches; the best of ten."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    log = watch(target, "copy_")
    for _ in range(10):
        target.copy_(source)
    return 2 * source.nbytes / min(seconds for seconds, _ in log)


def model_work(a, model, prompt: int) -> tuple[float, float, float]:
    """(FLOPs of a step's training; numbers that a decoding round reads: weights, keys and values).

    FLOPs: forward and backward, nothing twice. 6·N·tokens: decoder layers over prompt + G·T tokens,
    lm_head over the G·T scored ones, vision tower over the patches (4 an image token), its merger
    over image tokens. Attention: 12·heads·d a layer for each query and key that it sees. Reads:
    decoder layers and lm_head once; a prompt's keys and values once a group, a row's own once.
    """
    text, vision = model.config.text_config, model.config.vision_config
    layers = model.model.language_model.layers
    parts = (layers, model.lm_head, model.model.visual, model.model.visual.merger)
    decoder, head, tower, merger = (sum(w.numel() for w in m.parameters()) for m in parts)
    answers, patches, d = a.group * a.length, 4 * a.image_tokens, layers[0].self_attn.head_dim
    flops = 6 * (decoder * (prompt + answers) + head * answers + (tower - 3 / 4 * merger) * patches)
    pairs = prompt * (prompt + 1) / 2 + answers * (prompt + (a.length + 1) / 2)
    flops += 12 * len(layers) * text.num_attention_heads * d * pairs
    window, full = (vision.window_size // vision.patch_size) ** 2, len(vision.fullatt_block_indexes)
    seen = min(window, patches) * (vision.depth - full) + patches * full  # keys, over all layers
    flops += 12 * vision.hidden_size * patches * seen
    cached = 2 * len(layers) * text.num_key_value_heads * d * (prompt + answers / 2)
    return a.prompts * flops, decoder + head, a.prompts * cached


def describe(baseline: float, **versions) -> dict:
    peak, cuda = peak_gib(), torch.cuda.is_available()
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    return dict(memory=dict(peak=peak, baseline=baseline, net=peak - baseline), **versions,
                device=torch.cuda.get_device_name() if cuda else cpu, torch=torch.__version__,
                transformers=transformers.__version__, threads=torch.get_num_threads())


def ours(a) -> dict:
    baseline, ranks, read = peak_gib(), fsdp.start_processes(3600), qwen_vl.SpecialIds.read
    qwen_vl.SpecialIds.read = lambda *of: replace(read(*of), stops=(-1,))  # no token has this id
    config = grpo_vl.Config(
        model=a.folder, prompts=a.prompts, group=a.group, max_tokens=a.length, max_prompt=10**6,
        overlong="keep", beta=a.beta, micro_tokens=a.micro_tokens, checkpointing=a.checkpointing,
        checkpoint_every=a.checkpoint_every, keep_attention=a.keep_attention,
        entropy_every=a.entropy_every, seed=a.seed,
        lr=1e-6, pictures_every=0)
    run = training.prepare(config, ranks, a.folder, beta=a.beta)
    run.data = [Sample(str(i), "math", QUESTION, "7", (image,))
                for i, image in enumerate(make_images(a))]
    run.reward = lambda task, completion, *_, **__: len(completion) % 7 / 7
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    if a.g_scaling:
        return g_scaling(a, run) | describe(baseline)

    def ids(arguments, groups):
        return [list(p.ids) for p in arguments[0]], [c.tokens for group in groups for c in group]

    logs = dict(step=watch(grpo_vl, "train_step", lambda _, metrics: metrics),
                generate=watch(run.sampler, "generate", ids),
                prefill=watch(run.sampler, "start_batch"), reward=watch(grpo_vl, "score_groups"))
    for step in range(a.steps + 1):
        grpo_vl.train_step(run, step)
    waves, steps = len(logs["prefill"]) // (a.steps + 1), logs["step"][1:]
    seconds = {name: median(took for took, _ in log[1:]) for name, log in logs.items()}
    for name in ("sample", "train", "refresh"):
        seconds[name] = median(metrics[f"seconds/{name}"] for _, metrics in steps)
    seconds["sample"] -= seconds["reward"]
    seconds["prefill"] *= waves
    counts = count_tokens(a, *logs["generate"][0][1], run.special.image_pad)
    flops, weights, cached = model_work(a, run.policy.model, counts["prompt_tokens"] // a.prompts)
    decoding, tflops = seconds["generate"] - seconds["prefill"], flops / seconds["train"] / 1e12
    reads = run.sampler.dtype.itemsize * (a.length - 1) * (waves * weights + cached) / decoding
    about, copies = describe(baseline), copy_bandwidth(ranks.device)  # the peak is read before
    rate = {name: counts["completion_tokens"] / seconds[name] for name in ("sample", "train")}
    return about | dict(
        counts=counts, steps=[took for took, _ in steps], seconds=seconds, tokens_per_second=rate,
        train=dict(tflops=tflops, mfu=tflops / a.peak_tflops if a.peak_tflops else None),
        decode=dict(ms_per_round=1e3 * decoding / waves / (a.length - 1), waves=waves,
                    gbytes=reads / 1e9, copy_gbytes=copies / 1e9, share=reads / copies))


def g_scaling(a, run) -> dict:
    """Seconds of log-probs and update as the group grows; the prompt is paid once a group."""
    config, times = run.config, {4: [], 8: [], 16: [], 32: []}
    for group in [*times] * (a.steps + 1):
        run.config, run.cursor = replace(config, group=group), 0
        times[group].append(grpo_vl.train_step(run, 0)["seconds/train"])
    seconds = {str(group): median(took[1:]) for group, took in times.items()}
    seconds["ratio"] = seconds["32"] / seconds["4"]
    return dict(g_scaling=seconds, prompt_tokens=len(training.make_prompt(run, run.data[0]).ids))


def trl(a) -> dict:
    import datasets
    from trl import GRPOConfig, GRPOTrainer, __version__

    class Mark(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(now())

    baseline, cuda, marks = peak_gib(), torch.cuda.is_available(), []
    transformers.Qwen2_5_VLProcessor.check_argument_for_proper_class = lambda *_: object  # no video
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.folder, padding_side="left")
    pixels = transformers.Qwen2VLImageProcessorPil(size=dict(shortest_edge=784, longest_edge=10**9))
    processor = transformers.Qwen2_5_VLProcessor(pixels, tokenizer, chat_template=TEMPLATE)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(a.folder, dtype=torch.float32)
    turns = {"system": qwen_vl.SYSTEM, "user": rewards.prompt("math", QUESTION)}
    chat, images = [dict(role=r, content=c) for r, c in turns.items()], make_images(a)
    rows = datasets.Dataset.from_dict({"i": range(len(images))}).with_transform(lambda batch: dict(
        prompt=[chat for _ in batch["i"]], image=[images[i] for i in batch["i"]]))  # in memory
    micro = a.trl_micro or a.prompts * a.group
    config = GRPOConfig(
        output_dir=f"{a.folder}/trl", per_device_train_batch_size=micro, num_generations=a.group,
        gradient_accumulation_steps=a.prompts * a.group // micro, max_steps=a.steps + 1,
        max_completion_length=a.length, generation_kwargs=dict(min_new_tokens=a.length),
        temperature=1.0, top_k=0, top_p=1.0, beta=a.beta, loss_type="grpo", learning_rate=1e-6,
        lr_scheduler_type="constant", gradient_checkpointing=a.checkpointing, bf16=cuda,
        use_cpu=not cuda, use_vllm=False, shuffle_dataset=False, report_to="none",
        save_strategy="no", disable_tqdm=True, seed=a.seed)
    trainer = GRPOTrainer(
        model, lambda completions, **_: [len(turns[0]["content"]) % 7 / 7 for turns in completions],
        config, rows, processing_class=processor, callbacks=[Mark()])
    sampled = watch(trainer, "_generate", lambda _, result: (result[0][:: a.group], result[1]))
    trainer.train()
    steps = [after - before for before, after in pairwise(marks)]
    sample = median(took for took, _ in sampled[1:])
    return describe(baseline, trl=__version__) | dict(
        counts=count_tokens(a, *sampled[0][1], model.config.image_token_id),
        micro=micro, steps=steps,
        seconds=dict(step=median(steps), sample=sample, rest=median(steps) - sample))


def start(python: str, a, side: str) -> dict:
    """One side in its own process. (Its peak RSS starts at ours: not above its own baseline.)"""
    command = [python, __file__, *sys.argv[1:], "--side", side, "--folder", a.folder]
    shown = subprocess.check_output(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True)
    return json.loads(shown.splitlines()[-1])


def merge(rounds: list):
    """Several rounds' results as one: medians of fractions, lists end to end."""
    first = rounds[0]
    if isinstance(first, dict):
        return {name: merge([one[name] for one in rounds]) for name in first}
    if isinstance(first, list):
        return [round(value, 4) for one in rounds for value in one]
    return round(median(rounds), 4) if isinstance(first, float) else first


def main() -> None:
    a = options()
    if a.side:
        return print("\n" + json.dumps({"build": build, "ours": ours, "trl": trl}[a.side](a)))
    sides = {"ours": sys.executable} | ({"trl": a.trl_python} if a.against else {})
    if a.against and subprocess.run([a.trl_python, "-c", "import trl"]).returncode:
        sys.exit(f"{a.trl_python} has no TRL: python3.11 -m venv TRL_VENV && TRL_VENV/bin/pip "
                 "install -r requirements.txt trl==1.16.0, then --trl-python TRL_VENV/bin/python")
    load, results = [os.getloadavg()[0]], {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as a.folder:
        start(sys.executable, a, "build")
        for side in [*sides] * a.rounds:
            results[side].append(start(sides[side], a, side))
    counts = [one.get("counts") for runs in results.values() for one in runs]
    assert all(one == counts[0] for one in counts), f"the sides did different work: {counts}"
    out = {side: merge(runs) for side, runs in results.items()}
    if a.against:
        mine, theirs = out["ours"], out["trl"]
        out["ratio"] = round(median(theirs["steps"]) / median(mine["steps"]), 3)
        out["ratios"] = [round(median(their["steps"]) / median(my["steps"]), 3)
                         for my, their in zip(results["ours"], results["trl"])]
        out["memory_ratio"] = round(mine["memory"]["net"] / theirs["memory"]["net"], 3)
    del a.side, a.folder
    asked = {name: value for name, value in vars(a).items() if name not in ("side", "folder", "trl_python")}
    print(json.dumps(asked | out | {"load": [*load, os.getloadavg()[0]]}))


if __name__ == "__main__":
    main()
