"""What is asked of a sample? One builder of prompts: for training, evaluation and --check.

§1 a sample's prompt · §2 what --check shows
"""
import hashlib
from itertools import pairwise

import data as datasets
import qwen_vl
import rewards
from qwen_vl import Prompt, SpecialIds
from sources import Sample


# §1 ─────────────────────────────────── a sample's prompt ────────────────────────────────────
def think_of(config, name: str) -> str | bool:
    """The form of thinking asked of the sample with this id, as rewards.py takes it."""
    form = config.think
    if form == "all":  # half of the samples plain, by their ids
        digest = hashlib.sha256(name.encode()).digest()
        form = ("no", "no", "before", "after")[digest[0] % 4]
    return False if form == "no" else form


def encode_sample(config, tokenizer, special: SpecialIds, sample: Sample, text="") -> Prompt:
    """The chat turn that asks for the sample's answer, in the words of its task or in `text`.

    Errors: DataError, as `qwen_vl.encode_chat`.
    """
    if not text:
        text = rewards.prompt(sample.task, sample.question, think=think_of(config, sample.id))
    system = sample.system or config.system_prompt
    return qwen_vl.encode_chat(tokenizer, special, text, sample.images, system)


# §2 ─────────────────────────────────── what --check shows ───────────────────────────────────
def prompt_lines(config, options: dict) -> list[str]:
    """The longest prompt, and the first one as the model reads it; options: data.open_data's."""
    try:
        tokenizer = qwen_vl.load_tokenizer(config.model)
        special = SpecialIds.read(tokenizer)
    except ValueError as error:
        return [f"prompts are not shown: {error}"]
    mix = datasets.open_data(config.data, split="all", **options | {"heldout": 0.0})
    longest, where = 0, ""
    for index in datasets.looked_at(mix):
        sample = mix.at(index)
        length = len(encode_sample(config, tokenizer, special, sample).ids)
        if length > longest:
            longest, where = length, sample.id
    lines = [f"longest prompt: {longest} tokens ({where}); --max-prompt is {config.max_prompt}"]
    first = encode_sample(config, tokenizer, special, mix.at(0))
    return [*lines, "the first prompt as the model reads it:", folded(tokenizer, special, first)]


def folded(tokenizer, special: SpecialIds, prompt: Prompt) -> str:
    """A prompt's ids as text, those of an image as one <|image_pad|>."""
    kept = prompt.ids[:1]
    for before, token in pairwise(prompt.ids):
        if token != special.image_pad or token != before:
            kept.append(token)
    return tokenizer.decode(kept)
