"""reward_function.py: what a function of one's own is handed, where options go, what is refused."""

import json
from types import SimpleNamespace

import pytest

from reward_function import call_reward, check_reward_options, load
from rewards import Score, score


def sample(task="ocr", answer="word", image_size=(28, 56)):
    return SimpleNamespace(task=task, answer=answer, image_size=image_size, question="q", id="s-7")


def loaded(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    return load(f"{path}:mine")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def mine(task, completion, answer, image_size): return len(task + completion + answer)", 10),
        ("def mine(task, completion, answer): return len(completion)", 3),
        ("def mine(t, c, a, size=None): return len(t + c + a) + size[0]", 38),  # by place
        ("def mine(t, c, /): return len(c)", 3),
        ("def mine(*all): return len(all)", 4),
        ("def mine(completion, answer): return len(completion) - len(answer)", -1),  # by name
        ("def mine(answer, completion): return len(completion) - len(answer)", -1),
        ("def mine(completion, scale=2.0): return scale * len(completion)", 6),
        ("def mine(completion, *, truncated): return 5 if truncated else 0", 5),
        ("def mine(t, c, *, truncated): return 5 if truncated else len(c)", 5),
        ("def mine(sample): return len(sample.id + sample.question)", 4),
        ("def mine(**all): return len(all['sample'].id) + all['bonus']", 7),
        ("def mine(completion, bonus): return bonus", 4),
        ("def mine(t, c, a, **rest): return rest['image_size'][1] + rest['bonus']", 60),
        ("class Mine:\n    def __call__(self, completion): return 9\nmine = Mine()", 9),
    ],
)
def test_a_reward_gets_what_its_signature_takes(tmp_path, source, expected):
    reward = loaded(tmp_path, source)
    options = {"bonus": 4}
    result = call_reward(reward, sample(), "abc", truncated=True, options=options)
    assert result == Score(expected, {})


def test_a_reward_may_pass_everything_on_to_score(tmp_path):
    source = (
        "import rewards\n"
        "def mine(task, completion, answer, image_size=None, **rest):\n"
        "    return rewards.score(task, completion, answer, image_size, **rest)\n"
    )
    reward = loaded(tmp_path, source)
    options = {"iou_power": 2, "think": True}
    said = "<think>a</think><answer>[0, 0, 10, 10]</answer>"
    right = sample("grounding", [0, 0, 10, 20])
    result = call_reward(reward, right, said, options=options)
    assert result == Score(2.25, {"format": 1, "iou": 0.5, "think": 1})  # 1 + 0.5² + 1
    assert reward("grounding", "[0, 0, 10, 10]", [0, 0, 10, 20], iou_power=2).total == 1.25


def test_an_option_goes_to_the_tasks_that_have_it():
    options = {"iou_power": 2, "matching": "detr"}
    box = sample("grounding", [0, 0, 10, 20])
    assert call_reward(score, box, "[0, 0, 10, 10]", options=options).total == 1.25
    count = sample("counting", [[0, 0]], (30, 40))
    assert call_reward(score, count, '[{"point_2d": [3, 4]}]', options=options).total == 0.9
    pets = [{"bbox_2d": [0, 0, 10, 10], "label": "cat"}, {"bbox_2d": [20, 20, 30, 30], "label": "dog"}]
    cat, swapped = sample("detection", pets), json.dumps(pets[::-1])
    assert call_reward(score, cat, swapped, options=options).total == 3
    with pytest.raises(ValueError, match="no option 'power'"):
        call_reward(score, cat, swapped, options={"power": 2})


@pytest.mark.parametrize("value", ["'high'", "None", "float('nan')", "float('inf')"])
def test_a_reward_must_be_a_finite_number(tmp_path, value):
    reward = loaded(tmp_path, f"def mine(completion): return {value}")
    with pytest.raises(ValueError, match="a reward must be"):
        call_reward(reward, sample(), "abc")


def test_options_are_checked_before_training(tmp_path):
    check_reward_options({})
    check_reward_options({"iou_power": 2, "matching": "detr", "penalty": 3, "components": ["iou"]})
    check_reward_options({"think": "after", "format_weight": 0.1, "exact": True})
    wrong = [
        ({"power": 2}, "no task has an option 'power'; there are \\['components', 'exact', 'iou_power'"),
        ({"iou_power": 3}, "iou_power can be \\(1, 2\\), not 3"),
        ({"matching": "best"}, "matching can be .*'optimal'.*'detr'.*not 'best'"),
        ({"penalty": -1}, "penalty can be"),
        ({"components": ["size"]}, "components can be"),
        ({"think": "during"}, "think can be before or after"),
        ({"format_weight": "much"}, "format_weight must be a number"),
    ]
    for options, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            check_reward_options(options)
    named = loaded(tmp_path, "def mine(completion, bonus=1): return bonus")
    check_reward_options({"bonus": 2}, named)
    with pytest.raises(ValueError, match="takes no option 'malus'; its own are"):
        check_reward_options({"malus": 2}, named)
    check_reward_options({"malus": 2}, loaded(tmp_path, "def mine(completion, **rest): return 1"))


def test_a_reward_of_ones_own_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def length(task, completion, answer, *a, **k):\n    return len(completion)\n")
    reward = load(f"{tmp_path}/mine.py:length")
    assert reward("ocr", "abc", "") == 3
    for wrong in (f"{tmp_path}/mine.py:nothing", f"{tmp_path}/none.py:length"):
        with pytest.raises(ValueError, match="--reward"):
            load(wrong)
