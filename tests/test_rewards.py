"""rewards.py: worked constants, naive loops in plain Python. Attacks: test_reward_attacks.py."""

import itertools
import json
import math
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import behaviours
import data as datasets
import protocols
import rewards
import training
from readers import COCO_NAMES
from reward_function import call_reward
from rewards import correct, prompt, reference, score

SCRIPT = Path(rewards.__file__)
THINKING = "<think>Let me look.</think><answer>{}</answer>"


def boxes(*items):
    return json.dumps([{"bbox_2d": list(box), "label": label} for *box, label in items])


UNREADABLE = "<|object_ref_start|>a<|object_ref_end|><|box_start|>here<|box_end|>"


def points(*items):
    return json.dumps([{"point_2d": list(point), "label": "x"} for point in items])


def tokens(*items, stop="<|im_end|>"):
    blocks = "".join(f"<|box_start|>({a},{b}),({c},{d})<|box_end|>" for a, b, c, d in items)
    return f"<|object_ref_start|>the cat<|object_ref_end|>{blocks}{stop}"


def total(*args, **options):
    return pytest.approx(score(*args, **options).total, abs=1e-9)


# ---- prompts and references ----


def test_prompts_are_the_papers():
    assert prompt("grounding", "cat") == "Output the bounding box of the cat in the image."
    assert prompt("counting", "cats") == "Output all the bounding boxes of the cats"
    assert prompt("ocr") == "OCR this image."
    listed = prompt("detection")
    assert listed.startswith("Please output bbox coordinates and names of person, bicycle, car, ")
    assert listed.endswith(", hair drier, toothbrush.")
    assert prompt("math", "1+{1}?").startswith("1+{1}?\n")  # braces in a question are text
    assert prompt("grounding", "cat", think=True).startswith(
        "Output the bounding box of the cat in"
    )
    assert "<answer> </answer>" in prompt("grounding", "cat", think=True)


OBJECTS = [
    {"bbox_2d": [0, 0, 10, 10], "label": "cat"},
    {"bbox_2d": [20, 20, 30, 30], "label": "dog"},
]


@pytest.mark.parametrize(
    ("task", "answer", "full"),
    [
        ("grounding", [1, 2, 30, 40], 2),  # format + IoU
        ("counting", [[1, 2], [30, 40]], 1),
        ("counting", [], 1),
        ("counting", 3, 1),
        ("detection", OBJECTS, 3),
        ("detection", [], 3),
        ("ocr", "two  words", 1),
        ("math", r"\frac{1}{2}", 1),
        ("choice", "C", 1),
    ],
)
def test_reference_earns_the_full_reward(task, answer, full):
    said = reference(task, answer, "cat")
    assert score(task, said, answer, [100, 100]).total == full
    assert correct(task, said, answer, [100, 100]) == 1
    extra = task not in ("math", "choice")  # where the format weighs nothing
    for think in (True, "before", "after"):
        thought = reference(task, answer, "cat", think=think)
        assert score(task, thought, answer, [100, 100], think=think).total == full + extra
        assert correct(task, thought, answer, [100, 100], think=think) == 1


def test_reference_says_what_it_sees():
    said = reference("ocr", "word", "", think="after")
    assert said == "<answer>word</answer><think>I see a line of text.</think>"
    objects = [{"bbox_2d": [0, 0, 9, 9], "label": label} for label in ("cat", "dog", "cup")]
    said = reference("detection", objects, "", think=True)
    assert said.startswith("<think>I see a cat, a dog and a cup.</think>")
    said = reference("counting", [[1, 1], [2, 2]], "cats", think=True)
    assert said.startswith("<think>I see 2 cats.</think>")
    said = reference("choice", "b", "Is it round?\nA. yes\nB. no", think=True)
    assert said == "<think>I see a question.</think><answer>B</answer>"
    said = reference("grounding", [0.4, 0, 9.6, 9], "cat", think=True)
    assert said.startswith("<think>I see the cat.</think><answer>[{")


def test_reference_shows_no_behaviour():
    """Imitation must not teach what is counted as a behaviour later."""
    for task, answer, _ in RIGHT:
        question = "cat" if task in ("grounding", "counting") else "To find x, we need to check it."
        for think in (True, "after"):
            row = {"completion": reference(task, answer, question, think=think)}
            counts = [behaviours.lexicon_count(name, row) for name in behaviours.BEHAVIOURS]
            assert sum(counts) == 0, row


