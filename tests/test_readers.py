"""readers.py: true answers as data sets write them, answers as models write them."""

import json

import pytest

from readers import (
    COCO_IDS,
    COCO_NAMES,
    chosen_letters,
    parse_boxes,
    parse_points,
    read_number,
    read_objects,
    read_shapes,
    split_thinking,
)
from rewards import parse_places, read_truth

CAT = {"bbox_2d": [0.0, 1.0, 10.0, 11.0], "label": "cat"}


# ---- true answers ----


def test_coco_names_and_ids():
    names = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
    assert len(names) == 80
    # from COCO's own list of categories, around each gap
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack"}
    known |= {28: "umbrella", 31: "handbag", 44: "bottle", 46: "wine glass", 65: "bed"}
    known |= {67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator", 84: "book"}
    assert {number: names[number] for number in known} == known
    assert names[90] == "toothbrush"


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("grounding", [1, 2, 30, 40], [1, 2, 30, 40]),
        ("grounding", (1, 2, 30, 40), [1, 2, 30, 40]),
        ("grounding", ["1", "2.5", "30", "40"], [1, 2.5, 30, 40]),
        ("grounding", "[1, 2, 30, 40]", [1, 2, 30, 40]),
        ("grounding", "<answer> [1, 2, 30, 40] </answer>", [1, 2, 30, 40]),
        ("grounding", "<think>a cat</think><answer>[1, 2, 30, 40]</answer>", [1, 2, 30, 40]),
        ("grounding", '<answer>[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]</answer>', [1, 2, 30, 40]),
        ("grounding", "$\\boxed{[1, 2, 30, 40]}$", [1, 2, 30, 40]),
        ("counting", [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ("counting", [{"x": 1, "y": 2.5}], [[1, 2.5]]),
        ("counting", '[{"point_2d": [1, 2], "label": "cat"}]', [[1, 2]]),
        ("counting", "[[1, 2]]", [[1, 2]]),
        ("counting", [], []),
        ("counting", 3, 3),
        ("counting", 3.0, 3),
        ("counting", "3", 3),
        ("counting", "<answer> 3 </answer>", 3),
        ("counting", "<answer>\\boxed{3}</answer>", 3),
        ("counting", "$0$", 0),
        ("detection", [CAT], [CAT]),
        ("detection", json.dumps([CAT]), [CAT]),
        ("detection", f"<answer>\n```json\n{json.dumps([CAT])}\n```\n</answer>", [CAT]),
        ("detection", [{"bbox_2d": [0, 1, 10, 11], "label": 7, "id": 1}], [CAT | {"label": "7"}]),
        ("detection", {"target_id": [17], "target_box": [[0, 1, 10, 11]]}, [CAT]),
        ("detection", [], []),
        ("ocr", "two  words", "two  words"),
        ("ocr", "<answer> word </answer>", "word"),
        ("ocr", "$5$", "$5$"),  # what is on the page
        ("ocr", 1984, "1984"),
        ("math", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("math", "$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("math", "<answer> $$ 12 $$ </answer>", "12"),
        ("math", "So it is \\boxed{$12$}.", "12"),
        ("math", "\\$12 or 3\\$", "\\$12 or 3\\$"),  # the sign of a dollar is no formula
        ("math", 12, "12"),
        ("math", 0.5, "0.5"),
        ("choice", "B", "B"),
        ("choice", "(B)", "B"),
        ("choice", "b.", "B"),
        ("choice", "\\boxed{\\text{B}}", "B"),
        ("choice", "<answer> $b$ </answer>", "B"),
    ],
)
def test_true_answers(task, answer, expected):
    found = read_truth(task, answer)
    assert found == expected and type(found) is type(expected)
    assert read_truth(task, found) == found


NOT_A_BOX = "a box must be [x1, y1, x2, y2]"
NOT_A_COUNT = "it must be a whole number from 0 or a list of [x, y]"
NOT_OBJECTS = 'it must be a list of {"bbox_2d", "label"}'
SIZED = "is it x, y, w, h? then ?box=xywh"
NO_MATCH = "is empty: every completion would earn 0"


@pytest.mark.parametrize(
    ("task", "answer", "sentence"),
    [
        ("detecting", [], "unknown task 'detecting'; the tasks are grounding, counting,"),
        ("grounding", [1, 2, 3], NOT_A_BOX),
        ("grounding", [[1, 2, 3, 4], [5, 6, 7, 8]], NOT_A_BOX),
        ("grounding", [1, 2, 3, float("nan")], NOT_A_BOX),
        ("grounding", [False, False, True, True], NOT_A_BOX),
        ("grounding", [1, 2, 3, 10**400], NOT_A_BOX),
        ("grounding", None, NOT_A_BOX),
        ("grounding", "12", NOT_A_BOX),
        ("grounding", "the cat", "the true answer in grounding: it must be JSON, but is 'the cat'"),
        ("grounding", [5, 5, 5, 9], SIZED),
        ("grounding", [5, 5, 9, 5], SIZED),
        ("grounding", [100, 20, 30, 40], SIZED),  # x2 < x1
        ("grounding", [10, 90, 30, 40], SIZED),  # y2 < y1
        ("counting", -1, NOT_A_COUNT),
        ("counting", 2.7, NOT_A_COUNT),
        ("counting", True, NOT_A_COUNT),
        ("counting", "true", NOT_A_COUNT),
        ("counting", {}, NOT_A_COUNT),
        ("counting", None, NOT_A_COUNT),
        ("counting", float("inf"), NOT_A_COUNT),
        ("counting", [[1]], "a point must be [x, y], not [1]"),
        ("counting", [{"x": 1}], "a point must be [x, y]"),
        ("counting", "two", "must be JSON"),
        ("counting", "", "must be JSON"),
        ("detection", None, NOT_OBJECTS),
        ("detection", ["cat"], NOT_OBJECTS),
        ("detection", [{"label": "cat"}], NOT_OBJECTS),
        ("detection", [{"bbox_2d": [1, 2, 3, 4]}], NOT_OBJECTS),
        ("detection", [CAT | {"label": ""}], "a label must be text, not ''"),
        ("detection", [CAT | {"label": " "}], "a label must be text, not ' '"),
        ("detection", [CAT | {"label": None}], "a label must be text, not None"),
        ("detection", [CAT | {"bbox_2d": [1, 2, 1, 4]}], SIZED),
        ("detection", {"target_id": [12], "target_box": [[1, 2, 3, 4]]}, "must be text, not None"),
        ("detection", {"target_id": [1], "target_box": []}, "zip() argument 2 is longer"),
        ("ocr", "", NO_MATCH),
        ("ocr", " \n", NO_MATCH),
        ("ocr", ["a"], "it must be text or a number, not ['a']"),
        ("ocr", None, "the true answer in ocr: it is missing"),
        ("math", "$ $", NO_MATCH),
        ("math", "\\boxed{}", NO_MATCH),
        ("math", {"a": 1}, "it must be text or a number"),
        ("math", True, "it must be text or a number"),
        ("choice", "", NO_MATCH),
        ("choice", "AB", "it must be one letter, not 'AB'"),
        ("choice", "3", "it must be one letter"),
    ],
)
def test_refused_true_answers(task, answer, sentence):
    with pytest.raises(ValueError) as error:
        read_truth(task, answer)
    assert sentence in str(error.value)


# ---- thinking, in both orders ----


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ("<think>a</think><answer>b</answer>", True, False),
        ("<think>a\nb</think>\n<answer>c\nd</answer>\n", True, False),
        ("<think>a</think><answer>b</answer><|im_end|>", True, False),
        ("<answer>b</answer><think>a</think>", False, True),
        ("<answer>b\nc</answer>\n<think>a\n</think>\n<|im_end|>", False, True),
        ("<answer>b</answer>x<think>a</think>", False, False),
        ("<answer>b</answer><think>a</think><think>a</think>", False, False),
        ("<answer>b</answer><think>a", False, False),
        ("<answer>b</answer><think>a</think>x", False, False),
        ("<answer>b<think>a</answer></think>", False, False),
    ],
)
def test_thinking_has_a_form_in_each_order(said, before, after):
    assert split_thinking(said)[1] is before
    assert split_thinking(said, True)[1] is before
    assert split_thinking(said, "before")[1] is before
    assert split_thinking(said, "after")[1] is after


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("b", "b"),
        ("<answer> b </answer>", "b"),
        ("<think>a</think>b", "b"),
        ("<think>a</think>x<answer>b</answer>y", "b"),
        ("<answer>b</answer><think>a</think>", "b"),
        ("b<think>a</think>", "b"),
        ("<answer>b</answer><think>a", "b"),  # cut while it thinks after the answer
        ("<answer>b</answer><think>a</think> so it is", "b"),
        ("<answer>b</answer><think>a <answer>c</answer></think>", "b"),
        ("<answer>b</answer><think>a</think>c<think>d</think>", "b"),
        ("<think>a</think><answer>b</answer><think>c</think>", ""),  # between two thoughts
        ("a</think>b", "b"),  # where the prompt had the first tag
        ("a</think>", ""),
        ("<think>a", ""),
        ("<think>a</think>", ""),
        ("<think><answer>a</answer></think>", ""),
        ("<think>a<think>b</think>c</think>", ""),
    ],
)
@pytest.mark.parametrize("think", ["before", "after"])
def test_the_answer_is_read_in_either_order(said, text, think):
    assert split_thinking(said, think)[0] == text


