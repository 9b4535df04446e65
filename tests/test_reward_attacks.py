"""rewards.py under attack: what is tried with the score it gets, bounded time, fuzz."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled import boxes, points, tokens

import formulas
from readers import parse_boxes, parse_points
from rewards import correct, prompt, score

# ---- attacks ----

CAT = [{"bbox_2d": [10, 10, 40, 40], "label": "cat"}]
ATTACKS = [  # (what is tried, task, completion, true answer, the total it gets)
    ("the whole image", "grounding", "[0, 0, 100, 100]", [10, 10, 30, 30], 1.04),  # 400/10000
    ("a huge box", "grounding", "[-1e308, -1e308, 1e308, 1e308]", [10, 10, 30, 30], 0),
    ("an inverted box", "grounding", "[30, 30, 10, 10]", [10, 10, 30, 30], 0),
    ("NaN", "grounding", "[NaN, NaN, NaN, NaN]", [10, 10, 30, 30], 0),
    ("infinity", "grounding", "[-Infinity, 0, Infinity, 9]", [10, 10, 30, 30], 0),
    ("truth values", "grounding", "[false, false, true, true]", [0, 0, 1, 1], 0),
    ("strings", "grounding", '["10", "10", "30", "30"]', [10, 10, 30, 30], 0),
    (
        "several guesses",
        "grounding",
        boxes((0, 0, 1, 1, "a"), (10, 10, 30, 30, "b")),
        [10, 10, 30, 30],
        0,
    ),
    ("python", "grounding", "[exit(), 10, 30, 30]", [10, 10, 30, 30], 0),
    ("an echo", "grounding", prompt("grounding", "cat"), [10, 10, 30, 30], 0),
    ("tags only", "grounding", "<think></think><answer></answer>", [10, 10, 30, 30], 0),
    ("one point many times", "counting", points(*[(5, 5)] * 100), [[5, 5]], 0.01),
    ("an infinite point", "counting", '[{"point_2d": [Infinity, 5]}]', [[5, 5]], 0),
    ("prose around it", "counting", "Sure! " + points((5, 5)), [[5, 5]], 0),
    # 0.25 + 0.75·2/101 + 1 + 1 − 0.5·(99/100)
    ("a hundred copies", "detection", boxes(*[(10, 10, 40, 40, "cat")] * 100), CAT, 1.76985149),
    # form 1/2: 0.125 + 0.75 + 1 + 1; nothing is gained by an inverted copy
    (
        "an inverted copy",
        "detection",
        boxes((10, 10, 40, 40, "cat"), (40, 40, 10, 10, "cat")),
        CAT,
        2.875,
    ),
    ("three numbers", "detection", boxes((10, 10, 40, 40, "cat"), (1, 2, 3, "cat")), CAT, 2.875),
    ("null", "detection", '[{"bbox_2d": null, "label": "cat"}]', CAT, 0),
    ("no label", "detection", '[{"bbox_2d": [10, 10, 40, 40]}]', CAT, 0),
    ("a list as label", "detection", '[{"bbox_2d": [10, 10, 40, 40], "label": ["cat"]}]', CAT, 0),
    # 0.25·1/2 + 0.75 + 1 + 1: the list that is not there counts as one invalid item
    ("no list", "detection", '{"bbox_2d": [10, 10, 40, 40], "label": "cat"}', CAT, 2.875),
    ("every name", "detection", boxes(*[(10, 10, 40, 40, n) for n in ("dog", "cat")]), CAT, None),
    ("an echo", "detection", prompt("detection"), CAT, 0),
    ("deep nesting", "detection", "[" * 100_000 + "]" * 100_000, CAT, 0),
    ("a long text", "ocr", "word " * 1000, "word", 4 / 4999),
    ("a box of all", "math", r"\boxed{1,2,3,4,5,6,7,8,9}", "5", 0),
    ("an empty box", "math", r"\boxed{}", "5", 0),
    ("a power tower", "math", r"\boxed{9**9**9**9}", "5", 0),
    ("python", "math", r"\boxed{__import__('os').getpid()}", "5", 0),
    ("a box in the thinking", "math", r"<think>\boxed{5}</think> five", "5", 0),
    ("a broken box", "math", r"\boxed{5", "5", 0),
    ("an echo", "math", prompt("math", "What is 2+3?"), "5", 0),
    ("all letters", "choice", "A B C D", "D", 0),
    ("every statement", "choice", "The answer is A. The answer is D.", "D", 0),
    ("an echo", "choice", "How many?\nA. 3\nB. 4", "B", 0),
]


@pytest.mark.parametrize(("name", "task", "said", "answer", "expected"), ATTACKS)
def test_attack(name, task, said, answer, expected):
    if expected is None:
        # Both have the same IoU; either is taken. At best 0.25 + 0.75·2/3 + 1 + 1 − 0.5·1/2 = 2.5,
        # below the 3 of the right answer alone.
        assert score(task, said, answer).total in (pytest.approx(1.5), pytest.approx(2.5))
        return
    assert score(task, said, answer).total == pytest.approx(expected, abs=1e-6)


LONG = {
    "digits": "1" * 1_000_000,
    "brackets": "[" * 1_000_000,
    "objects": '{"a":' * 100_000,
    "boxes": boxes(*[(1, 2, 30, 40, "cat")] * 10_000),
    "box tokens": tokens(*[(1, 2, 3, 4)] * 10_000),
    "loose boxes": "[1,2,3,4] " * 100_000,
    "pairs": "(1,1)," * 150_000,
    "boxed": "\\boxed{" * 100_000,
    "braces": "\\boxed{" + "{" * 1_000_000,
    "thinks": "<think>" * 100_000,
    "answers": "<think>a</think>" + "<answer>" * 100_000,
    "spaces": "[1," + " " * 1_000_000,
    "statements": "answer is " * 100_000,
    "letters": "A " * 500_000,
    "long label": boxes(*[(1, 2, 30, 40, "x" * 100_000)] * 10),
}


@pytest.mark.parametrize("name", LONG)
def test_long_completions_take_bounded_time(name):
    true = {
        "grounding": [1, 2, 3, 4],
        "counting": [[k, k] for k in range(50)],
        "ocr": "word " * 1000,
    }
    true |= {"detection": [{"bbox_2d": [k, k, k + 9, k + 9], "label": "cat"} for k in range(50)]}
    true |= {"math": "5", "choice": "A"}
    for task, answer in true.items():
        start = time.process_time()
        result = score(task, LONG[name], answer, [56, 56], think=True)
        assert time.process_time() - start < 2 * 2, task  # 2 s, doubled for a slow machine
        assert math.isfinite(result.total)


def test_ordinary_completions_are_fast():
    long_list = boxes(*[(k, k, k + 20, k + 20, "cat") for k in range(100)])
    thought = "<think>" + "so it goes. " * 500 + "</think><answer>{}</answer>"
    start = time.process_time()
    for _ in range(20):
        score("detection", thought.format(long_list), json.loads(long_list), [280, 280], think=True)
    assert (time.process_time() - start) / 20 < 0.1


# ---- fuzz ----

PIECES = [
    *'[]{}()<>,:.-"\\$ \n',
    "0",
    "17",
    "1e9",
    "NaN",
    "null",
    "<think>",
    "</think>",
    "<answer>",
]
PIECES += [
    "</answer>",
    "```json",
    "```",
    "bbox_2d",
    "point_2d",
    "label",
    '{"bbox_2d": [1, 2, 30, 40]',
]
PIECES += ['"cat"', "\\boxed{", "\\frac", "^", "**", "<|box_start|>", "<|box_end|>", "(1,2),(3,4)"]
PIECES += [
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|im_end|>",
    "Answer: B",
    "\ud800",
    "é",
    "\0",
]
TRUE = {
    "grounding": [1, 2, 30, 40],
    "counting": [[5, 5], [20, 20]],
    "detection": CAT,
    "ocr": "a word",
    "math": "x+1",
    "choice": "B",
}
TOP = {"grounding": 2, "counting": 1, "detection": 3, "ocr": 1, "math": 1, "choice": 1}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    said=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=25).map("".join)),
    think=st.sampled_from([False, "before", "after"]),
    truncated=st.booleans(),
    size=st.sampled_from([None, [56, 84]]),
)
def test_never_raises(said, think, truncated, size):
    for task, answer in TRUE.items():
        # Symbols have their own tests: here a comparison costs nothing.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formulas, "equal_in_child", lambda *_: False)
            result = score(task, said, answer, size, think=think, truncated=truncated)
        assert task == "math" or 0 <= correct(task, said, answer, size, think=think) <= 1
        assert 0 <= result.total <= TOP[task] + bool(think)
        assert all(math.isfinite(part) for part in result.parts.values())
    assert all(len(box) == 4 for box in parse_boxes(said, size))
    assert all(len(point) == 2 for point in parse_points(said, size))
