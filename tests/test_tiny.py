"""tiny.py: the stand-in's tokenizer, shape and weights, and the worlds it is trained on."""
import re

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import pictures
import rewards
import tiny
from data import open_data

WORLDS = (
    tiny.FEW, tiny.DETECTION, tiny.GROUNDING, tiny.COUNTING, tiny.OCR, tiny.SUMS, tiny.SUMS_AS_TEXT,
    tiny.TRACES)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


# ── the tokenizer ──
def test_a_box_costs_a_token_a_digit_and_few_others(tokenizer):
    text = '[{"bbox_2d": [12, 34, 56, 78], "label": "red circle"}]'
    assert pieces(tokenizer, text) == [
        '[{"bbox_2d": [', "1", "2", ", ", "3", "4", ", ", "5", "6", ", ", "7", "8", '], "label": "',
        "red", " circle", '"}]']


@pytest.mark.parametrize("text", [
    "<think>3 + 15 = 18.</think><answer>\\boxed{18}</answer>", "Wörter, die nie vorkamen: 中文 \U0001f600",
    "  two  blanks\n\n\ttab\r\n", '{"point_2d": [1.5, 22]}, ', ""])
def test_any_text_is_read_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_qwens_22_special_tokens_are_special_and_a_fragment_is_text(tokenizer):
    assert len(tokenizer) < 640  # "a few hundred"
    # in the true vocabulary <|endoftext|> is 151643, <|im_end|> 151645, <|image_pad|> 151655
    assert [tiny.SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("endoftext", "im_end", "image_pad")] == [0, 2, 12]
    assert len(tiny.SPECIAL_TOKENS) == 22
    for name in tiny.SPECIAL_TOKENS:
        (token,) = tokenizer.encode(name)
        assert tokenizer.decode([token], skip_special_tokens=True) == ""
    for text in tiny.TINY_FRAGMENTS:
        (token,) = tokenizer.encode(text)
        assert tokenizer.decode([token], skip_special_tokens=True) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_tokenizer_is_the_same_each_time(tokenizer):
    assert tiny.tiny_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_chat_template_writes_qwens_turns(tokenizer):
    turns = [{"role": "system", "content": "Be brief."},
             {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
        "<|im_start|>assistant\n")


# ── the model ──
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_qwens_class_with_a_million_and_a_half_weights(tokenizer, tied):
    model = tiny.tiny_model(tokenizer, tied=tied)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert 1_400_000 < sum(weight.numel() for weight in model.parameters()) < 1_600_000
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (embedding is head) == tied
    assert len(embedding) % 64 == 0 and len(embedding) >= len(tokenizer) + 64  # rows without a token, as in Qwen's
    # 0.02, Qwen's, would keep it on a plateau
    assert embedding.std().item() == pytest.approx(0.06, rel=0.02)


def test_weights_follow_from_the_seed_and_nothing_else_is_drawn(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = tiny.tiny_model(tokenizer, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = tiny.tiny_model(tokenizer, seed=1).state_dict()
    other = tiny.tiny_model(tokenizer, seed=2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_width_and_depth_can_be_chosen(tokenizer):
    model = tiny.tiny_model(tokenizer, hidden=192, layers=2)
    assert len(model.model.language_model.layers) == 2
    assert model.get_input_embeddings().weight.shape[1] == 192


# ── the worlds ──
def drawn(spec, count=20, **options):
    mix = open_data([spec], **options)
    return [mix.at(index) for index in range(count)]


@pytest.mark.parametrize("spec", WORLDS)
def test_a_world_draws_its_task_the_same_for_a_seed_and_others_held_out(spec):
    def look(**options):
        found = drawn(spec, **options)
        return [(s.question, s.answer, [image.tobytes() for image in s.images]) for s in found]

    task = re.match(r"synthetic:(\w+)", spec)[1]
    for sample in drawn(spec):
        assert sample.task == task
        assert len(sample.images) == (0 if "text=1" in spec else 1)
        if sample.images:
            side = int(re.search(r"size=(\d+)x", spec)[1])
            assert sample.image_size == (side, side)  # drawn so that nothing is resized
        said = rewards.reference(task, sample.answer, sample.question)
        assert rewards.correct(task, said, sample.answer, sample.image_size) == 1
    seen = look()
    assert look() == seen and look(seed=1) != seen and look(split="heldout") != seen


def test_every_task_that_is_drawn_has_a_world():
    assert {re.match(r"synthetic:(\w+)", spec)[1] for spec in WORLDS} == set(pictures.DRAWN)


def test_traces_add_more_numbers_than_the_base_adds_at_once():
    """By what is written: the base sees sums of two, a trace's question has three or four, added one by one."""
    for spec in (tiny.SUMS, tiny.SUMS_AS_TEXT):
        for sample in drawn(spec.replace("size=84x84", "text=1")):
            assert re.fullmatch(r"What is -?\d+ [+-] \d+\?", sample.question)
    for sample in drawn(tiny.TRACES):
        assert re.fullmatch(r"What is -?\d+( [+-] \d+){2,3}\?", sample.question)
        later = len(re.findall(r" [+-] \d+", sample.question))
        thought, _, answer = sample.response.partition("</think>")
        assert thought.count(" = ") == 2 * later  # each step, and each step undone
        assert answer == f"<answer>\\boxed{{{sample.answer}}}</answer>"


def test_the_demos_scenes_hold_one_to_four_of_what_is_counted_among_others():
    counts = [len(sample.answer) for sample in drawn(tiny.COUNTING, 100)]
    assert set(counts) == {1, 2, 3, 4}
    assert {sample.question.split()[0] for sample in drawn(tiny.COUNTING, 100)} == {"red", "green", "blue"}