# ---- grounding ----


@pytest.mark.parametrize(
    ("said", "form", "iou"),
    [
        # the true box is [0, 0, 10, 20], of area 200
        ("[0, 0, 10, 10]", 1, 0.5),  # 100 of 200
        ("[0, 0, 10, 20]", 1, 1),
        (boxes((0, 10, 10, 30, "cat")), 1, 1 / 3),  # 100 of 200 + 200 - 100
        ("```json\n" + boxes((0, 0, 10, 10, "cat")) + "\n```", 1, 0.5),
        ("<answer>[0, 0, 10, 10]</answer>", 1, 0.5),
        ("The cat is at [0, 0, 10, 10].", 0, 0.5),  # a box, but not the form
        ("(0, 0, 10, 10)", 0, 0.5),
        ("(0,0),(10,10)", 0, 0.5),
        ("[0.0, 0.0, 10.0, 10.0]", 1, 0.5),
        ("[0, 0, 10, 10] or [0, 0, 10, 20]", 0, 0.5),  # the first one counts
        ('[{"label": "[9, 9, 9, 9]", "bbox_2d": [0, 0, 10, 10]', 0, 0.5),  # cut short
        # a box that is there is found, whatever its key and nesting
        ("[[0, 0, 10, 10]]", 0, 0.5),
        ('[{"bbox": [0, 0, 10, 10]}]', 0, 0.5),
        ('[{"bbox": [0, 0, 10, 10]', 0, 0.5),
        ('{"cat": {"box": [0, 0, 10, 10]}}', 0, 0.5),
        (points((5, 5)), 0, 0),
        ("I see no cat.", 0, 0),
        ("", 0, 0),
    ],
)
def test_grounding(said, form, iou):
    result = score("grounding", said, [0, 0, 10, 20], [28, 28])
    assert result.parts == pytest.approx({"format": form, "iou": iou})
    assert result.total == pytest.approx(form + iou)


def test_grounding_options():
    answer = [0, 0, 10, 20]
    assert total("grounding", "[0, 0, 10, 10]", answer, iou_power=2) == 1.25  # 1 + 0.5²
    assert total("grounding", "[0, 0, 10, 10]", answer, format_weight=0.2) == 0.7
    assert total("grounding", "[0, 0, 10, 10]", answer, truncated=True) == 0.5
    assert total("grounding", "[0, 0, 10, 10]", "[0, 0, 10, 20]") == 1.5  # a string of JSON


def test_grounding_reads_box_tokens():
    # (0,0),(500,1000) of 1000 in a 20 x 20 image is [0, 0, 10, 20]
    assert total("grounding", tokens((0, 0, 500, 1000)), [0, 0, 10, 20], [20, 20]) == 2
    assert total("grounding", tokens((0, 0, 500, 1000), stop=""), [0, 0, 10, 20], [20, 20]) == 2
    assert (
        total("grounding", tokens((0, 0, 10, 10)), [0, 0, 10, 20]) == 1.5
    )  # without a size: as is
    # the released pattern took anything that begins with "<"
    assert total("grounding", "<garbage", [0, 0, 10, 20]) == 0


def test_a_said_box_without_area_is_0_not_an_error():
    assert score("grounding", "[5, 5, 5, 5]", [5, 5, 9, 9]).parts == {"format": 1, "iou": 0}


def test_correct_grounding_is_above_one_half():
    assert correct("grounding", "[0, 0, 10, 10]", [0, 0, 10, 20]) == 0  # exactly 0.5
    assert correct("grounding", "[0, 0, 10, 11]", [0, 0, 10, 20]) == 1


