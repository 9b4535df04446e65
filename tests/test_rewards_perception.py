"""rewards.py, the four tasks of perception: worked constants, naive loops, the released code's formulas."""

import itertools
import json
import math
import random

import pytest
from spelled import OBJECTS, UNREADABLE, boxes, points, tokens, total

import rewards
from readers import COCO_NAMES
from rewards import correct, score

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
