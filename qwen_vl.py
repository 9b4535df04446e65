"""What does Qwen2.5-VL read? Text and image in, ids, patches and positions out; load a checkpoint.

§1 special ids · §2 image and prompt · §3 a prompt and its completions · §4 load

Shapes, as suffixes: L tokens of a prompt, N image patches, V vocabulary, D width.
"""
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import DataError
from formats import IMAGE_MARK
from tiny import TINY, tiny_model, tiny_tokenizer

PATCH, MERGE = 14, 2  # a patch is 14×14 pixels; 2×2 patches become one image token (28×28 pixels)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in preprocessor_config.json
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = "You are a helpful assistant."  # Qwen's default, also Perception-R1's  [PR1 code]


# §1 ────────────────────────────────────── special ids ───────────────────────────────────────
@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning, read from a checkpoint's tokenizer and config, never assumed."""

    im_start: int
    im_end: int
    image_pad: int
    vision_start: int
    vision_end: int
    pad: int
    stops: tuple[int, ...]  # a completion ends with any of these
    banned_V: torch.Tensor  # True where an id is never sampled and never scored, [V] bool

    @staticmethod
    def read(tokenizer, config=None) -> "SpecialIds":
        """Without the model's config: what the tokenizer alone says, enough to encode a prompt.

        Errors: DataError naming a token that the tokenizer lacks or numbers otherwise.
        """
        id_of = tokenizer.get_vocab()
        needed = ("im_start", "im_end", "image_pad", "vision_start", "vision_end", "endoftext")
        missing = [f"<|{name}|>" for name in needed if f"<|{name}|>" not in id_of]
        if missing:
            raise DataError(f"the tokenizer lacks {', '.join(missing)}: no Qwen2.5-VL tokenizer")
        image_pad = id_of["<|image_pad|>"]
        model_pad, vocabulary = image_pad, len(tokenizer)
        if config is not None:
            model_pad = config.image_token_id
            vocabulary = config.text_config.vocab_size
        if image_pad != model_pad:
            raise DataError(
                f"<|image_pad|> is {image_pad} in the tokenizer and {model_pad} "
                "in the model's config: they do not belong together")
        return SpecialIds(
            im_start=id_of["<|im_start|>"],
            im_end=id_of["<|im_end|>"],
            image_pad=image_pad,
            vision_start=id_of["<|vision_start|>"],
            vision_end=id_of["<|vision_end|>"],
            pad=id_of["<|endoftext|>"],
            stops=(id_of["<|im_end|>"], id_of["<|endoftext|>"]),
            banned_V=banned_ids(id_of, vocabulary))


def banned_ids(id_of: dict[str, int], vocabulary: int) -> torch.Tensor:
    """True where an id is never sampled: placeholders, and ids without a token. [V] bool.

    A sampled placeholder would be taken for an image slot by the next forward pass; and Qwen's
    embedding has 151,936 rows for 151,665 tokens.
    """
    banned_V = torch.zeros(vocabulary, dtype=torch.bool)
    for kind in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad"):
        if f"<|{kind}|>" in id_of:
            banned_V[id_of[f"<|{kind}|>"]] = True
    first_unused = max(id_of.values()) + 1
    banned_V[first_unused:] = True
    return banned_V


def decode(tokenizer, special: SpecialIds, tokens: list[int]) -> str:
    """A completion's text. Stop ids go; other special tokens stay: Qwen2-VL puts boxes in them."""
    kept = [token for token in tokens if token not in special.stops]
    return tokenizer.decode(kept, skip_special_tokens=False)