# ---- counting ----


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # true points (0, 0) and (30, 40) in an image of 30 x 40: its diagonal is 50
        (points((0, 0), (30, 40)), 1),
        (points((30, 40), (0, 0)), 1),  # any order
        (points((0, 0)), 1 / 2),
        (points((0, 0), (30, 40), (1, 1)), 2 / 3),
        (points((3, 4), (30, 40)), 0.95),  # distances 5 and 0: mean 2.5, 1 - 2.5/50
        (boxes((-3, -4, 3, 4, "x"), (28, 38, 32, 42, "x")), 1),  # by their centres
        (boxes((3, 4, -3, -4, "x"), (28, 38, 32, 42, "x")), 1),  # inverted has the same centre
        (points((0, 0), (3000, 4000)), 0),  # distances 0 and 4950: below 0 as released
        ("[]", 0),
        ("2", 0),  # points are asked for
        ("[0, 0, 30, 40]", 0),  # a bare box is grounding's
        ("There are: " + points((0, 0), (30, 40)), 0),
        ('[{"point_2d": [0, 0]}, {"point_2d": [30]}]', 0),  # one bad item fails the gate
        # other models' lists of points
        ("[[0, 0], [30, 40]]", 1),
        ('[{"x": 0, "y": 0}, {"x": 30, "y": 40}]', 1),
        ('<points x1="0" y1="0" x2="30" y2="40" alt="x">x</points>', 1),
        ('<point x="0" y="0" alt="x">x</point>', 1 / 2),
        ('I see <point x="0" y="0" alt="x">x</point>', 0),
    ],
)
def test_counting(said, expected):
    result = score("counting", said, [[0, 0], [30, 40]], [30, 40])
    assert result.total == pytest.approx(expected)
    assert set(result.parts) == {"format", "count", "distance"}


def test_counting_options():
    swapped, true = points((30, 40), (0, 0)), [[0, 0], [30, 40]]
    # in order, both are 50 away: 1 - 50/50
    assert total("counting", swapped, true, [30, 40], matching="order") == 0
    # without a size the diagonal is 1000·√2
    near = points((3, 4), (30, 40))
    assert total("counting", near, true) == pytest.approx(1 - 2.5 / 1414.2135624)
    assert total("counting", swapped, true, [30, 40], truncated=True) == 0
    assert total("counting", "[]", []) == 1
    assert total("counting", "4", 5) == pytest.approx(0.8)  # the data has a number only
    assert total("counting", points((1, 1), (2, 2)), 4) == 0.5


@pytest.mark.parametrize("said", ["2", "2.", "**2**", "$2$", '{"count": 2}', r"\boxed{2}"])
def test_a_bare_number_is_read(said):
    assert score("counting", said, 2) == rewards.Score(1, {"format": 1, "count": 1, "distance": 1})
    assert total("counting", said, 4) == 0.5
    assert total("counting", said, [[1, 1], [2, 2]]) == 0  # where the data has points, they count
    assert correct("counting", said, [[1, 1], [2, 2]]) == 1


@pytest.mark.parametrize("true", [0, []])
@pytest.mark.parametrize("said", ["no idea", "", "[null]", "[{}]", "{}", UNREADABLE])
def test_what_cannot_be_read_is_not_none(said, true):
    assert score("counting", said, true).total == 0
    assert correct("counting", said, true) == 0
    assert score("counting", "[]", true).total == 1
    assert correct("counting", "[]", true) == 1


def test_correct_count():
    assert correct("counting", points((9, 9), (1, 1)), [[0, 0], [5, 5]]) == 1
    assert correct("counting", points((9, 9)), [[0, 0], [5, 5]]) == 0
    assert correct("counting", "2", [[0, 0], [5, 5]]) == 1
    assert correct("counting", tokens((1, 1, 2, 2), (3, 3, 4, 4), stop=""), 2) == 1
    assert correct("counting", "no idea", 2) == 0


