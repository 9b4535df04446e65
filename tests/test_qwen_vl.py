"""Ids, patches and positions against Hugging Face's processor and get_rope_index."""
import pytest
import ranks
import torch
from conftest import ROOT
from references import noise_image

import qwen_vl
from qwen_vl import SpecialIds, encode_chat


def test_patches_equal_the_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for width, height in ((84, 84), (56, 140), (280, 28)):
        image = noise_image(width, height, width)
        want = Qwen2VLImageProcessorPil(do_resize=False)([image], return_tensors="pt")
        pixels, grid = qwen_vl.patchify(image)
        assert list(grid) == want["image_grid_thw"][0].tolist()
        torch.testing.assert_close(pixels, want["pixel_values"], atol=1e-6, rtol=0)


def test_patchify_refuses_sides_that_are_no_multiple_of_28():
    with pytest.raises(ValueError, match="90×84"):
        qwen_vl.patchify(noise_image(90, 84, 0))


def test_positions_of_a_hand_worked_prompt():
    # two text tokens, a 4×6-patch image (2×3 tokens), one text token: text 0 1, image from 2, next at 2 + 3
    positions, after = qwen_vl.rope_positions([2, (1, 4, 6), 1])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert after == 6


def test_positions_equal_get_rope_index(world):
    _, twin, _, _, prompts = world
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        kinds = torch.zeros_like(ids)
        kinds[0, prompt.image_slots] = 1
        grids = torch.tensor(prompt.grids) if prompt.grids else None
        want, delta = twin.model.get_rope_index(ids, kinds, image_grid_thw=grids)
        torch.testing.assert_close(prompt.positions_3L, want[:, 0])
        assert prompt.next_position == len(prompt.ids) + delta.item()


def test_image_token_text_in_a_question_stays_text(world):
    _, _, tokenizer, special, _ = world
    prompt = encode_chat(tokenizer, special, "what is <|image_pad|><|im_end|>?", [noise_image(56, 56, 0)])
    assert prompt.ids.count(special.image_pad) == 4 == len(prompt.image_slots)
    assert prompt.ids.count(special.im_end) == 2  # system and user turn
    assert "<|image_pad|><|im_end|>?" in tokenizer.decode(prompt.ids)


def test_a_tokenizer_without_a_needed_id_is_refused(world):
    _, twin, *_ = world

    class Lacking:
        def get_vocab(self):
            return {"<|im_start|>": 0}

    with pytest.raises(ValueError, match=r"<\|image_pad\|>"):
        SpecialIds.read(Lacking(), twin.config)


@pytest.mark.parametrize("question, layout", [
    ("no marker", "{}{}no marker"),
    ("\n  starts with white space", "{}{}\n  starts with white space"),
    ("<image>left, <image> right", "{}left, {} right"),
    ("Compare\n<image><image>", "Compare\n{}{}"),
    ("a <image> b <image> <b>c</b>", "a {} b {} <b>c</b>"),
])
def test_images_stand_where_the_question_says(world, question, layout):
    """Ids, patches and positions as Hugging Face's processors make them of the turn that Qwen's template writes."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    _, twin, tokenizer, special, _ = world
    images = [noise_image(84, 56, 1), noise_image(56, 112, 2)]
    pixels = Qwen2VLImageProcessorPil(do_resize=False)(images, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
    # 84×56 pixels are 3·2 tokens, 56×112 are 2·4
    slots = [f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in (6, 8)]
    turn = (f"<|im_start|>system\n{qwen_vl.SYSTEM}<|im_end|>\n<|im_start|>user\n{layout.format(*slots)}<|im_end|>\n"
            "<|im_start|>assistant\n")
    want = tokenizer(turn, return_tensors="pt")["input_ids"]
    prompt = encode_chat(tokenizer, special, question, images)
    assert prompt.ids == want[0].tolist()
    assert prompt.grids == ((1, 4, 6), (1, 8, 4))
    torch.testing.assert_close(prompt.pixels_ND, pixels["pixel_values"], atol=1e-6, rtol=0)
    kinds = torch.zeros(1, len(prompt.ids), dtype=torch.long)
    kinds[0, prompt.image_slots] = 1
    positions, delta = twin.model.get_rope_index(want, kinds, image_grid_thw=pixels["image_grid_thw"])
    assert torch.equal(prompt.positions_3L, positions[:, 0])
    assert prompt.next_position == len(prompt.ids) + delta.item()


@pytest.mark.parametrize("question, images", [("<image> and <image>", 1), ("<image>", 0), ("<image>", 2)])
def test_markers_without_their_images_are_refused(world, question, images):
    _, _, tokenizer, special, _ = world
    with pytest.raises(ValueError, match=f"{question.count('<image>')} times and comes with {images} images"):
        encode_chat(tokenizer, special, question, [noise_image(56, 56, 0)] * images)


def test_rewards_see_special_tokens_but_no_stop_token(alone):
    run = ranks.make_run(alone)
    ids = run.tokenizer.encode("<|box_start|>(1,2),(3,4)<|box_end|>", add_special_tokens=False)
    text = qwen_vl.decode(run.tokenizer, run.special, [*ids, run.special.im_end])
    assert text == "<|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("weights", [True, False])
def test_a_checkpoint_is_read_in_the_dtype_asked_for_and_draws_no_random_weights(tmp_path, name, weights):
    written, tokenizer = qwen_vl.load(name)
    written.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    read, _ = qwen_vl.load(str(tmp_path), weights=weights, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    want = dict(written.named_parameters())
    assert dict(read.named_parameters()).keys() == want.keys()
    for parameter_name, parameter in read.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.shape == want[parameter_name].shape
        if weights:
            assert torch.equal(parameter, want[parameter_name].bfloat16()), parameter_name
    buffers = dict(written.named_buffers())
    assert dict(read.named_buffers()).keys() == buffers.keys()
    for buffer_name, buffer in read.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, buffers[buffer_name]), buffer_name


@pytest.mark.parametrize("weights", [True, False])
def test_the_tower_is_read_in_a_dtype_of_its_own(weights):
    """From base/, whose weights have the hub's names; the values are those of all read in fp32, then cast."""
    name = str(ROOT / "base")
    plain, _ = qwen_vl.load(name)
    read, _ = qwen_vl.load(name, weights=weights, vision_dtype=torch.bfloat16)
    assert type(read) is type(plain) and read.lm_head.weight is read.model.language_model.embed_tokens.weight
    want = dict(plain.named_parameters())
    assert dict(read.named_parameters()).keys() == want.keys()
    for parameter_name, parameter in read.named_parameters():
        dtype = torch.bfloat16 if parameter_name.startswith("model.visual.") else torch.float32
        assert parameter.dtype == dtype and parameter.shape == want[parameter_name].shape
        assert not weights or torch.equal(parameter, want[parameter_name].to(dtype)), parameter_name
    for buffer_name, buffer in plain.named_buffers():
        assert torch.equal(read.get_buffer(buffer_name), buffer), buffer_name
