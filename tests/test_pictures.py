"""pictures.py: sizes, frames, unusual and broken images, marks, drawn scenes."""

import hashlib

import numpy as np
import pytest
from PIL import Image

import pictures
from pictures import Synthetic, load_image, smart_resize
from rewards import TASKS
from sources import DrawnSource


def drawn(task, **options):
    """Samples of a drawn world, at the size that they are drawn in."""
    return DrawnSource(Synthetic(task, **options))


def test_smart_resize_worked_by_hand():
    assert smart_resize(84, 84) == (84, 84)
    assert smart_resize(100, 200) == (112, 196)  # 3.57 -> 4 and 7.14 -> 7 patches
    assert smart_resize(70, 70) == (56, 56)  # 2.5 goes to the even 2
    assert smart_resize(1, 1) == (56, 56)  # up to the least area, 56 * 56
    assert smart_resize(10, 2000) == (28, 1988)  # a thin image keeps one patch; 71.43 -> 71
    # 1080 x 1920 in 1280 patches: divided by sqrt(2073600 / 1003520) = 1.43747,
    # 751.3 / 28 = 26.8 -> 26 and 1335.7 / 28 = 47.7 -> 47 patches
    assert smart_resize(1080, 1920) == (728, 1316)
    with pytest.raises(ValueError, match="200 : 1"):
        smart_resize(1, 10_000)