def released_counting(predicted, true):
    """Plain Python: the best of all assignments of box centres to clicks, in the 0-1000 frame."""
    centres = [((a + c) / 2, (b + d) / 2) for a, b, c, d in predicted]
    few, many = sorted([centres, true], key=len)
    best = min(
        sum(math.dist(p, q) for p, q in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )
    return len(few) / len(many) * (1 - best / len(few) / (1000 * math.sqrt(2)))


def test_counting_equals_the_released_code():
    dice = random.Random(1)
    for _ in range(60):
        said = [
            (x, y, x + dice.randrange(200), y + dice.randrange(200))
            for x, y in (
                (dice.randrange(800), dice.randrange(800)) for _ in range(dice.randint(1, 5))
            )
        ]
        true = [[dice.randrange(1000), dice.randrange(1000)] for _ in range(dice.randint(1, 5))]
        expected = released_counting(said, true)
        got = score("counting", tokens(*said), true, [1000, 1000]).total
        assert got == pytest.approx(expected, abs=1e-5)


def test_counting_measures_in_pixels():
    # (100, 0) of 1000 is 20 of 200 pixels, and the diagonal of 200 x 100 is √50000 = 223.606798
    said = tokens((100, 0, 100, 0))
    assert total("counting", said, [[0, 0]], [200, 100]) == 1 - 20 / 223.60679775
    # released: 100 of 1000·√2 whatever the image's shape
    assert total("counting", said, [[0, 0]], [200, 200]) == 1 - 100 / 1414.21356237


# ---- detection ----

HALF = (0, 0, 10, 5, "cat")  # IoU with the true cat is 50/100: not above 0.5


@pytest.mark.parametrize(
    ("said", "expected", "form", "f1", "same", "iou", "penalty"),
    [
        # worked in the docstring: 0.25 + 0.75·2/3 + 1 + 1 − 0.5·1/2
        (boxes((0, 0, 10, 10, "cat")), 2.5, 1, 2 / 3, 1, 1, 1 / 2),
        (boxes((20, 20, 30, 30, "dog"), (0, 0, 10, 10, "cat")), 3, 1, 1, 1, 1, 0),
        # a wrong name still matches: 0.25 + 0.75 + 1/2 + 1
        (boxes((0, 0, 10, 10, "dog"), (20, 20, 30, 30, "dog")), 2.5, 1, 1, 0.5, 1, 0),
        # the second one said is free: 0.25 + 0.75·2/4 + 1 + 1 − 0.5·(1/2 + 1/2)
        (boxes((0, 0, 10, 10, "cat"), (0, 0, 10, 10, "cat")), 2.125, 1, 0.5, 1, 1, 1),
        # an IoU of 0.5 is no match; without one, the format alone counts
        (boxes(HALF), 0.25, 1, 0, 0, 0, 0),
        # one item in two is unknown: 0.125 + 0.75·2/3 + 1 + 1 − 0.25
        (boxes((0, 0, 10, 10, "cat"), (0, 0, 9, 9, "unicorn")), 2.375, 0.5, 2 / 3, 1, 1, 0.5),
        # IoU 80/100 and 1: 0.25 + 0.75 + 1 + 0.9
        (boxes((0, 0, 10, 8, "cat"), (20, 20, 30, 30, "dog")), 2.9, 1, 1, 1, 0.9, 0),
        ("[]", 0, 0, 0, 0, 0, 0),
        ("no objects", 0, 0, 0, 0, 0, 0),
    ],
)
def test_detection(said, expected, form, f1, same, iou, penalty):
    result = score("detection", said, OBJECTS, [56, 56])
    parts = {"format": form, "f1": f1, "class": same, "iou": iou, "penalty": penalty}
    assert result.parts == pytest.approx(parts)
    assert result.total == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "expected", "form"),
    [
        # both right: 0.75 + 1 + 1 and 0.25 for the form, of which the rest is one invalid item
        ("Here they are:\n```json\n" + json.dumps(OBJECTS) + "\n```", 2.75 + 0.25 * 2 / 3, 2 / 3),
        (json.dumps(OBJECTS)[:-1] + ', {"bbox_2d": [1, 2', 2.75 + 0.25 * 2 / 3, 2 / 3),
        # one of two: 0.75·2/3 + 1 + 1 − 0.5·1/2 and half of the form
        (json.dumps(OBJECTS[0]), 2.25 + 0.125, 1 / 2),
        (json.dumps(OBJECTS)[:-9], 2.25 + 0.125, 1 / 2),
    ],
)
def test_whole_objects_count_in_anything(said, expected, form):
    result = score("detection", said, OBJECTS)
    assert result.total == pytest.approx(expected)
    assert result.parts["format"] == pytest.approx(form)


def test_detection_options():
    one = boxes((0, 0, 10, 10, "cat"))  # 0.25, 0.75·2/3, 1, 1, −0.5·1/2
    assert total("detection", one, OBJECTS, penalty=0) == 2.75
    rows = {  # Table 6 of the paper, each row with one component more
        ("format",): 0.25,
        ("format", "iou"): 1.25,
        ("format", "iou", "class"): 2.25,
        ("format", "iou", "class", "f1"): 2.75,
        ("format", "iou", "class", "f1", "penalty"): 2.5,
    }
    for components, expected in rows.items():
        assert total("detection", one, OBJECTS, components=list(components)) == expected
    assert total("detection", one, OBJECTS, penalty=9) == 0  # −2 is clamped
    swapped = boxes((20, 20, 30, 30, "dog"), (0, 0, 10, 10, "cat"))
    assert total("detection", swapped, OBJECTS, matching="order") == 0.25
    assert total("detection", swapped, OBJECTS, matching="detr") == 3


