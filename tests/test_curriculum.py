"""curriculum.py through eval.py's command: a band of pass rates, easy to hard, with its images."""
import json

from test_eval import in_this_process

import data as datasets
import eval as evaluation
import training


def test_curriculum_keeps_a_band_and_sorts_easy_to_hard(tmp_path, monkeypatch, alone):
    """Four samples right in 4, 1, 0 and 3 of 4 tries; the band is 0.2 … 0.9."""
    rows = [f'{{"task": "math", "id": "s{i}", "question": "{i}+0", "answer": "{i}"}}\n' for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    right = {"s0": 4, "s1": 1, "s2": 0, "s3": 3}

    def answers(run, count, *, tries, max_tokens, greedy):
        assert (count, tries, greedy, run.eval_data) == (0, 4, False, run.data)
        return [dict(id=key, task="math", completion=f"\\boxed{{{key[1] if i < n else 99}}}", answer=key[1],
                     image_size=None) for key, n in right.items() for i in range(4)]

    monkeypatch.setattr(training, "answer_heldout", answers)
    in_this_process(monkeypatch, alone)
    evaluation.main(["curriculum", "--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--out",
                     str(tmp_path / "out"), "--low", "0.2", "--samples-per-question", "4"])
    kept = [json.loads(line) for line in (tmp_path / "out" / "curriculum.jsonl").read_text().splitlines()]
    assert [(row["id"], row["pass_rate"]) for row in kept] == [("s3", 0.75), ("s1", 0.25)]
    mix = datasets.open_data([f"{tmp_path}/out/curriculum.jsonl?in_order=1"])
    assert [mix[draw].question for draw in range(2)] == ["3+0", "1+0"]


def test_a_curriculum_is_asked_for_as_the_run_will_ask(tmp_path, monkeypatch, alone):
    """Its pass rates are of the run's prompts: with their thoughts and their system turn."""
    rows = ['{"task": "math", "id": "s", "question": "4+0", "answer": "4"}',
            '{"task": "math", "id": "own", "question": "4+0", "answer": "4", "system": "Own turn."}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    asked = []

    def answers(run, *_, **__):
        prompt = training.make_prompt(run, run.data.at(0))
        asked.append(run.tokenizer.decode(prompt.ids))
        text = "<answer>\\boxed{4}</answer><think>so</think>"
        return [dict(id=name, task="math", completion=text, answer="4", image_size=None) for name in ("s", "own")]

    monkeypatch.setattr(training, "answer_heldout", answers)
    in_this_process(monkeypatch, alone)
    for options in ([], ["--think", "after", "--system-prompt", "Be short."]):
        evaluation.main(["curriculum", "--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--out",
                         str(tmp_path), "--low", "0", "--high", "1", *options])
    plain, thinking = asked
    assert "<think>" not in plain and "<think>" in thinking
    assert "Be short." not in plain and "Be short." in thinking
    kept = [json.loads(line) for line in (tmp_path / "curriculum.jsonl").read_text().splitlines()]
    assert {row["id"]: (row.get("system"), row["pass_rate"]) for row in kept} == {"s": (None, 1.0), "own": ("Own turn.", 1.0)}


def test_curriculum_writes_the_images_that_it_keeps(tmp_path, monkeypatch, alone):
    in_this_process(monkeypatch, alone)
    evaluation.main(["curriculum", "--model", "tiny", "--data", "synthetic:grounding?size=56x56", "--out",
                     str(tmp_path), "--low", "0", "--samples", "2", "--samples-per-question", "2", "--max-tokens", "4"])
    (first, _) = datasets.open_data([f"{tmp_path}/curriculum.jsonl"]).sources[0]
    assert first.images[0].size == (56, 56) and first.answer == datasets.open_data(
        ["synthetic:grounding?size=56x56"]).at(0).answer
