"""Which options do both stages share, how does a command line become them, what does --check say?

§1 the options · §2 from a command line · §3 --check

Papers: [PR1] Perception-R1, arXiv 2504.07954 · [OVR] Open-Vision-Reasoner, arXiv 2507.05255.
"""
import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

import data as datasets
import fsdp
import qwen_vl
from prompts import prompt_lines


# §1 ────────────────────────────────────── the options ───────────────────────────────────────
@dataclass(frozen=True)
class Options:
    """The options that both stages have."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id, local directory, tiny or tiny-untied
    # files and drawn worlds, each with an optional :weight; `python data.py --help` lists formats
    data: tuple[str, ...] = ("synthetic:counting?size=644x476&objects=2-10",)
    fields: str = ""  # names of the data's fields, e.g. question=problem,answer=solution
    heldout: float = 0.05  # share of a file's samples that is never trained on, for evaluation
    skip_bad: int = 0  # bad rows to leave out and list, instead of stopping
    check: bool = False  # list each fault of --data as file:line, images too, and stop
    out: str = "runs/grpo"  # run folder
    system_prompt: str = qwen_vl.SYSTEM  # system turn [PR1 code: this one]
    # before: <think>…</think><answer>…</answer> [PR1 T5: hurts perception]; after: answer first
    think: Literal["no", "before", "after"] = "no"
    min_pixels: int = 56 * 56  # least area of a resized image [PR1 code: 3136]
    max_pixels: int = 1_000_000  # largest area of a resized image [PR1 code: 1000000]
    max_prompt: int = 2048  # longest prompt, tokens; never truncated [PR1 code: 2048]
    max_tokens: int = 768  # longest completion [PR1 §4.3: 2048, code: 768; OVR §4.1: 24k]
    steps: int = 500  # optimizer steps (batches, with --inner-steps) [PR1 code: 357–7900; OVR: 900]
    lr: float = 1e-6  # AdamW learning rate [PR1 §4.3, OVR §4.1: 1e-6]
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # [OVR; PR1: linear]
    warmup: int = 0  # steps of linear warm-up [PR1 code: 0; OVR §4.1: 50]
    beta2: float = 0.999  # AdamW β₂ [PR1 code: 0.999; OVR §4.1: 0.95]
    max_norm: float = 1.0  # clip of the gradient's norm [PR1 code: 1.0]
    max_bad_steps: int = 5  # skipped steps in a row (gradient not finite) that end the run
    micro_tokens: int = 16384  # tokens of a packed micro-batch
    checkpointing: bool = True  # recompute activations in the backward pass [PR1 code: on]
    checkpoint_every: int = 1  # with --checkpointing: of every n-th layer; 2: faster, more memory
    keep_attention: bool = False  # checkpointing computes attention once: faster, more memory
    offload: bool = False  # sharded weights and optimizer in host memory
    lora: int = 0  # rank of adapters to train, not the model: raise --lr tenfold yourself; 0: none
    lora_alpha: float | None = None  # an adapter counts α/rank times; default: 2·rank
    export: Literal["merged", "adapter"] = "merged"  # adapter: also as PEFT's, in --out/adapter
    # fsdp2: PyTorch's fully_shard; by-hand: fsdp.py §3 in its place, without checkpoints
    sharding: Literal["fsdp2", "by-hand"] = "fsdp2"
    graphs: bool = True  # sample by captured CUDA graphs
    compile: bool = False  # torch.compile: fuses element-wise kernels on a GPU; not run there yet
    deterministic: bool = False  # the same bits from run to run on GPUs too, by slower kernels
    kv_gb: float = 8.0  # memory for keys and values while sampling, GiB a rank
    timeout: int = 3600  # seconds ranks wait for each other; above the longest rollout
    seed: int = 0  # of data order, sampling noise and tiny weights [PR1 code: 42]
    save_every: int = 100  # steps between checkpoints [PR1 code: 100]
    keep: int = 2  # newest checkpoints to keep
    resume: Literal["auto", "never"] = "auto"  # from the newest checkpoint in --out
    log: Literal["", "wandb", "tensorboard"] = ""  # where metrics go besides metrics.jsonl
    # steps between held-out evaluations, one before the first step; 0: never [OVR: 10]
    eval_every: int = 0
    eval_data: tuple[str, ...] = ()  # held-out data; default: the held-out share of --data
    eval_samples: int = 200  # held-out samples
    blind: bool = False  # evaluate on grey images: what the policy scores without its eyes

    def __post_init__(self):
        check_options(self)


AT_LEAST_ONE = ("prompts", "group", "max_tokens", "eval_tokens", "inner_steps", "micro_tokens",
                "steps", "batch", "keep", "save_every", "eval_samples", "max_bad_steps",
                "overlong_buffer", "checkpoint_every")
AT_LEAST_ZERO = ("skip_bad", "warmup", "dynamic_sampling", "beta", "tis", "eval_every",
                 "pictures_every", "entropy_every", "lora")


def check_options(config) -> None:
    """Errors: ValueError naming the option, its value, and what it may be."""
    for option in fields(config):
        value, flag = getattr(config, option.name), flag_of(option.name)
        choices = getattr(option.type, "__args__", ())
        if isinstance(value, str) and choices and value not in choices:
            raise ValueError(f"{flag} is {value!r}; choose from {', '.join(choices)}")
        if option.name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{flag} is {value}; it must be 1 or more")
        if option.name in AT_LEAST_ZERO and value < 0:
            raise ValueError(f"{flag} is {value}; it must be 0 or more")
        if option.name in ("temperature", "lr") and value <= 0:
            raise ValueError(f"{flag} is {value}; it must be above 0")
    if not 0 <= config.heldout < 1:
        raise ValueError(f"--heldout is {config.heldout}; it is a share, from 0 to below 1")
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise ValueError(f"--lora-alpha is {config.lora_alpha}; it must be above 0")
    if config.export == "adapter" and not config.lora:
        raise ValueError("--export adapter: there is none without --lora RANK, as --lora 32")
    if config.sharding == "by-hand":
        fsdp.refuse_by_hand(config)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given(config, *names: str) -> list[str]:
    """Those of the options that are not at their default, as flags."""
    defaults = {option.name: option.default for option in fields(config)}
    return [flag_of(name) for name in names if getattr(config, name) != defaults[name]]


def without_effect(config) -> list[str]:
    """Sentences about options of both stages that were given but act only together with others."""
    found = []
    if not config.checkpointing:
        asked = given(config, "checkpoint_every", "keep_attention")
        found += [f"{flag}: no effect with --no-checkpointing" for flag in asked]
    if not config.lora:
        found += [f"{flag}: no effect without --lora" for flag in given(config, "lora_alpha")]
    if config.eval_every == 0:
        asked = given(config, "eval_data", "eval_samples", "blind")
        found += [f"{flag}: no effect at --eval-every 0" for flag in asked]
    if config.schedule == "constant" and config.warmup > config.steps:
        found.append(f"--warmup {config.warmup}: --lr is not reached in {config.steps} steps")
    return found


def without_effect_in_rl(config) -> list[str]:
    """Alike, about those that grpo_vl.py has alone."""
    found = []
    asked = given(config, "ratio", "clip_low", "clip_high")
    if asked and config.inner_steps == 1:  # ∇ of a sequence's ratio is then the tokens' mean ∇ too
        found.append(f"{', '.join(asked)}: no effect at --inner-steps 1, where every ratio is 1")
    if config.beta == 0:
        found += [f"{flag}: no effect at --beta 0" for flag in given(config, "kl")]
    if config.overlong != "soft":
        asked = given(config, "overlong_buffer")
        found += [f"{flag}: acts with --overlong soft only" for flag in asked]
    if config.scale == "none":
        found += [f"{flag}: no effect at --scale none" for flag in given(config, "std")]
    if config.lora:
        asked = given(config, "freeze_vision")
        found += [f"{flag}: no effect beside --lora, which freezes all weights" for flag in asked]
    return found


def data_options(config) -> dict:
    """What data.open_data and data.examine take of a configuration."""
    names = ("seed", "min_pixels", "max_pixels", "fields", "skip_bad", "heldout")
    return {name: getattr(config, name) for name in names}


# §2 ─────────────────────────────────── from a command line ──────────────────────────────────
HEADINGS = {  # of --help, in the order in which a user comes to need them
    "the model": "model cold_start after train freeze_vision lora lora_alpha export",
    "the data": "data fields heldout skip_bad check",
    "the prompt": "system_prompt think min_pixels max_pixels max_prompt",
    "the run": "out steps seconds batch seed resume save_every keep",
    "sampling": "prompts group max_tokens max_tokens_at temperature dynamic_sampling",
    "the reward": "reward reward_options overlong overlong_buffer",
    "advantage and loss": "scale std baseline loss ratio clip_low clip_high beta kl inner_steps "
                          "tis",
    "the optimizer": "lr schedule warmup beta2 max_norm max_bad_steps",
    "evaluation and logging": "eval_every eval_data eval_samples eval_tokens blind log "
                              "entropy_every pictures_every",
    "memory, speed, many GPUs": "plan micro_tokens kv_gb checkpointing checkpoint_every "
                                "keep_attention offload sharding graphs compile deterministic "
                                "timeout"}


def parse_config(config_class, arguments, presets: dict, text: str, gpu: bool):
    """Defaults < --preset < --config FILE < command line, each option's help the comment beside it.

    Of --preset A,B a later one overrides an earlier one. Without a GPU, and with none of --preset,
    --config and --model, the preset is "tiny".
    Errors: exit status 2 and one sentence for an unknown option or a wrong value.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-h", "--help", action="store_true", help="this text")
    first.add_argument(
        "--preset", default="", metavar="PRESET[,PRESET…]",
        help=f"options' values to begin with, of several the later one's: {', '.join(presets)}")
    first.add_argument("--config", type=Path, help="a run's config.json: the same values again")
    chosen, rest = first.parse_known_args(arguments)
    named = any(word == "--model" or word.startswith("--model=") for word in rest)
    if not (chosen.preset or chosen.config or named or gpu):
        chosen.preset = "tiny"
    try:
        saved = json.loads(chosen.config.read_text()) if chosen.config else {}
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        default = config_class(**(join_presets(presets, chosen.preset) | saved))
        if chosen.help:
            print_help(first, config_class, default, text)
            raise SystemExit(0)
        return tyro.cli(config_class, args=bare_think(rest), default=default)
    except (OSError, ValueError, TypeError) as error:
        first.error(str(error))