def test_detection_accepts_the_released_answers():
    # ids 17 and 18 are cat and dog
    solution = {"target_id": [17, 18], "target_box": [[0, 0, 10, 10], [20, 20, 30, 30]]}
    assert total("detection", boxes((0, 0, 10, 10, "cat")), solution) == 2.5
    assert total("detection", boxes((0, 0, 10, 10, "cat")), json.dumps(solution)) == 2.5
    toothbrush = {"target_id": [90], "target_box": [[0, 0, 10, 10]]}  # overflowed as released
    said = boxes((0, 0, 10, 10, "toothbrush"))
    assert total("detection", said, toothbrush, matching="detr") == 3


def test_detection_with_nothing_to_find():
    assert total("detection", "[]", []) == 3  # by accident 0 as released
    assert total("detection", boxes((0, 0, 10, 10, "cat")), []) == 0.25  # as released
    assert total("detection", "none", []) == 0


def test_labels_are_coco_names_or_any():
    own = [{"bbox_2d": [0, 0, 10, 10], "label": "red circle"}]
    said = boxes((0, 0, 10, 10, "red circle"))
    assert total("detection", said, own) == 3
    assert total("detection", said, own, matching="detr") == 0  # the release knows COCO's only


def released_detection(said, true, penalty):
    """Plain Python, step by step as the release does it, all assignments; well-formed items."""

    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    def overlaps(a, b):
        inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
            0, min(a[3], b[3]) - max(a[1], b[1])
        )
        union = area(a) + area(b) - inner
        hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
        return inner / union, inner / union - (hull - union) / hull

    def cost(p, t):
        a, b = p[:4], t[:4]
        centre_size = [(b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2]
        centre_size += [b[2] - b[0] - a[2] + a[0], b[3] - b[1] - a[3] + a[1]]
        probability = (math.e if p[4] == t[4] else 1) / (math.e + 89)
        return 5 * sum(map(abs, centre_size)) - probability - 2 * overlaps(a, b)[1]

    valid = [p for p in said if p[4] in COCO_NAMES]
    if not valid:
        return 0.0
    form = len(valid) / len(said)
    small, large = min(len(valid), len(true)), max(len(valid), len(true))
    ways = itertools.permutations(range(large), small)
    ways = ([(i, k) if small == len(valid) else (k, i) for i, k in enumerate(way)] for way in ways)
    best = min(ways, key=lambda way: sum(cost(valid[i], true[k]) for i, k in way))
    ious = [(overlaps(valid[i][:4], true[k][:4])[0], valid[i][4] == true[k][4]) for i, k in best]
    kept = [pair for pair in ious if pair[0] > 0.5]
    if not kept:
        return 0.25 * form
    precision, recall = len(kept) / len(valid), len(kept) / len(true)
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    named = sum(same for _, same in kept) / len(kept)
    overlap = sum(iou for iou, _ in kept) / len(kept)
    result = 0.25 * form + 0.75 * f1 + named + overlap
    return min(3, max(0, result - penalty * ((1 - precision) + (1 - recall))))


def test_detr_matching_equals_the_released_code():
    dice, matched = random.Random(2), 0
    for _ in range(150):
        true, said = [], []
        for _ in range(dice.randint(1, 5)):
            x, y = dice.randrange(300), dice.randrange(300)
            true.append((x, y, x + dice.randint(5, 90), y + dice.randint(5, 90), dice.choice("ab")))
        true = [(*box, {"a": "cat", "b": "dog"}[name]) for *box, name in true]
        for *box, name in dice.sample(true, dice.randint(0, len(true))):
            moved = [value + dice.randint(-6, 6) for value in box]
            moved[2:] = max(moved[2], moved[0] + 1), max(moved[3], moved[1] + 1)
            said.append((*moved, dice.choice([name, name, "bus", "griffin"])))
        for _ in range(dice.randint(0, 2)):
            x, y = dice.randrange(300), dice.randrange(300)
            said.append((x, y, x + dice.randint(1, 90), y + dice.randint(1, 90), "cat"))
        dice.shuffle(said)
        answer = [{"bbox_2d": list(box), "label": label} for *box, label in true]
        for penalty in (0, 0.5):
            expected = released_detection(said, true, penalty)
            options = {"matching": "detr", "penalty": penalty}
            got = score("detection", boxes(*said), answer, **options).total
            assert got == pytest.approx(expected, abs=1e-5)
            matched += expected > 1
    assert matched > 100  # the cases are worth something


# ---- OCR ----


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ("sitting", "kitten", 4 / 7),
        ("a  b\n\tc", "a b c", 1),
        ("", "abc", 0),
        ("abcd", "ABCD", 0),
        ("Straße", "Strasse", 5 / 7),  # ß -> ss: one replaced, one inserted
    ],
)
def test_ocr(said, true, expected):
    assert score("ocr", said, true).parts == {"similarity": pytest.approx(expected)}