def test_scaling_moves_answers_and_comes_back():
    assert pictures.scale([[10, 20], [0, 5]], (100, 50), (200, 200)) == [[20, 80], [0, 20]]
    assert pictures.scale([[1, 2, 3, 4]], (10, 10), (20, 30)) == [[2, 6, 6, 12]]
    items = [{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]
    assert pictures.scale(items, (10, 10), (20, 30)) == [{"bbox_2d": [2, 6, 6, 12], "label": "cat"}]
    assert pictures.scale([], (10, 10), (20, 30)) == []
    assert pictures.scale(7, (1, 1), (2, 2)) == 7
    assert pictures.scale([5, 6, 7, 8], (84, 84), (84, 84)) == [5, 6, 7, 8]
    box = [13.25, 7.5, 640.0, 479.0]
    there = pictures.scale(box, (641, 480), (644, 476))
    assert pictures.scale(there, (644, 476), (641, 480)) == pytest.approx(box, abs=1e-9)


def image_file(folder, mode, suffix="png", size=(40, 20), **options):
    path = folder / f"{mode.replace(';', '')}.{suffix}"
    Image.new(mode, size).save(path, **options)
    return path


def test_unusual_images_become_upright_rgb(tmp_path):
    for mode in ("CMYK.jpg", "L.png", "1.png", "P.gif", "I;16.png"):
        image = load_image(image_file(tmp_path, *mode.split(".")))
        assert (image.mode, image.size) == ("RGB", (40, 20))
    sixteen = np.full((4, 4), 257 * 100, np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "16.png")
    assert load_image(tmp_path / "16.png").getpixel((0, 0)) == (100, 100, 100)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 200])
    palette.save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (0, 0, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right when shown
    lying = Image.new("RGB", (40, 20), "white")
    lying.paste((255, 0, 0), (0, 0, 8, 20))
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = load_image(tmp_path / "lying.png")
    assert upright.size == (20, 40) and upright.getpixel((10, 2)) == (255, 0, 0)


def test_unreadable_images_are_refused_in_words(tmp_path):
    good = image_file(tmp_path, "RGB", "png", (64, 64)).read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "n.jpg")
    bomb = good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:]  # a header of 3.6 Gpixel
    wide = good[:16] + (10_000).to_bytes(4, "big") * 2 + good[24:]  # 100 Mpixel: Pillow only warns
    cut = (tmp_path / "n.jpg").read_bytes()[:900]
    cases = {"text": b"hello", "empty": b"", "cut.png": good[:60], "bomb": bomb, "wide": wide,
             "cut.jpg": cut, "chunk": good[:40] + b"!!" + good[42:]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            with pytest.raises(ValueError, match="unusable"):
                load_image(source)
    with pytest.raises(ValueError, match="mode F"):
        load_image(image_file(tmp_path, "F", "tiff"))


@pytest.mark.parametrize("size", [(56, 56), (84, 84), (448, 336)])
@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_boxes_are_tight_around_the_drawn_pixels(size, clutter):
    scenes = drawn("detection", size=size, clutter=clutter)
    for i in range(40):
        sample = scenes[i]
        pixels = np.asarray(sample.images[0])
        named = np.zeros(pixels.shape[:2], bool)
        for colour in pictures.COLOURS.values():
            named |= (pixels == colour).all(-1)
        for item in sample.answer:
            x1, y1, x2, y2 = item["bbox_2d"]
            inside = named[y1:y2, x1:x2]
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            named[y1:y2, x1:x2] = False
        assert not named.any()  # nothing of any shape lies outside of its box


def boxes_of(scene, colour):
    """Boxes of connected areas of one colour, by flood fill: an independent look at the picture."""
    from scipy import ndimage

    pixels = np.asarray(scene)
    labels, _ = ndimage.label((pixels == pictures.COLOURS[colour]).all(-1), np.ones((3, 3)))
    return [[c.start, r.start, c.stop, r.stop] for r, c in ndimage.find_objects(labels)]


def test_grounding_has_one_target_and_counting_has_them_all():
    for i in range(60):
        sample = drawn("grounding", distractors=(0, 4))[i]
        colour, shape = sample.question.split()
        assert sample.answer in boxes_of(sample.images[0], colour) and shape in pictures.SHAPES
    one_shape = drawn("counting", shapes=1, objects=(0, 5), distractors=(0, 3))
    seen = set()
    for i in range(60):  # circles only: all areas of the colour are asked for
        sample = one_shape[i]
        found = boxes_of(sample.images[0], sample.question.split()[0])
        centres = sorted([(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in found)
        assert sorted(sample.answer) == centres and sample.question.endswith(" circles")
        seen.add(len(sample.answer))
    assert seen == {0, 1, 2, 3, 4, 5}


def test_ordered_lists_the_same_objects_from_the_top_then_from_the_left():
    a, b, c = ({"bbox_2d": box, "label": "star"} for box in ([40, 5, 50, 15], [3, 5, 9, 11], [1, 30, 7, 36]))
    assert sorted([a, c, b], key=pictures.from_the_top) == [b, a, c]  # tops 5, 5, 30; lefts 3, 40
    moved = 0
    for i in range(20):
        free, ordered = (drawn("detection", objects=(2, 5), **how)[i] for how in ({}, {"ordered": 1}))
        assert free.images[0].tobytes() == ordered.images[0].tobytes()
        tops = [item["bbox_2d"][1] for item in ordered.answer]
        assert tops == sorted(tops)
        assert all(item in free.answer for item in ordered.answer) and len(free.answer) == len(tops)
        moved += free.answer != ordered.answer
    assert moved > 10


def test_printed_words_and_sums():
    page = drawn("ocr", size=(448, 336), objects=(3, 3))[0]
    assert len(page.answer.split("\n")) == 3
    assert set(page.answer.split()) <= set(pictures.WORDS)
    assert (np.asarray(page.images[0]) < 100).any()
    for i in range(20):
        sample = drawn("math", text=1, objects=(2, 3))[i]
        assert sample.images == ()
        first, *rest = sample.question.removeprefix("What is ").removesuffix("?").split()
        total = int(first)
        for sign, number in zip(rest[::2], rest[1::2]):
            total += int(number) if sign == "+" else -int(number)
        assert str(total) == sample.answer
    printed = drawn("math")[0]
    assert printed.images and int(printed.answer) is not None


@pytest.mark.parametrize("task", TASKS[:-1])
@pytest.mark.parametrize("size", [(56, 56), (1920, 1080), (300, 60)])
def test_every_task_at_every_size(task, size):
    sample = drawn(task, size=size, clutter=0.5)[3]
    assert all(side % 28 == 0 for side in sample.image_size)
    low, high = sample.image_size[0] / size[0], sample.image_size[1] / size[1]
    assert 0.6 < low < 2 and 0.6 < high < 2


def test_scenes_are_functions_of_seed_split_options_and_index():
    def look(**options):
        sample = drawn("grounding", **options)[7]
        return sample.question, tuple(sample.answer), sample.images[0].tobytes()

    same = look(), look(count=9), look(split="train")
    assert same[0] == same[1] == same[2]
    others = look(seed=1), look(split="heldout"), look(distractors=(1, 4)), look(clutter=0.1)
    assert len({look(), *others}) == 5
    with pytest.raises(IndexError):
        drawn("ocr", count=3)[3]


def test_draw_marks_boxes_and_points_and_survives_nonsense():
    image = Image.new("RGB", (84, 84), "white")
    said, true = [[10, 10, 40, 40]], [20, 20, 60, 60]
    sheet = pictures.draw(image, predicted=said, true=true, caption="red block")
    assert sheet.width == 420 and sheet.height > 420  # five-fold, and a line of text
    assert sheet.getpixel((5 * 10, 5 * 20)) == (255, 0, 192)  # left edge of the predicted box
    assert sheet.getpixel((5 * 60, 5 * 50)) == (0, 208, 255)  # right edge of the true one
    sheet = pictures.draw(image, predicted=[[42, 42]])
    assert sheet.size == (420, 420) and sheet.getpixel((210 - 2 * 2, 210)) == (255, 0, 192)
    odd = [[float("nan"), 1, 2, 3], [float("inf"), 5], [9, 9, -1e300, 10**400], "text", 7, None]
    pictures.draw(image, predicted=odd, true=[{"bbox_2d": [1, 2, 3, 4], "label": "x"}])
    assert image.getcolors() == [(84 * 84, (255, 255, 255))]  # the sample's own image is untouched


@pytest.mark.parametrize("world, known", [
    (dict(task="grounding"), "9c9645259b177f63"),
    (dict(task="counting", size=(448, 336), clutter=1.0, seed=3, split="heldout"), "853bdf50b4c49aa0"),
    (dict(task="detection", objects=(3, 6), shapes=4, colours=3), "1380f4d17dab5551"),
    (dict(task="ocr", size=(300, 200), objects=(2, 3)), "0251ea8584cd1930"),
    (dict(task="math", size=(84, 56)), "bca9e51a0d857b22"),
    (dict(task="math", text=1, objects=(2, 4)), "db5fefcf6d48f522"),
])
def test_the_same_seed_draws_the_same_scenes_as_ever(world, known):
    """SHA-256 of questions, answers and pixels of items 0, 7, 99, taken on 2026-11-28, of printed ones on 2026-11-29 (Pillow's own font)."""
    content = hashlib.sha256()
    for item in (0, 7, 99):
        question, answer, images = Synthetic(**world).draw(item)
        content.update(repr((question, answer)).encode())
        for image in images:
            content.update(image.tobytes())
    assert content.hexdigest()[:16] == known


def test_grey_has_the_size_and_nothing_else():
    grey = pictures.grey(Image.new("RGB", (84, 56), "red"))
    assert (grey.mode, grey.getcolors()) == ("RGB", [(84 * 56, (128, 128, 128))])
    assert grey.size == (84, 56)


def test_a_broken_image_from_bytes_is_named_by_its_length():
    with pytest.raises(ValueError) as error:
        load_image(b"\x00\x01" * 50)
    assert str(error.value) == "image of 100 bytes is unusable, replace it: no picture, or damaged"


def test_traces_are_of_sums_as_text_only():
    with pytest.raises(ValueError, match="traces=1 goes with"):
        Synthetic("math", traces=1)


@pytest.mark.parametrize("task, option", [
    ("counting", "coloured"), ("grounding", "ordered"), ("math", "numbers"), ("ocr", "text"), ("detection", "traces")])
def test_an_option_of_another_task_is_refused(task, option):
    with pytest.raises(ValueError, match=f"{option}=1 is an option of"):
        Synthetic(task, **{option: 1})


def test_drawn_detection_names_colours_and_drawn_text_holds_numbers_if_asked():
    plain, named = Synthetic("detection"), Synthetic("detection", coloured=1)
    for item in range(3):
        _, found, (image,) = plain.draw(item)
        question, again, (same,) = named.draw(item)
        assert question == "coloured shapes" and image.tobytes() == same.tobytes()
        for one, other in zip(found, again, strict=True):
            colour, shape = other["label"].split()
            assert (one["bbox_2d"], one["label"]) == (other["bbox_2d"], shape)
            x1, y1, x2, y2 = other["bbox_2d"]
            assert pictures.COLOURS[colour] in {colour for _, colour in same.crop((x1, y1, x2, y2)).getcolors()}
    texts = [Synthetic("ocr", objects=(1, 1), numbers=1).draw(item)[1] for item in range(40)]
    numbers = [text for text in texts if text.isdigit()]
    assert 8 < len(numbers) < 32 and {*texts} - {*numbers} <= {*pictures.WORDS}