def join_presets(presets: dict[str, dict], names: str) -> dict:
    """The options of all presets named, as in "pr1-grounding,3b-24gb"; later ones override.

    Errors: ValueError naming one that there is not.
    """
    options = {}
    for name in names.split(",") if names else []:
        if name not in presets:
            raise ValueError(f"--preset {name!r}: choose from {', '.join(presets)}, or several "
                             "with commas and without spaces")
        options |= presets[name]
    return options


def print_help(first, config_class, default, text: str) -> None:
    """--help: the options of `first`, then under HEADINGS what tyro makes of the configuration."""
    # tyro means to drop get_parser some day; requirements.txt names a version that has it.
    made = tyro.extras.get_parser(config_class, default=default)
    option_of = {action.dest.replace("-", "_"): action for action in made._actions}
    shown = argparse.ArgumentParser(
        parents=[first], add_help=False, usage="%(prog)s [OPTIONS]", description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for heading, names in HEADINGS.items():
        group = shown.add_argument_group(heading)  # one without options is not printed
        for name in names.split():
            if name in option_of:
                option = option_of[name]
                kind = {"metavar": option.metavar}
                if option.nargs == 0:
                    kind = {"action": "store_true"}
                about = option.help.replace("%", "%%")
                group.add_argument(*option.option_strings, help=about, **kind)
    shown.print_help()


def bare_think(arguments: list[str]) -> list[str]:
    """The arguments with a `--think` that is followed by no form written as `--think before`."""
    written = []
    for word, following in zip(arguments, [*arguments[1:], ""]):
        written.append(word)
        if word == "--think" and following not in ("no", "before", "after", "all"):
            written.append("before")
    return written


# §3 ──────────────────────────────────────── --check ─────────────────────────────────────────
def check_data(config) -> None:
    """--check: each fault of --data and exit status 1, or what the data holds and 0."""
    options = data_options(config)
    faults, lines = datasets.examine(config.data, **options)
    if faults:
        raise SystemExit("\n".join([*lines, *faults]))
    print("\n".join([*lines, *prompt_lines(config, options)]))