# ---- thinking ----


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\nb</think>\n<answer>c\nd</answer>\n", 1),
        ("<think>a</think><answer>b</answer><|im_end|>", 1),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),  # the other order
        ("<think><answer>b</answer></think>", 0),
        ("<think>a</think><answer>b", 0),
        ("b", 0),
    ],
)
def test_think_form(said, form):
    assert score("ocr", said, "q", think=True).parts["think"] == form


RIGHT = [
    ("grounding", [0, 0, 10, 20], "[0, 0, 10, 20]"),
    ("counting", [[1, 1]], points((1, 1))),
    ("detection", OBJECTS, json.dumps(OBJECTS)),
    ("ocr", "word", "word"),
    ("math", "12", r"\boxed{12}"),
    ("choice", "B", r"\boxed{B}"),
]


@pytest.mark.parametrize(("task", "answer", "right"), RIGHT)
@pytest.mark.parametrize("think", [False, "before", "after"])
@pytest.mark.parametrize(
    "form", ["<think>{}</think>", "<think>{}", "<think><answer>{}</answer></think>"]
)
def test_thinking_is_never_the_answer(task, answer, right, think, form):
    assert score(task, form.format(right), answer, think=think).total == 0
    assert correct(task, form.format(right), answer, think=think) == 0
    followed = form.format(right) + "</think><answer>nothing</answer>"
    assert correct(task, followed, answer, think=think) < 0.5
    preceded = "<answer>nothing</answer>" + form.format(right)
    assert correct(task, preceded, answer, think=think) < 0.5


def test_weight_of_thinking():
    said = THINKING.format("[0, 0, 10, 10]")
    result = score("grounding", said, [0, 0, 10, 20], think=True)
    assert result == rewards.Score(2.5, {"format": 1, "iou": 0.5, "think": 1})
    assert total("grounding", said, [0, 0, 10, 20], think=True, format_weight=0.1) == 0.7
    said = THINKING.format(r"\boxed{7}")
    assert score("math", said, "7", think=True) == rewards.Score(1, {"correct": 1, "think": 1})
    assert score("math", said, "7", think=True, format_weight=1).total == 2
    assert score("math", said, "7", think=True, format_weight=1, truncated=True).total == 0


@pytest.mark.parametrize(("task", "answer", "right"), RIGHT)
def test_thinking_after_the_answer(task, answer, right):
    after = f"<answer>{right}</answer><think>So it is.</think>"
    before = f"<think>So it is.</think><answer>{right}</answer>"
    for said, order, formed in ((after, "after", 1), (before, "before", 1), (before, True, 1),
                                (before, "after", 0), (after, "before", 0), (after, True, 0)):
        result = score(task, said, answer, think=order)
        assert result.parts["think"] == formed
        assert correct(task, said, answer, think=order) == 1
    assert score(task, after, answer, think="after", truncated=True).parts["think"] == 0


def test_prompts_ask_for_an_order():
    assert prompt("ocr", think=True) == prompt("ocr", think="before")
    assert prompt("ocr", think="before").endswith("final answer in <answer> </answer> tags.")
    asked = prompt("ocr", think="after")
    assert asked.startswith("OCR this image. ")
    assert asked.index("<answer> </answer>") < asked.index("<think> </think>")
    with pytest.raises(ValueError, match="think can be before or after, not 'during'"):
        prompt("ocr", think="during")
    with pytest.raises(ValueError, match="think can be before or after"):
        score("ocr", "a", "a", think="during")