# §2 ──────────────────────────────────── image and prompt ────────────────────────────────────
def patchify(image) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An RGB image → (pixels [N, 3·2·14·14], grid (1, H/14, W/14)), as Qwen2VLImageProcessor does.

    Patches are ordered so that the 2×2 that merge into one image token lie together. The image is
    taken as a video of two equal frames (the patch embedding spans two): the factor 2 and the 1.
    Errors: ValueError if a side is not a multiple of 28 (resize once, in sources.py).
    """
    width, height = image.size
    token_side = PATCH * MERGE
    if width % token_side or height % token_side:
        raise ValueError(f"image is {width}×{height}; sides must be multiples of {token_side}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0  # [height, width, 3]
    pixels = (pixels - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)

    rows, columns = height // PATCH, width // PATCH
    down, across = rows // MERGE, columns // MERGE
    # [row/2, 2, 14, column/2, 2, 14, channel] → [row/2, column/2, 2, 2, channel, 14, 14]
    blocks = pixels.reshape(down, MERGE, PATCH, across, MERGE, PATCH, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    frame = blocks.reshape(-1, 3, 1, PATCH, PATCH)
    two_frames = np.repeat(frame, 2, axis=2)
    pixels_ND = torch.from_numpy(two_frames).flatten(1)
    return pixels_ND, (1, rows, columns)


def rope_positions(kinds: list, start: int = 0) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of text runs and images in order: ([3, L] int64, next free position).

    `kinds` holds an int (a run of so many text tokens) or a grid (t, h, w) in patches.
    Text: all three rows count on. Image: row 0 (time) stands still, rows 1 and 2 are the token's
    row and column, what follows starts after the longer side.  [Qwen2-VL, arXiv 2409.12191 §2.1]
    """
    parts = []
    for kind in kinds:
        if isinstance(kind, int):
            parts.append(torch.arange(start, start + kind).expand(3, kind))
            start += kind
        else:
            _, height, width = kind
            rows, columns = height // MERGE, width // MERGE
            row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
            time = torch.zeros_like(row)
            parts.append(start + torch.stack([time, row, column]))
            start += max(rows, columns)
    return torch.cat(parts, dim=1), start


@dataclass
class Prompt:
    """One chat turn, ready for the model. Image slots are already expanded in `ids`."""

    ids: list[int]
    positions_3L: torch.Tensor
    next_position: int  # where a completion starts
    image_slots: list[int] = field(default_factory=list)  # indices of ids that are image tokens
    pixels_ND: torch.Tensor | None = None
    grids: tuple = ()  # one (1, h, w) an image, in patches
    features_ID: torch.Tensor | None = None  # a frozen tower's, kept by the sampler for training


def encode_chat(tokenizer, special: SpecialIds, text: str, images=(), system=SYSTEM) -> Prompt:
    """System and user turn in Qwen's chat format, up to where the assistant speaks.

    An image stands where the text says "<image>"; without any marker all images come before the
    text [PR1 code]. All else in `text` is plain text: a literal "<|image_pad|>" or "<|im_end|>" in
    a question stays characters and never becomes an image slot.
    Errors: DataError if there are some markers, but not as many as images.
    Plain twin: the turn as Qwen's chat template writes it, through Hugging Face's processors.
    """
    plain = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    first, *others = split_at_images(text, len(images))
    start, end = [special.im_start], [special.im_end]
    ids = start + plain(f"system\n{system}") + end + plain("\n")
    ids += start + plain(f"user\n{first}")
    kinds, slots, pixels, grids = [], [], [], []
    text_since = 0
    for image, text_after in zip(images, others):
        pixels_ND, grid = patchify(image)
        pixels.append(pixels_ND)
        grids.append(grid)
        ids.append(special.vision_start)
        kinds += [len(ids) - text_since, grid]
        count = len(pixels_ND) // MERGE**2
        slots += range(len(ids), len(ids) + count)
        ids += [special.image_pad] * count
        text_since = len(ids)
        ids.append(special.vision_end)
        ids += plain(text_after)
    ids += end + plain("\n") + start + plain("assistant\n")
    kinds.append(len(ids) - text_since)
    positions_3L, next_position = rope_positions(kinds)
    all_pixels_ND = torch.cat(pixels) if pixels else None
    return Prompt(ids, positions_3L, next_position, slots, all_pixels_ND, tuple(grids))


def split_at_images(text: str, images: int) -> list[str]:
    """The text before the first image, and behind each one: images + 1 pieces."""
    pieces = text.split(IMAGE_MARK)
    marks = len(pieces) - 1
    if marks == 0:
        return [""] * images + [text]
    if marks != images:
        raise DataError(
            f"the question says {IMAGE_MARK} {marks} times and comes with {images} images: name "
            "each image once, or none, and they come first")
    return pieces


# §3 ────────────────────────────────────────── groups ─────────────────────────────────────────
@dataclass
class Completion:
    """One rollout: what was sampled, and what it earned."""

    tokens: list[int]  # with the stop token, unless truncated
    logps: list[float] = field(default_factory=list)  # of each token, as it was sampled
    truncated: bool = False  # cut at the length limit
    text: str = ""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Group:
    """A prompt and its completions; `row` is the first one's number among a batch's B rollouts."""

    prompt: Prompt
    completions: list[Completion]
    row: int = 0
    sample: Any = None  # the sources.Sample behind the prompt
    draw: int = 0  # its place in the run's global order

    @property
    def rewards(self) -> list[float]:
        return [completion.reward for completion in self.completions]


