"""rewards.py: prompts, thinking, maths, choice, the table, the command line. The tasks of perception:
test_rewards_perception.py; attacks: test_reward_attacks.py."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from spelled import OBJECTS, points, total

import behaviours
import data as datasets
import protocols
import rewards
import training
from reward_function import call_reward
from rewards import correct, prompt, reference, score

SCRIPT = Path(rewards.__file__)
THINKING = "<think>Let me look.</think><answer>{}</answer>"


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
        (("detection", "", []), {"components": []}, "can be a list of some of format, f1, class, iou, penalty, not []"),
        (("detection", "", []), {"components": [["iou"]]}, "components in detection can be"),
        (("detection", "", []), {"penalty": -1}, "penalty in detection can be any number from 0, not -1"),
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
                       metric="length", options={"power": (1, 2)}, others={"power": ("above 0", lambda power: power > 0)})  # fmt: skip
    monkeypatch.setitem(rewards.TABLE, "length", row)
    assert prompt("length", "4") == "Say 4 letters."
    assert reference("length", "4") == "xxxx"
    assert score("length", "xx", "4", power=2) == rewards.Score(0.25, {"length": 0.5})
    assert correct("length", "xx", "4") == 0.5
    with pytest.raises(ValueError, match=r"power in length can be above 0, not -1"):
        score("length", "xx", "4", power=-1)
    sample = SimpleNamespace(task="length", answer=4, image_size=None)
    assert call_reward(score, sample, "xx", options={"power": 2}).total == 0.25
    assert call_reward(score, sample, "xx", options={"power": 3}).total == 0.125

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