# ---- maths ----


def test_math_takes_the_last_box():
    assert score("math", r"\boxed{1} no, \boxed{2}", "2").total == 1
    assert score("math", r"\boxed{2} no, \boxed{1}", "2").total == 0
    assert score("math", r"\boxed{2} or \boxed{", "2").total == 0
    assert score("math", r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}").total == 1
    assert score("math", "2", "2").total == 0
    assert score("math", r"\boxed{2}", "2", truncated=True).total == 0
    assert score("math", r"\boxed{2}", 2).total == 1  # the reference may be a number
    assert score("math", r"\boxed{\frac{2}{4}}", r"$\boxed{\frac{1}{2}}$").total == 1


def test_exact_math_compares_text_only():
    assert score("math", r"\boxed{0.5}", r"\frac{1}{2}", exact=True).total == 0
    assert score("math", r"\boxed{ 0.5 }", "0.5", exact=True).total == 1


def test_undecided_maths_is_marked(monkeypatch):
    """Training can leave such a completion out: nobody knows whether it is right."""
    monkeypatch.setattr(rewards, "equal", lambda *_, **__: None)
    expected = rewards.Score(0.0, {"correct": 0.0, "undecided": 1.0})
    assert score("math", r"\boxed{5}", "6") == expected
    assert correct("math", r"\boxed{5}", "6") == 0
    monkeypatch.undo()
    assert score("math", r"\boxed{5}", "6").parts == {"correct": 0.0}


# ---- choice ----


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        (r"\boxed{B}", "B", 1),
        (r"\boxed{B}", "(b)", 1),
        ("Answer: B", "A", 0),
        ("Answer: A or B", "B", 0),
        ("It could be B", "B", 0),
        (r"\boxed{ \text{E} }", "E", 1),
        (r"\boxed{\text{A circle}}", "A", 0),
        ("I think", "I", 0),
        ("答案：Q", "Q", 1),
    ],
)
def test_choice(said, true, right):
    assert score("choice", said, true) == rewards.Score(right, {"correct": right})
    assert score("choice", said, true, truncated=True).total == 0


# ---- mistakes of the caller ----


@pytest.mark.parametrize(
    ("args", "options", "sentence"),
    [
        (("detecting", "", []), {}, "unknown task 'detecting'; the tasks are grounding,"),
        (("grounding", "", [1, 2, 3]), {}, "must be [x1, y1, x2, y2], not [1, 2, 3]"),
        (("ocr", None, "x"), {}, "a completion must be text, not"),
        (("ocr", "", "x", [0, 5]), {}, "image_size must be [W, H]"),
        (("ocr", "", "x"), {"power": 2}, "ocr has no option 'power'"),
        (("grounding", "", [1, 2, 3, 4]), {"iou_power": 3}, "can be (1, 2), not 3"),
        (("detection", "", []), {"components": ["iou", "size"]}, "components in detection can be"),
        (("detection", "", []), {"penalty": -1}, "penalty in detection can be"),
    ],
)
def test_mistakes_are_named(args, options, sentence):
    with pytest.raises(ValueError) as error:
        score(*args, **options)
    assert sentence in str(error.value)


# ---- the table ----


def test_a_task_is_a_row():
    assert rewards.TASKS == ("grounding", "counting", "detection", "ocr", "math", "choice")
    assert rewards.OPTIONS["grounding"] == {"iou_power": (1, 2)}
    assert [task for task in rewards.TABLE if rewards.TABLE[task].question] == ["detection", "ocr"]
    assert rewards.PLACED == ("grounding", "counting", "detection")
    assert [task for task in rewards.TABLE if rewards.TABLE[task].needs_image] == [*rewards.PLACED, "ocr"]


def test_the_metric_has_its_name():
    assert rewards.metric_name(["detection", "detection"]) == "F1"
    assert rewards.metric_name(["grounding", "counting", "math", "choice"]) == "accuracy"
    assert rewards.metric_name(["ocr"]) == "similarity" and rewards.metric_name(["ocr", "math"]) == "score"