# §4 ────────────────────────────────────────── load ──────────────────────────────────────────
def load_tokenizer(name: str):
    """The tokenizer of a model that `load` knows. Errors: DataError, as `check_model`."""
    from transformers import AutoTokenizer

    if name in TINY:
        return tiny_tokenizer()
    check_model(name)
    return AutoTokenizer.from_pretrained(name)


def check_model(name: str) -> None:
    """Errors: DataError, at once and not after a library's retries, if there is no such model."""
    if name in TINY:
        return
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise DataError(f"--model {name} has no config.json: of a run, give RUN/model")
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise DataError(f"--model {name}: no such folder, and no name OWNER/MODEL of the hub")
    import huggingface_hub

    found = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    advice = "give the folder of a model, or set HF_HOME to where the hub's files are kept"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        if not found:
            raise DataError(f"--model {name} is not on this machine (HF_HUB_OFFLINE): {advice}")
        return
    token = huggingface_hub.get_token()
    head = {"Authorization": f"Bearer {token}"} if token else {}
    hub = huggingface_hub.constants.ENDPOINT
    try:
        call = urllib.request.Request(f"{hub}/api/models/{name}", headers=head)
        urllib.request.urlopen(call, timeout=10).close()
    except urllib.error.HTTPError as error:
        raise DataError(f"--model {name}: {hub} says {error.code} {error.reason}: is the name "
                        "right, and does HF_TOKEN give access?") from None
    except OSError as error:
        if found:
            advice = "set HF_HUB_OFFLINE=1: it is on this machine"
        raise DataError(f"--model {name}: {hub} can not be reached ({error}); {advice}") from None


def load(name: str, *, weights: bool = True, dtype: torch.dtype = torch.float32,
         vision_dtype: torch.dtype | None = None, seed: int = 0):
    """(model, tokenizer) of "tiny", "tiny-untied", a hub id or a local directory.

    dtype: of the weights, vision_dtype: of the tower's, if another. They are read into it one by
    one; buffers, the angles, stay fp32. weights=False builds the same modules without touching the
    weights' memory: for ranks other than 0, which broadcasts. Weights are read from safetensors
    only. Errors: DataError if no Qwen2.5-VL.
    """
    from transformers import AutoConfig, AutoTokenizer

    vision_dtype = vision_dtype or dtype
    if name in TINY:
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, tied=name == "tiny", seed=seed)
        for parameter, kept in kept_dtypes(model, dtype, vision_dtype):
            parameter.data = parameter.data.to(kept)
        return model, tokenizer
    check_model(name)
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "qwen2_5_vl":
        raise DataError(f"{name} is a {config.model_type}: give a Qwen2.5-VL checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if weights:
        return read_network(name, dtype, vision_dtype), tokenizer
    return empty_network(config, dtype, vision_dtype), tokenizer


def kept_dtypes(model, dtype: torch.dtype, vision_dtype: torch.dtype):
    """Yields (parameter, its dtype): vision_dtype if it is the tower's, else dtype."""
    for name, parameter in model.named_parameters():
        in_tower = name.startswith("model.visual.")
        yield parameter, vision_dtype if in_tower else dtype


def empty_network(config, dtype: torch.dtype, vision_dtype: torch.dtype):
    """Buffers have values, weights have none."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Network
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = Network(config)
    model.tie_weights()  # which no_init_weights leaves out
    for parameter, kept in kept_dtypes(model, dtype, vision_dtype):
        parameter.data = torch.empty_like(parameter, dtype=kept)
    return model


def read_network(name: str, dtype: torch.dtype, vision_dtype: torch.dtype):
    """from_pretrained takes one dtype, but reads a weight into the one that it was built in: so no
    weight is ever held in another. Plain twin: all read in fp32, then cast."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Network

    class Built(Network):
        def __init__(self, config):
            super().__init__(config)  # without memory as yet
            for parameter, kept in kept_dtypes(self, dtype, vision_dtype):
                parameter.data = parameter.data.to(kept)
            self.__class__ = Network  # by whose name the hub's names of weights are translated

    return Built.from_pretrained(name, dtype=dtype, use_safetensors=True)