# ---- boxes, points and numbers, as models write them ----


@pytest.mark.parametrize(
    ("said", "shapes", "form"),
    [
        ("[1, 1, 20, 20]", [[1, 1, 20, 20]], "bare"),
        ('[{"bbox_2d": [1, 1, 20, 20]}]', [[1, 1, 20, 20]], "list"),
        ('[{"point_2d": [1, 2], "label": "[5, 6]"}]', [[1, 2]], "list"),
        ("[]", [], "list"),
        ("[[1, 1, 20, 20]]", [[1, 1, 20, 20]], "plain"),
        ('[{"bbox": [1, 1, 20, 20]}]', [[1, 1, 20, 20]], "plain"),
        ('[{"x1": 1, "y1": 1, "x2": 20, "y2": 20}]', [[1, 1, 20, 20]], "plain"),
        ('[{"xmin": 1, "ymin": 1, "xmax": 20, "ymax": 20}]', [[1, 1, 20, 20]], "plain"),
        ('{"box": {"x_min": 1, "y_min": 1, "x_max": 20, "y_max": 20}}', [[1, 1, 20, 20]], ""),
        ('{"left": 1, "top": 1, "right": 20, "bottom": 20}', [[1, 1, 20, 20]], ""),
        ("[[10, 20], [30, 40]]", [[10, 20], [30, 40]], "plain"),
        ('[{"x": 10, "y": 20}]', [[10, 20]], "plain"),
        ('<point x="1.5" y="2" alt="cat">cat</point>', [[1.5, 2]], "plain"),
        ('<points x1="1" y1="2" x2="3" y2="4" alt="cats">cats</points>', [[1, 2], [3, 4]], "plain"),
        ("<point x='1' y='2'>a</point> <point x=3 y=4>b</point>", [[1, 2], [3, 4]], "plain"),
        ('<point x="1" y="2"/>\n<point x="3" y="4" />', [[1, 2], [3, 4]], "plain"),
        ('Here: <point x="1" y="2">cat</point>', [[1, 2]], ""),
        ('{"bbox_2d": [1, 1, 20, 20]}', [[1, 1, 20, 20]], ""),
        ('{"cats": [{"at": [[1, 1, 20, 20]]}, {"at": [[2, 2, 3, 3]]}]}',
         [[1, 1, 20, 20], [2, 2, 3, 3]], ""),
        ('[{"bbox": [1, 1, 20, 20]', [[1, 1, 20, 20]], ""),  # cut short
        ('[{"point_2d": [0, 0]}, {"point_2d": [30]}]', [[0, 0]], ""),
        ('[{"bbox_2d": [true, 1, 20, 20]}]', [], ""),
        ("[null]", [], ""),
        ("no cat", [], ""),
    ],
)  # fmt: skip
def test_shapes(said, shapes, form):
    assert read_shapes(said, None) == (shapes, form)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("2", 2), ("2.", 2), ("2.0", 2), ("**2**", 2), ("**2.**", 2), ("$2$", 2), ("0", 0),
        ('{"count": 2}', 2), ('```json\n{"count": 2}\n```', 2), (r"\boxed{2}", 2), ("1000000", None),
        ('{"count": "2"}', 2), ('{"label": "cat", "count": 2}', 2), ('{"cats": 1, "dogs": 2}', None),
        ('{"count": "many"}', None), ('{"count": [2]}', None), ('{"count": true}', None),
        ('{"count": 2.5}', None), ('{"count": -2}', None), ('{"count": 2, "of": 3}', None),
        ('{"count": NaN}', None), ("2.5", None), ("-2", None), ("two", None), ("2 3", None), ("", None),
    ],
)  # fmt: skip
def test_numbers(said, number):
    assert read_number(said) == number