def test_a_new_task_is_one_row(tmp_path, monkeypatch):
    """Prompt, reward, data, held-out score and the metric's name follow; a benchmark needs its protocol."""
    def length(text, true, image_size, truncated, weight, power):
        return (len(text) / true) ** power, {"length": len(text) / true}

    row = rewards.Task(prompt="Say {} letters.", read=int, write=lambda true, _: true * "x",
                       rule=length, right=lambda parts: parts["length"], seen=lambda true, question: "nothing",
                       metric="length", options={"power": (1, 2)})  # fmt: skip
    monkeypatch.setitem(rewards.TABLE, "length", row)
    assert prompt("length", "4") == "Say 4 letters."
    assert reference("length", "4") == "xxxx"
    assert score("length", "xx", "4", power=2) == rewards.Score(0.25, {"length": 0.5})
    assert correct("length", "xx", "4") == 0.5
    sample = SimpleNamespace(task="length", answer=4, image_size=None)
    assert call_reward(score, sample, "xx", options={"power": 2}).total == 0.25

    (tmp_path / "data.jsonl").write_text('{"task": "length", "question": "4", "answer": "4"}')
    (read,) = datasets.open_data([str(tmp_path / "data.jsonl")]).sources[0]
    assert (read.task, read.question, read.answer) == ("length", "4", 4)
    config = SimpleNamespace(think="no", preset="")
    assert training.right(config, dict(id="0", task="length", completion="xxx", answer=4, image_size=None)) == 0.75
    assert rewards.metric_name(["length", "length"]) == "length"

    rows = [{"where": "a row", "id": str(n), "completion": n * "x", "answer": 4} for n in (1, 2)]
    with pytest.raises(ValueError, match=r"no protocol scores length, only grounding, .*: add a row to PROTOCOLS"):
        protocols.score_predictions("length", rows)
    means = partial(protocols.means_of_rows, score_row=lambda row: {"length": correct("length", row["completion"], 4)})
    protocol = protocols.Protocol(score=means, max_tokens=8, rows="none")
    monkeypatch.setitem(protocols.PROTOCOLS, "length", protocol)
    assert protocols.score_predictions("length", rows) == {"length": 0.375}  # (1/4 + 2/4) / 2


# ---- command line ----


def run(*arguments, lines=""):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    rows = [
        {"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20]},
        {"task": "counting", "completion": points((3, 4)), "answer": [[0, 0]],
         "image_size": [30, 40]},
        {"task": "math", "completion": r"\boxed{\frac{2}{4}}", "answer": "0.5", "id": 7},
        {"task": "grounding", "completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 20],
         "options": {"iou_power": 2, "think": True}},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run("score", str(path))
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [
        {"reward": 1.5, "parts": {"format": 1.0, "iou": 0.5}},
        {"reward": 0.9, "parts": {"format": 1.0, "count": 1.0, "distance": 0.9}},  # 1 − 5/50
        {"reward": 1.0, "parts": {"correct": 1.0}},
        {"reward": 1.25, "parts": {"format": 1.0, "iou": 0.5, "think": 0.0}},
    ]


def test_command_line_answers_row_by_row():
    command = [sys.executable, str(SCRIPT), "score", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        for said, expected in (("ab", 1.0), ("a", 0.5)):
            print(
                json.dumps({"task": "ocr", "completion": said, "answer": "ab"}),
                file=child.stdin,
                flush=True,
            )
            assert json.loads(child.stdout.readline())["reward"] == expected
        child.stdin.close()
        assert child.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ("{not json", "Expecting property name"),
        ("[1]", "a row must be a JSON object with task, completion and answer"),
        ('{"task": "ocr", "completion": "a"}', "a row must be a JSON object with task, completion"),
        ('{"task": "ocr", "completion": "a", "answer": "a", "options": {"x": 1}}', "no option 'x'"),
        ('{"task": "grounding", "completion": "a", "answer": "a"}', "must be JSON"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, second, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"task": "ocr", "completion": "a", "answer": "a"}\n' + second, encoding="utf-8"
    )
    done = run("score", str(path))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # the good row before it
    assert f"{path}:2: " in done.stderr and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_command_line_help_and_mistakes():
    done = run("--help")
    assert done.returncode == 0
    for option in ("iou_power", "matching", "penalty", "components", "exact"):
        assert option in done.stdout
    assert run("score", "/nowhere.jsonl").returncode == 2
    assert run("score", "-", "--frobnicate").returncode == 2


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match="pip install rapidfuzz"):
        score("ocr", "a", "b")
