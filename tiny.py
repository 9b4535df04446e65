"""What runs without GPU, hub and data? A stand-in of the same class: its tokenizer, shape, world.

A 1.5 M-parameter `Qwen2_5_VLForConditionalGeneration` for teaching and tests, never presented as
the papers' models.
"""
import math

import torch

SPECIAL_TOKENS = [  # Qwen2.5's 22 added tokens, in order (151643 … 151664 in the true vocabulary)
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>"]
QWEN_SPLIT = (  # Qwen2.5's pre-tokenizer: words, single digits, punctuation, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")

TINY = ("tiny", "tiny-untied")  # names of the stand-in with random weights
BASE = "base"  # folder of the one that sees: sft_coldstart.py --preset base
# What a longer training draws (presets.py, "base"): every task.
BASE_SCENES = "size=84x84&shapes=3&colours=3"
FEW = f"synthetic:detection?{BASE_SCENES}&objects=1-3&coloured=1"
DETECTION = f"synthetic:detection?{BASE_SCENES}&objects=1-6&coloured=1"
GROUNDING = f"synthetic:grounding?{BASE_SCENES}&distractors=1-3"
# the demo's: GRPO has the most to bring out where the right answer is among eight, not yet first
COUNTING = f"synthetic:counting?{BASE_SCENES}&objects=1-4&distractors=1-2"
OCR = "synthetic:ocr?size=84x84&objects=1-1&numbers=1"
SUMS = "synthetic:math?size=84x84&objects=2-2"
SUMS_AS_TEXT = "synthetic:math?text=1&objects=2-2"
# The cold start's example: sums of more numbers than the base adds at once, step by step, as text.
TRACES = "synthetic:math?text=1&objects=3-4&traces=1"
TINY_CORPUS = """\
You are a helpful assistant. system user assistant Output the bounding box of the in the image.
Output all the bounding boxes of the Please output bbox coordinates and names of OCR this image.
red green blue yellow purple orange cyan magenta white black gray circle square triangle cross \
star diamond
circles squares triangles crosses stars diamonds How many are there Which What is color shape \
the answer
Put your final answer within boxed option letter think answer plus minus times
I see a red circle and two coloured shapes. I see the text. I see the sum of numbers. I see no \
at the upper lower left right middle
Output the thinking process in and final answer in tags. and after it the thinking process in
Please output bbox coordinates and names of coloured shapes. What is the result of the sum in
red
green
blue"""
TINY_FRAGMENTS = (
    '[{"bbox_2d": [', '{"bbox_2d": [', '[{"point_2d": [', '{"point_2d": [', ", ", '], "label": "',
    '"}, ', '"}]', "\\boxed{", "<think>", "</think>", "<answer>", "</answer>")

# Qwen's chat format: a turn's content is text, or a list of images and texts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%} <|vision_start|><|image_pad|><|vision_end|>
{%- else -%} {{ part.text }} {%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def tiny_tokenizer():
    """A byte-level BPE of a few hundred ids with Qwen's pre-tokenizer and special tokens.

    Digits stay single as in Qwen2.5. Frequent pieces of the answer format are one token each, so
    that a box costs a dozen tokens, not three dozen, and a CPU can sample thousands of them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    core.train_from_iterator(TINY_CORPUS.splitlines() * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TINY_FRAGMENTS])
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer, *, tied: bool = True, seed: int = 0, hidden: int = 128, layers: int = 4):
    """A 1.5 M-parameter `Qwen2_5_VLForConditionalGeneration` for teaching and tests, seeded.

    Initializer range 0.06: with Qwen's 0.02 a model this small sits on a long plateau first.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    blocks = math.ceil(len(tokenizer) / 64) + 1  # at least 64 rows without a token, as in Qwen's
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=64 * blocks,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            initializer_range=0.06,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 6, 6]),
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"]),
        vision_config=dict(
            depth=3,
            hidden_size=96,
            intermediate_size=192,
            num_heads=4,
            out_hidden_size=hidden,
            fullatt_block_indexes=[2],
            window_size=112,
            initializer_range=0.06),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).float()