DOG = {"bbox_2d": [20.0, 20.0, 30.0, 30.0], "label": "dog"}
BOTH = json.dumps([CAT, DOG])
PAIRS = [([0, 1, 10, 11], "cat"), ([20, 20, 30, 30], "dog")]


@pytest.mark.parametrize(
    ("said", "pairs", "items"),
    [
        (BOTH, PAIRS, 2),
        (f"```json\n{BOTH}\n```", PAIRS, 2),
        (f"<think>[]</think><answer>{BOTH}</answer>", PAIRS, 2),
        ("[]", [], 0),
        # anything but a list: what is whole, and one more for all the rest
        (f"Here they are:\n```json\n{BOTH}\n```", PAIRS, 3),
        (json.dumps(CAT), PAIRS[:1], 2),
        (BOTH[:-1] + ', {"bbox_2d": [1, 2', PAIRS, 3),
        (BOTH[:-20], PAIRS[:1], 2),
        (json.dumps({"objects": [CAT, DOG]}), PAIRS, 3),
        ("nothing", [], 1),
        # an item that is none
        (json.dumps([CAT, {"bbox_2d": [1, 2, 3], "label": "cat"}]), PAIRS[:1], 2),
        (json.dumps([CAT, {"bbox_2d": [9, 9, 3, 3], "label": "cat"}]), PAIRS[:1], 2),
        (json.dumps([CAT, {"bbox_2d": [1, 2, 3, 4], "label": ""}, None]), PAIRS[:1], 3),
    ],
)
def test_objects(said, pairs, items):
    assert read_objects(said) == (pairs, items)


