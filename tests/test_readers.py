"""The readers in rewards.py: true answers as data sets write them, answers as models write them."""

import json

import pytest

from rewards import read_truth

CAT = {"bbox_2d": [0.0, 1.0, 10.0, 11.0], "label": "cat"}


# ---- true answers ----


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


NOT_A_BOX = "a true box must be [x1, y1, x2, y2]"
NOT_A_COUNT = "a true count must be a whole number from 0 or a list of [x, y]"
NOT_OBJECTS = 'true objects must be a list of {"bbox_2d", "label"}'
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
        ("grounding", "the cat", "must be JSON, but it is 'the cat'"),
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
        ("counting", [[1]], "a true point must be [x, y], not [1]"),
        ("counting", [{"x": 1}], "a true point must be [x, y]"),
        ("counting", "two", "must be JSON"),
        ("counting", "", "must be JSON"),
        ("detection", None, NOT_OBJECTS),
        ("detection", ["cat"], NOT_OBJECTS),
        ("detection", [{"label": "cat"}], NOT_OBJECTS),
        ("detection", [{"bbox_2d": [1, 2, 3, 4]}], NOT_OBJECTS),
        ("detection", [CAT | {"label": ""}], "a true label must be text, not ''"),
        ("detection", [CAT | {"label": " "}], "a true label must be text, not ' '"),
        ("detection", [CAT | {"label": None}], "a true label must be text, not None"),
        ("detection", [CAT | {"bbox_2d": [1, 2, 1, 4]}], SIZED),
        ("detection", {"target_id": [12], "target_box": [[1, 2, 3, 4]]}, "must be text, not None"),
        ("detection", {"target_id": [1], "target_box": []}, "zip() argument 2 is longer"),
        ("ocr", "", NO_MATCH),
        ("ocr", " \n", NO_MATCH),
        ("ocr", ["a"], "the true answer must be text or a number, not ['a']"),
        ("ocr", None, "the true answer is missing"),
        ("math", "$ $", NO_MATCH),
        ("math", "\\boxed{}", NO_MATCH),
        ("math", {"a": 1}, "the true answer must be text or a number"),
        ("math", True, "the true answer must be text or a number"),
        ("choice", "", NO_MATCH),
        ("choice", "AB", "the true answer of a choice must be one letter, not 'AB'"),
        ("choice", "3", "the true answer of a choice must be one letter"),
    ],
)
def test_refused_true_answers(task, answer, sentence):
    with pytest.raises(ValueError) as error:
        read_truth(task, answer)
    assert sentence in str(error.value)