def test_what_pictures_draw():
    assert parse_boxes("It is [1, 2, 3, 4] or (5,6),(7,8)") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert parse_boxes('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5') == [[1, 2, 3, 4]]
    assert parse_boxes("<think>[1, 2, 3, 4]</think>none") == []
    assert parse_points('[{"point_2d": [1, 2]}] and so on') == [[1, 2]]
    assert parse_points('[{"bbox_2d": [0, 0, 4, 8]}]') == [[2, 4]]
    halves = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(0,0),(500,1000)<|box_end|>"
    assert parse_boxes(halves, (28, 56)) == [[0, 0, 14, 56]]
    assert parse_places("grounding", halves, (28, 56)) == [[0, 0, 14, 56]]
    assert parse_places("counting", "[[1, 2], [3, 4]]") == [[1, 2], [3, 4]]
    assert parse_places("ocr", "[1, 2, 3, 4]") == []  # text, wherever it was printed


# ---- option letters ----


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("$B$", "B"), ("B. 42 cm", "B"),
        ("B\nbecause it is longer", "B"), ("Option B", "B"), ("The answer is B.", "B"),
        ("the correct option is (B), as A is too small", "B"), ("**Answer:** B", "B"),
        ("Answer: the option B", "B"), (r"\boxed{B}", "B"), (r"\boxed{\text{(B)}}", "B"),
        (r"Answer: A? No, \boxed{B}", "B"), ("Answer: B, I think", "B"), ("Answer: I", "I"),
        ("Answer: B. The answer is B.", "B"), ("Answer: A or B", "AB"),
        ("Answer: A, B, C, D", "ABCD"),
        (r"\boxed{A} \boxed{B}", "AB"), (r"\boxed{A, B}", "AB"), ("Answer: A\nAnswer: B", "AB"),
        ("A. 1\nB. 2\nC. 3", "ABC"), ("the answer is not B", ""), ("A dog and a cat", ""),
        ("It could be B", ""), ("the answer is a triangle", ""), ("", ""), ("AB", ""),
        # within commands
        (r"\boxed{ \text{E} }", "E"), (r"\boxed{(\text{E})}", "E"), (r"\boxed{\mathrm{E}}", "E"),
        (r"The answer is $\text{E}$.", "E"), (r"\boxed{\textbf{(E)}}", "E"), (r"\text{E}", "E"),
        (r"\fbox{E}", "E"), (r"\boxed {E}", "E"), (r"\[\boxed{\text{E. } 42}\]", "E"),
        # small
        (r"\boxed{e}", "E"), ("(e)", "E"), ("e.", "E"), ("**e**", "E"), ("Answer: e", "E"),
        ("the answer is (e), since", "E"), ("a cat", ""), ("Answer: e is small", ""),
        ("**(e)**", "E"), ("(e).", "E"), ("the answer is option (e).", "E"), ("Answer: Option E", "E"),
        (r"\boxed{\text{Option }E}", "E"), ("Answer: (A) or (B)", "AB"), ("Answer: (a) and (b)", "AB"), ("(a) 1\n(b) 2", "AB"), ("(e) 42 cm", "E"),
        ("Answer: (A). B is too small", "A"), ("Answer: f(x)", ""), ("the answer is the e of 2.7", ""),
        # Chinese
        ("答案是B", "B"), ("答案：B", "B"), ("选B", "B"), ("故选：（B）。", "B"), ("正确答案为 B", "B"),
        ("选项B", "B"), ("答案是B，因为A太小", "B"), ("不选B", ""), ("答案应该是B", "B"), ("【答案】B", "B"), ("答案是选项B", "B"), ("答案是选项b", "B"),
        ("选项A是错的，答案是B", "B"),
        # the article and the pronoun
        (r"\boxed{\text{A circle}}", ""), ("The answer is A circle", ""), ("I think", ""),
        ("Answer: I think so", ""), ("I think it is B", ""), (r"\boxed{I think}", ""),
        ("The answer is A because it is round", "A"), ("Answer: A. circle", "A"), ("Answer: A in the figure", "A"), ("Answer: A, not B", "A"),
        (r"\boxed{\text{A: circle}}", "A"), ("Answer: A) circle", "A"), (r"\boxed{I}", "I"),
    ],
)  # fmt: skip
def test_letters(said, letters):
    assert chosen_letters(said) == set(letters)


@pytest.mark.parametrize("task, wrapped, truth", [
    ("math", "<think>so</think> 4", "4"), ("math", "<answer>4", "4"), ("math", "3 + 1 is 4\n#### 4", "4"),
    ("counting", "<think>two</think>2", 2), ("choice", "<think>B?</think>(c)", "C"),
])
def test_a_truth_written_as_a_completion_is_its_answer(task, wrapped, truth):
    """One reader: what a data set may hold is what scoring and saved predictions accept."""
    assert read_truth(task, wrapped) == truth


def test_a_list_kept_as_text_is_no_formula():
    with pytest.raises(ValueError, match=r"the true answer in math: it is a list kept as text, .*name one value"):
        read_truth("math", "['3']")
