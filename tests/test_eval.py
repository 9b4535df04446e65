"""eval.py: each metric against numbers worked by hand, each bad input, runs of tiny models."""
import dataclasses
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_plots import make_run, refused, shows_something, write

import behaviours
import data as datasets
import eval as evaluation
import grpo_vl
import protocols
import rewards
import tiny
import training

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests" / "fixtures" / "eval"


def scored(capsys, task, path, *options):
    """The JSON object that `eval.py metrics` prints, and that it prints nothing else."""
    evaluation.main(["metrics", "--task", task, "--predictions", str(path), *map(str, options)])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def close(got, **want):
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


# ---- metrics ----
def test_grounding_by_hand(tmp_path, capsys):
    true, size = [0, 0, 10, 10], [28, 28]
    said = [
        "[0, 0, 10, 10]",  # IoU 1
        '```json\n[{"bbox_2d": [0, 0, 10, 20], "label": "cat"}]\n```',  # 100/200, centre (5, 10)
        "no box",
        "<think>[0, 0, 10, 10]</think><answer>[20, 20, 28, 28]</answer>",  # thoughts do not count
    ]
    rows = [{"id": i, "completion": text, "answer": true, "image_size": size}
            for i, text in enumerate(said)]
    got = scored(capsys, "grounding", write(tmp_path / "p.jsonl", *rows))
    # at 0.5 two of four, at 0.75 and 0.95 one: their mean is (2 + 1 + 1)/12
    close(got, **{"acc@0.5": 0.5, "acc@0.75": 0.25, "acc@0.95": 0.25, "acc_mean": 1 / 3,
                  "centre_acc": 0.5, "mean_iou": 0.375, "samples": 4})


def test_the_true_box_may_be_wrapped_as_trainers_wrap_it():
    row = {"completion": "[0, 0, 10, 10]", "answer": "<answer>[0, 0, 10, 10]</answer>"}
    close(protocols.grounding(row), centre_acc=1, mean_iou=1)


def test_grounding_in_the_frame_of_box_tokens(tmp_path, capsys):
    # Qwen2-VL writes 0 … 1000; in an image of 200 x 100 that is [20, 10, 100, 50].
    said = "<|box_start|>(100,100),(500,500)<|box_end|>"
    row = {"image_id": 3, "completion": said, "answer": [20, 10, 100, 50], "image_size": [200, 100]}
    close(scored(capsys, "grounding", write(tmp_path / "p.jsonl", row)), mean_iou=1, centre_acc=1)


def test_counting_by_hand(tmp_path, capsys):
    two = '[{"point_2d": [1, 2], "label": "a"}, {"point_2d": [5, 6], "label": "a"}]'
    rows = [
        {"id": 1, "completion": two, "answer": 2},
        {"id": 2, "completion": two, "answer": [[90, 90], [1, 1]]},  # the place does not matter
        {"id": 3, "completion": two, "answer": 3},
        {"id": 4, "completion": "2", "answer": [[0, 0], [1, 1]]},
        {"id": 5, "completion": "[[", "answer": 1},
    ]
    close(scored(capsys, "counting", write(tmp_path / "p.jsonl", *rows)), accuracy=0.6, samples=5)


def test_ocr_by_hand(tmp_path, capsys):
    rows = [
        # three characters and " on" of 14 are missing: 3/14; words 3 of 3 and 3 of 4
        {"id": 1, "completion": "the cat sat", "answer": "the cat sat on"},
        {"id": 2, "completion": "", "answer": "word"},  # distance 1, all else 0
    ]
    got = scored(capsys, "ocr", write(tmp_path / "p.jsonl", *rows))
    close(got, edit_distance=(3 / 14 + 1) / 2, precision=0.5, recall=0.375, f1=(6 / 7) / 2)
    # sets of words: a repeated word is one; white space is not folded: two differ in one of 3
    assert protocols.ocr({"completion": "a a b", "answer": "b a"})["f1"] == 1
    assert protocols.ocr({"completion": "a\nb", "answer": "a b"})["edit_distance"] == 1 / 3
    empty = {"edit_distance": 0, "f1": 1, "precision": 1, "recall": 1}
    assert protocols.ocr({"completion": "", "answer": ""}) == empty


def test_ocr_reads_to_the_letter_as_released():
    """The ends are not stripped, special tokens go, and of tagged thinking only the answer is read."""
    def distance(said, true):
        return protocols.ocr({"completion": said, "answer": true})["edit_distance"]

    assert distance(" ab\n", "ab") == 2 / 4  # two characters too many, of four
    assert distance("ab", "ab\n") == 1 / 3
    assert distance("ab<|im_end|>", "ab") == 0
    assert distance("<think>hm</think>\n<answer>\nab\n</answer>", "ab") == 0
    assert distance("if a < b: <b>", "if a < b: <b>") == 0


def test_ocr_of_chinese_is_cut_into_words_by_jieba(monkeypatch):
    row = {"completion": "今天很好", "answer": "今天天气很好"}
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match="pip install jieba"):
        protocols.ocr(row)
    cuts = {"今天很好": ["今天", "很", "好"], "今天天气很好": ["今天", "天气", "很", "好"]}
    monkeypatch.setitem(sys.modules, "jieba", SimpleNamespace(lcut=cuts.get))
    # two characters of six are missing; words 3 of 3 and 3 of 4
    close(protocols.ocr(row), edit_distance=2 / 6, precision=1, recall=0.75, f1=6 / 7)


def test_math_over_k_samples_by_hand(tmp_path, capsys):
    right, wrong = {"completion": r"\boxed{4}", "answer": "4"}, {"completion": "4", "answer": "4"}
    rows = [{"id": "a", **right}, {"id": "a", **right}, {"id": "a", **wrong}, {"id": "a", **wrong}]
    rows += [{"id": "b", **right, "truncated": True}] + [{"id": "b", **wrong}] * 3
    got = scored(capsys, "math", write(tmp_path / "p.jsonl", *rows))
    # a: 2 of 4, b: 0 of 4. pass@2 of a: 1 − C(2,2)/C(4,2) = 5/6
    close(got, **{"accuracy": 0.25, "pass@1": 0.25, "pass@2": 5 / 12, "pass@4": 0.5,
                  "questions": 2, "truncated": 1, "samples": 8})


def test_questions_weigh_the_same_and_k_is_the_least_number_of_samples(tmp_path, capsys):
    right, wrong = {"completion": "B", "answer": "B"}, {"completion": "A", "answer": "B"}
    rows = [{"id": 1, **right}] * 3 + [{"id": 2, **wrong}] * 5 + [{"id": 2, **right}]
    got = scored(capsys, "choice", write(tmp_path / "p.jsonl", *rows))
    # question 2: 1 of 6, pass@2 = 1 − C(5,2)/C(6,2) = 1/3, pass@3 = 1 − C(5,3)/C(6,3) = 1/2
    close(got, **{"accuracy": 7 / 12, "pass@1": 7 / 12, "pass@2": 2 / 3, "pass@3": 3 / 4})
    assert "pass@4" not in got
    mixed = {"id": 3, "task": "math", "completion": r"\boxed{7}", "answer": "7"}
    close(scored(capsys, "choice", write(tmp_path / "m.jsonl", mixed)), accuracy=1)


def test_detection_in_the_frame_of_the_annotations(capsys):
    got = scored(capsys, "detection", HERE / "detections.jsonl", "--annotations",
                 HERE / "instances.json")
    # cat: one of two found exactly once the boxes are doubled, so precision 1 up to recall 0.5:
    # 51 of 101 points, whatever the threshold. dog: what lies in the crowd is no mistake; the
    # other has IoU 31/50 = 0.62, found at 0.5, 0.55, 0.6: 3 of 10 thresholds. horse: none there.
    half = 51 / 101
    close(got, AP=(half + 0.3) / 2, AP50=(half + 1) / 2, AP75=half / 2)
    assert (got["samples"], got["images_without_prediction"]) == (2, 0)


def test_detection_of_annotations_without_area_and_crowd(tmp_path, capsys):
    truth = json.loads((HERE / "instances.json").read_text())
    for item in truth["annotations"]:
        del item["area"], item["iscrowd"]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    got = scored(capsys, "detection", HERE / "detections.jsonl", "--annotations", path)
    # The crowd is now one more dog that nobody found: precision 1/2 (after a mistake) up to recall
    # 0.5 at three of ten thresholds.
    close(got, AP=(51 / 101 + 0.3 * 51 / 101 / 2) / 2)


@pytest.mark.parametrize("said", [
    'I see a cat.\n```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]\n```',  # a sentence before the fence
    '{"bbox_2d": [0, 0, 10, 10], "label": "cat"}',  # a lone object
    '[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}, {"bbox_2d": [20, 2',  # cut by the length limit
    '[{"bbox_2d": [0, 0, 10], "label": "cat"}, {"bbox_2d": [0, 0, 10, 10], "label": "cat"}]',
])
def test_what_is_whole_in_an_answer_counts(tmp_path, capsys, said):
    row = {"id": 1, "completion": said, "answer": [{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]}
    close(scored(capsys, "detection", write(tmp_path / "p.jsonl", row)), AP=1, AR1=1)


def test_the_twelve_numbers_of_coco(tmp_path, capsys):
    """One class, four boxes of 10x10, 50x50, 50x50 and 100x100 px; the first and the last are said."""
    true = [[0, 0, 10, 10], [20, 0, 70, 50], [80, 0, 130, 50], [0, 60, 100, 160]]
    answer = [{"bbox_2d": box, "label": "cat"} for box in true]
    row = {"id": 1, "completion": json.dumps([answer[3], answer[0]]), "answer": answer}
    got = scored(capsys, "detection", write(tmp_path / "p.jsonl", row))
    # precision 1 up to recall 1/2: 51 of 101 points, whatever the threshold. Recall is 1/4 with the
    # first box alone and 1/2 with both. By area: small 1 of 1, medium 0 of 2, large 1 of 1.
    half = 51 / 101
    close(got, AP=half, AP50=half, AP75=half, APs=1, APm=0, APl=1)
    close(got, AR1=0.25, AR10=0.5, AR100=0.5, ARs=1, ARm=0, ARl=1)


def test_categories_of_one_name_are_one(tmp_path, capsys):
    truth = {"images": [{"id": 1, "width": 100, "height": 100}], "annotations": [
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40]},
        {"image_id": 1, "category_id": 7, "bbox": [50, 50, 40, 40]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]}
    path = write(tmp_path / "instances.json", truth)
    said = [{"bbox_2d": [0, 0, 40, 40], "label": "cat"}, {"bbox_2d": [50, 50, 90, 90], "label": "cat"}]
    row = {"image_id": 1, "completion": json.dumps(said), "image_size": [100, 100]}
    close(scored(capsys, "detection", write(tmp_path / "p.jsonl", row), "--annotations", path), AP=1)
    truth["annotations"][1]["category_id"] = 8
    said = refused("metrics", "--task", "detection", "--predictions", tmp_path / "p.jsonl",
                   "--annotations", write(tmp_path / "instances.json", truth))
    assert "instances.json: an annotation is of category 8, which is not in categories" in said


def test_detection_keeps_the_order_and_misses_images_without_prediction(tmp_path, capsys):
    cat, far = ({"bbox_2d": box, "label": "cat"} for box in ([0, 0, 100, 40], [0, 60, 9, 99]))
    for items, factor in (([cat, far], 1), ([far, cat], 0.5)):  # found first, or second
        row = {"image_id": 139, "completion": json.dumps(items), "image_size": [200, 100]}
        path = write(tmp_path / "p.jsonl", row)
        got = scored(capsys, "detection", path, "--annotations", HERE / "instances.json")
        close(got, AP=factor * 51 / 101 / 2, images_without_prediction=1)  # no dog was found


def test_detection_without_annotations_takes_the_answers(tmp_path, capsys):
    true = [{"bbox_2d": [0, 0, 10, 10], "label": "red circle"},
            {"bbox_2d": [20, 20, 28, 28], "label": "blue star"}]
    rows = [{"id": "x", "completion": json.dumps(true), "answer": true, "image_size": [28, 28]},
            {"id": "y", "completion": "[]", "answer": true[:1], "image_size": [28, 28]}]
    got = scored(capsys, "detection", write(tmp_path / "p.jsonl", *rows))
    close(got, AP=(51 / 101 + 1) / 2)  # a circle of two; the star
    nothing = {"id": "x", "completion": "[]", "answer": []}
    assert scored(capsys, "detection", write(tmp_path / "q.jsonl", nothing))["AP"] is None


@pytest.mark.parametrize("task, row, sentence", [
    ("ocr", "{", "p.jsonl:2: Expecting"),
    ("ocr", "[1]", 'p.jsonl:2: a row needs "id" or "image_id"'),
    ("ocr", {"completion": "a", "answer": "a"}, 'p.jsonl:2: a row needs "id"'),
    ("ocr", {"id": 1, "answer": "a"}, 'p.jsonl:2: a row needs "id"'),
    ("ocr", {"id": 1, "completion": 3, "answer": "a"}, 'text "completion"'),
    ("ocr", {"id": 1, "completion": "a"}, 'an "answer"'),
    ("ocr", {"id": 1, "completion": "a", "answer": 3}, "p.jsonl:2: the answer in ocr"),
    ("grounding", {"id": 1, "completion": "a", "answer": "a"}, "p.jsonl:2: "),
    ("grounding", {"id": 1, "completion": "a", "answer": [1, 2]}, "p.jsonl:2: the true answer in grounding: a box"),
    ("counting", {"id": 1, "completion": "a", "answer": -1}, "p.jsonl:2: the true answer in counting"),
    ("detection", {"id": 1, "completion": "[]", "answer": 5}, "p.jsonl:2: "),
    ("detection", {"id": 0, "completion": "[]", "answer": []}, "answered before"),
])
def test_a_bad_row_is_named(tmp_path, task, row, sentence):
    good = {"ocr": "a", "grounding": [0, 0, 1, 1], "counting": 1, "detection": []}[task]
    path = write(tmp_path / "p.jsonl", {"id": 0, "completion": "a", "answer": good}, row)
    assert sentence in refused("metrics", "--task", task, "--predictions", path)


@pytest.mark.parametrize("own, task", [
    ("counting", "math"), ("grounding", "choice"), ("math", "ocr"), ("choice", "counting"),
    ("ocr", "grounding"), ("counting", "detection"), ("fly", "math"), (None, "ocr"),
])
def test_rows_of_another_task_are_refused(tmp_path, own, task):
    good = {"id": 0, "completion": "[]", "answer": {"counting": 2, "detection": []}.get(task, "B")}
    path = write(tmp_path / "p.jsonl", good | {"task": task}, good | {"task": own, "id": 1})
    assert refused("metrics", "--task", task, "--predictions", path).endswith(
        f"p.jsonl:2: this row's task is {own}, but --task is {task}: give --task {own} or a file of {task} alone "
        "(math and choice may mix)")


def test_math_and_choice_mix_under_either(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl",
                 {"id": 1, "task": "choice", "completion": "B", "answer": "B"},
                 {"id": 2, "task": "math", "completion": "4", "answer": "4"})  # not in a box: wrong
    for task in ("math", "choice"):
        close(scored(capsys, task, path), accuracy=0.5, questions=2)


def test_bad_files_are_named(tmp_path):
    assert "no rows" in refused("metrics", "--task", "ocr", "--predictions", write(tmp_path / "e"))
    assert "none.jsonl" in refused("metrics", "--task", "ocr", "--predictions", "none.jsonl")
    said = HERE / "detections.jsonl"
    other = write(tmp_path / "list.json", [1])
    for annotations, sentence in ((other, "list.json: images, annot"), ("no.json", "no.json")):
        assert sentence in refused("metrics", "--task", "detection", "--predictions", said,
                                   "--annotations", annotations)
    row = {"image_id": 4, "completion": "[]"}
    assert "p.jsonl:1: its image is not there" in refused(
        "metrics", "--task", "detection", "--predictions", write(tmp_path / "p.jsonl", row),
        "--annotations", HERE / "instances.json")


def test_detection_of_a_category_that_is_not_annotated(tmp_path, capsys):
    cat, unknown = ({"bbox_2d": [0, 0, 100, 40], "label": label} for label in ("cat", "unicorn"))
    row = {"image_id": 139, "completion": json.dumps([unknown, cat]), "image_size": [200, 100]}
    path = write(tmp_path / "p.jsonl", row)
    got = scored(capsys, "detection", path, "--annotations", HERE / "instances.json")
    close(got, AP=51 / 101 / 2)  # as without the unicorn: the cat is found first; no dog was


def test_metrics_shows_the_papers_rows_on_stderr(tmp_path, capsys):
    row = {"id": 1, "completion": "a b", "answer": "a b"}
    evaluation.main(["metrics", "--task", "ocr", "--predictions", str(write(tmp_path / "p.jsonl", row))])
    shown = capsys.readouterr().err
    assert "measured here: 0.0 100.0 100.0 100.0" in shown and "Perception-R1 2B 8.4 96.9 97.2 96.7" in shown


def test_the_papers_row_stands_beside(capsys):
    table = protocols.beside_paper("detection", {"AP": 0.5, "AP50": None, "AP75": 0.123})
    assert "measured here: 50.0 - 12.3" in table
    assert "Perception-R1 3B 31.9 46.7 33.4" in table and "Qwen2.5-VL-3B 16.1" in table
    one = dict.fromkeys(("acc@0.5", "acc@0.75", "acc@0.95", "acc_mean", "accuracy", "f1",
                         "edit_distance", "precision", "recall"), 1)
    for task, number in {"grounding": "89.1 79.5 35.0 67.9", "counting": "78.1", "ocr": "2.8 98.2",
                         "math": "OVR-7B 95.3", "choice": "OVR-7B 51.8"}.items():
        assert number in protocols.beside_paper(task, one)
    table = protocols.beside_paper("grounding", one)
    for split in ("RefCOCO testA   Qwen2-VL-2B 89.6 80.6 35.7 68.6   Perception-R1 2B 91.4 83.6 38.5 71.2",
                  "RefCOCO testB   Qwen2-VL-2B 82.0 70.1 26.9 59.7   Perception-R1 2B 84.5 72.4 28.8 61.9",
                  "RefCOCO+ testA  Qwen2-VL-2B 82.5 73.8 32.3 62.9   Perception-R1 2B 86.8 79.3 36.9 67.7",
                  "RefCOCO+ testB  Qwen2-VL-2B 70.1 60.0 23.0 51.0   Perception-R1 2B 74.3 64.2 26.7 55.1"):
        assert split in table


# ---- behaviours ----
@pytest.mark.parametrize("text, shown", [
    ("Let me see the image again.", "visual reflection"),
    ("Wait, the figure shows a cube.", "visual reflection"),
    ("This approach won't work because it is odd.", "backtracking"),
    ("My previous assumption about the sequence was wrong.", "backtracking"),
    ("Let's first look at the numbers on the left.", "visual divide-and-conquer"),
    ("First, we need to find x.", "subgoal setting"),
    ("I will now verify this against the image.", "visual verification"),
    ("Let me check that 3 + 4 = 7.", "verification"),
    ("To get this answer, I need to find an object that is red.", "goal-driven visual tracing"),
    ("To get 75, we need a number divisible by 5.", "backward chaining"),
])
def test_the_lexicon_finds_each_behaviour(text, shown):
    assert behaviours.lexicon_count(shown, {"completion": f"It is so. {text} Done."}) == 1
    plain = "The image shows a cat. Its area is 12. So the answer is 4."
    assert behaviours.lexicon_count(shown, {"completion": plain}) == 0


def test_rates_and_transfer_by_hand(tmp_path, capsys):
    texts = ["This won't work. Let me see the image again.", "That was wrong. That is incorrect.",
             "That was wrong.", "Fine."]
    rows = [{"id": i, "completion": text} for i, text in enumerate(texts)]
    paths = [write(tmp_path / name, *rows[:n]) for name, n in (("a.jsonl", 4), ("b.jsonl", 3))]
    picture = tmp_path / "b.png"
    evaluation.main(["behaviours", "--predictions", *map(str, paths), "--plot", str(picture)])
    got = json.loads(capsys.readouterr().out)
    first, second = got["files"].values()
    # one of four looks again; three of four, however often, take something back
    assert (first["rates"]["visual reflection"], first["rates"]["backtracking"]) == (0.25, 0.75)
    assert first["transfer"]["visual reflection"] == pytest.approx(1 / 3)
    assert first["transfer"]["visual verification"] is None and got["judge"] == "lexicon"
    assert second["rates"]["backtracking"] == 1 and second["answers"] == 3
    assert shows_something(picture)


@pytest.fixture
def judge():
    """An endpoint that finds two verifications in "good", none elsewhere, and stays vague once."""
    class Endpoint(BaseHTTPRequestHandler):
        seen: list = []  # noqa: RUF012

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append((self.path, self.headers["Authorization"], body))
            prompt = body["messages"][0]["content"]
            count = 2 if "good" in prompt and "for verification" in prompt else 0
            said = "I can not say" if "vague" in prompt else f"Well: <count> {count} </count>"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Endpoint.seen
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_as_published(tmp_path, capsys, monkeypatch, judge):
    url, seen = judge
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    rows = [{"id": i, "question": "How many?", "completion": text}
            for i, text in enumerate(("good", "bad", "vague"))]
    path = write(tmp_path / "p.jsonl", *rows)
    by = ["--judge", url, "--judge-model", "m"]
    evaluation.main(["behaviours", "--predictions", str(path), *by])
    (result,) = json.loads(capsys.readouterr().out)["files"].values()
    assert result["rates"]["verification"] == 0.5 and result["rates"]["backtracking"] == 0
    assert result["unjudged"] == 8  # the vague answer, once a behaviour
    assert len(seen) == 24  # in any order: eight are asked at a time
    for path, key, body in seen:
        prompt = body["messages"][0]["content"]
        assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
        assert prompt.startswith('Problem Statement: "How many?"\n\nModel\'s Reasoning: "')
        assert prompt.endswith("If none, use <count>0</count>.")


def test_a_judge_that_is_not_there(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": 1, "completion": "x"})
    command = ["behaviours", "--predictions", path, "--judge", "http://127.0.0.1:9/v1"]
    assert "belong together" in refused(*command)
    assert "no answer to a chat completion" in refused(*command, "--judge-model", "m")


# ---- averages ----
def save_model(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def test_average_by_hand(tmp_path):
    # In bf16 1 + 1/128 is exact and 3·(1 + 1/128) is not: adding in fp32 keeps the mean exact.
    fine = torch.tensor([1 + 1 / 128, 0.0], dtype=torch.bfloat16)
    models = [save_model(tmp_path / str(i), w=torch.tensor([float(i), -1.0]), b=fine)
              for i in (1, 2, 6)]
    evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean["w"].tolist() == [3.0, -1.0] and mean["b"].dtype == torch.bfloat16
    assert torch.equal(mean["b"], fine)
    assert (tmp_path / "mean" / "config.json").read_text() == '{"a": 1}'


def test_average_reads_like_any_file(tmp_path):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    mask = os.umask(0o027)
    try:
        evaluation.main(["average", *map(str, models), "--out", str(tmp_path / "mean")])
    finally:
        os.umask(mask)
    assert (tmp_path / "mean" / "model.safetensors").stat().st_mode & 0o777 == 0o640  # 666 less 027


def test_average_of_checkpoints_that_are_cut_otherwise(tmp_path):
    """One file there, two here: tensors are found by name, and the first one's files are kept."""
    one = save_model(tmp_path / "one", w=torch.tensor([1.0]), v=torch.tensor([2.0]))
    two = tmp_path / "two"
    two.mkdir()
    for name, value in (("w", 3.0), ("v", 6.0)):
        save_file({name: torch.tensor([value])}, two / f"model-{name}.safetensors")
    evaluation.main(["average", str(two), str(one), "--out", str(tmp_path / "mean")])
    got = {file.name: load_file(file) for file in (tmp_path / "mean").glob("*.safetensors")}
    assert got["model-w.safetensors"]["w"].item() == 2 and got["model-v.safetensors"]["v"].item() == 4


def test_averages_that_can_not_be_made(tmp_path):
    out = tmp_path / "out"
    one = save_model(tmp_path / "one", w=torch.zeros(2))
    wide = save_model(tmp_path / "wide", w=torch.zeros(3))
    assert "w is [2] in" in (said := refused("average", one, wide, "--out", out)) and "[3] in" in said
    more = save_model(tmp_path / "more", **{"w": torch.zeros(2), "lm_head.weight": torch.zeros(2)})
    for pair in ((one, more), (more, one)):
        said = refused("average", *pair, "--out", out)
        assert "do not have the same tensors" in said and f"lm_head.weight is in {more} alone" in said
    assert "no safetensors" in refused("average", one, HERE, "--out", out)
    broken = save_model(tmp_path / "broken", w=torch.zeros(2))
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "broken/model.safetensors: " in refused("average", one, broken, "--out", out)
    assert "must be a new folder" in refused("average", one, one, "--out", tmp_path)
    assert "two checkpoints" in refused("average", one, "--out", out)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"one", "wide", "more", "broken"}  # nothing was written


def test_a_failed_average_does_not_block_the_next_try(tmp_path, monkeypatch):
    models = [save_model(tmp_path / name, w=torch.zeros(2)) for name in ("a", "b")]
    command = ["average", *models, "--out", tmp_path / "mean"]

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        assert "no space left" in refused(*command)
    assert not (tmp_path / "mean").exists()
    evaluation.main([*map(str, command)])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "mean"}


# ---- with a model ----
SCENES = "synthetic:grounding?size=56x56&distractors=0-1&reach=0.3-0.5"


def run_script(*arguments, ranks=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "eval.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_every_option_has_a_place_in_the_help(capsys):
    for command in ("demo", "run", "metrics", "behaviours", "plot", "show", "average"):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([command, "--help"])
        assert stop.value.code == 0 and command in capsys.readouterr().out
    for unknown in (["plot", "x", "--colour", "red"], ["fly"], []):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(unknown)
        assert stop.value.code == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two untrained tiny models."""
    import grpo_vl

    folders = []
    for seed, name in enumerate(("coldstart", "grpo")):
        folders.append(make_run(tmp_path_factory.mktemp("runs") / name))
        tokenizer = tiny.tiny_tokenizer()
        model = tiny.tiny_model(tokenizer, seed=seed)
        model.save_pretrained(folders[-1] / "model")
        tokenizer.save_pretrained(folders[-1] / "model")
        config = grpo_vl.Config(model="tiny", data=[SCENES], max_tokens=12, checkpointing=False)
        text = json.dumps(dataclasses.asdict(config))
        (folders[-1] / "config.json").write_text(text)
    return folders


def test_demo_compares_two_models(runs, tmp_path):
    out, _ = run_script("demo", *runs, "--samples", 6, "--out", tmp_path)
    assert "6 samples" in out and "greedy" in out and "sampled" in out
    table = json.loads((tmp_path / "table.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert len(answers) == 2 * 2 * 6 and table["data"] == [SCENES]
    for model in ("before", "after"):
        for mode in ("greedy", "sampled"):
            rows = [r for r in answers if (r["model"], r["mode"]) == (model, mode)]
            right = [rewards.correct("grounding", r["completion"], r["answer"]) for r in rows]
            assert table[model][mode] == sum(right) / 6
    assert {r["id"].split("-")[2] for r in answers} == {"heldout"}
    assert shows_something(tmp_path / "curve.png") and shows_something(tmp_path / "rollouts.png")
    assert not any(runs[1].glob("eval"))  # all went to --out


def test_demo_needs_models(tmp_path, runs):
    assert "finish the run" in refused("demo", tmp_path, runs[1])
    old = tmp_path / "old"
    (old / "model").mkdir(parents=True)
    (old / "config.json").write_text('{"colour": "red"}')
    assert "old/config.json: the field 'eval_data'" in refused("demo", runs[0], old)


def test_run_answers_and_scores_on_two_ranks(runs, tmp_path):
    out, beside = run_script("run", "--model", runs[0] / "model", "--task", "grounding", "--data",
                             SCENES, "--out", tmp_path, "--samples", 5, "--max-tokens", 8,
                             "--samples-per-question", 2, ranks=2)
    got = json.loads(out)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert got["samples"] == len(rows) == 10 and len({row["id"] for row in rows}) == 5
    assert "Perception-R1 2B" in beside and "measured here" in beside
    again = protocols.read_predictions(tmp_path / "predictions.jsonl", answers=True)
    close(got, **protocols.score_predictions("grounding", again))


def in_this_process(monkeypatch, alone):
    """The command shares the tests' world of one and leaves it standing."""
    import fsdp

    monkeypatch.setattr(fsdp, "start_processes", lambda timeout: alone)
    monkeypatch.setattr(fsdp, "leave", lambda: None)


@pytest.mark.parametrize("task, penalty", [("grounding", 1.05), ("counting", 1.0)])
def test_only_grounding_is_decoded_with_a_repetition_penalty(tmp_path, monkeypatch, alone, task, penalty):
    from sampler import Sampler

    seen, generate = [], Sampler.generate

    def record(self, prompts, noise, max_tokens, **options):
        seen.append((len(prompts), noise, max_tokens, options))
        return generate(self, prompts, noise, max_tokens, **options)

    monkeypatch.setattr(Sampler, "generate", record)
    in_this_process(monkeypatch, alone)
    evaluation.main(["run", "--model", "tiny", "--task", task, "--data", f"synthetic:{task}?size=56x56",
                     "--out", str(tmp_path), "--samples", "2", "--max-tokens", "4"])
    assert seen == [(2, None, 4, {"repetition_penalty": penalty})]  # greedily
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_run_asks_as_in_training_if_told_and_leaves_several_answers_to_an_image_unscored(tmp_path, monkeypatch, alone, capsys):
    """[PR1 code] evaluates detection with another prompt than it trains; AP takes one answer an image."""
    from sampler import Sampler

    asked, penalties, generate = [], [], Sampler.generate

    def record(self, prompts, noise, max_tokens, **options):
        asked.extend(prompt.ids for prompt in prompts)
        penalties.append(options["repetition_penalty"])
        return generate(self, prompts, noise, max_tokens, **options)

    monkeypatch.setattr(Sampler, "generate", record)
    in_this_process(monkeypatch, alone)
    run = ["run", "--model", "tiny", "--out", str(tmp_path), "--samples", "2", "--max-tokens", "4", "--task"]
    evaluation.main([*run, "grounding", "--data", "synthetic:grounding?size=56x56", "--prompts", "training"])
    detection = [*run, "detection", "--data", "synthetic:detection?size=56x56", "--samples-per-question", "2"]
    evaluation.main(detection)
    evaluation.main([*detection, "--prompts", "training"])
    assert penalties == [1.0] * 3
    tokenizer = tiny.tiny_tokenizer()
    asked_for = [tokenizer.decode(ids).partition("<|vision_end|>")[2] for ids in asked[2:]]
    assert all(text.startswith("Locate every item") for text in asked_for[:2])
    assert all(text.startswith("Please output bbox coordinates and names of circle") for text in asked_for[2:])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and said.err.count("unscored: AP is of one answer an image") == 2
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4


def test_run_refuses_data_of_another_task_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("a model was loaded"))
    row = {"task": "math", "question": "1+1", "answer": "2"}
    mixed = write(tmp_path / "mixed.jsonl", row, row | {"task": "choice", "answer": "B"})
    run = ["run", "--model", "tiny", "--out", tmp_path / "out", "--task"]
    for task, data, own in (("grounding", "synthetic:counting?size=56x56", "counting"), ("ocr", mixed, "math")):
        said = refused(*run, task, "--data", data)
        assert f"this row's task is {own}, but --task is {task}" in said
    assert "mixed.jsonl:1: " in said and not (tmp_path / "out").exists()
    assert "none.jsonl" in refused(*run, "ocr", "--data", tmp_path / "none.jsonl")
    assert "none.json" in refused(*run, "detection", "--data", mixed, "--annotations", "none.json")
    config = grpo_vl.Config(model="tiny", data=(str(mixed),), eval_data=(str(mixed),), eval_every=1)
    evaluation.check_data(config, "math")  # these two may mix


@pytest.fixture
def no_model(monkeypatch):
    import fsdp

    monkeypatch.setattr(fsdp, "start_processes", lambda *_: pytest.fail("processes were started"))


def hub_with(monkeypatch, *, reply=None, offline=False, cached=None):
    """A hub that replies with an exception, or that may not be asked."""
    import huggingface_hub

    def ask(request, timeout):
        assert request.full_url.endswith("/api/models/who/what") and timeout <= 10
        raise reply

    monkeypatch.setattr(urllib.request, "urlopen", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)


def test_a_model_that_is_not_there_is_said_at_once(tmp_path, monkeypatch, no_model):
    run = ["run", "--task", "counting", "--data", "synthetic:counting?size=56x56", "--out", tmp_path, "--model"]
    assert "no such folder" in refused(*run, "runs/none/model")
    assert "of a run, give RUN/model" in refused(*run, tmp_path)
    hub_with(monkeypatch, reply=urllib.error.URLError("Name or service not known"))
    assert "can not be reached" in (said := refused(*run, "who/what")) and "give the folder" in said
    hub_with(monkeypatch, reply=urllib.error.URLError("down"), cached="/cache/config.json")
    assert "set HF_HUB_OFFLINE=1: it is on this machine" in refused(*run, "who/what")
    hub_with(monkeypatch, reply=urllib.error.HTTPError("", 401, "Unauthorized", {}, None))
    assert "says 401 Unauthorized: is the name right" in refused(*run, "who/what")
    hub_with(monkeypatch, offline=True)
    assert "is not on this machine (HF_HUB_OFFLINE)" in refused(*run, "who/what")
    with pytest.raises(SystemExit, match="no such folder"):
        evaluation.main(["curriculum", "--model", "a b", "--data", "x", "--out", str(tmp_path)])


@pytest.mark.parametrize("task, module, package", [
    ("ocr", "rapidfuzz", "rapidfuzz"), ("detection", "pycocotools", "pycocotools"), ("math", "math_verify", "math-verify"),
])
def test_a_missing_package_is_said_before_anything_is_answered(tmp_path, monkeypatch, no_model, task, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    run = ["run", "--task", task, "--data", f"synthetic:{task}?size=56x56", "--out", tmp_path, "--model", "tiny"]
    assert f"pip install {package}" in refused(*run)


@pytest.fixture
def questions(monkeypatch, alone):
    """(system prompt, images) of each question that a run asks; no model answers."""
    import qwen_vl
    from sampler import Sampler

    asked, encode = [], qwen_vl.encode_chat

    def record(tokenizer, special, text, images, system):
        asked.append((system, images))
        return encode(tokenizer, special, text, images, system)

    def say_nothing(self, prompts, noise, max_tokens, **_):
        return [[qwen_vl.Completion(tokens=[])] for _ in prompts]

    monkeypatch.setattr(qwen_vl, "encode_chat", record)
    monkeypatch.setattr(Sampler, "generate", say_nothing)
    in_this_process(monkeypatch, alone)
    return asked


RUN = ["run", "--model", "tiny", "--task", "grounding", "--data", "synthetic:grounding?size=84x56", "--samples", "2"]


@pytest.mark.parametrize("option, system", [
    ([], "You are a helpful assistant."), (["--system-prompt", "Look twice."], "Look twice."),
    (["--system-prompt", ""], ""),
])
def test_run_takes_a_system_prompt(tmp_path, questions, option, system):
    evaluation.main([*RUN, "--out", str(tmp_path), *option])
    assert [asked for asked, _ in questions] == [system] * 2


def test_a_blind_run_sees_grey_images_of_the_same_size(tmp_path, questions, capsys):
    evaluation.main([*RUN, "--out", str(tmp_path), "--blind"])
    assert json.loads(capsys.readouterr().out)["blind"] is True
    for _, (image,) in questions:
        assert image.size == (84, 56) and image.getcolors() == [(84 * 56, (128, 128, 128))]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert len(rows) == 2 and rows[0]["image_size"] == [84, 56]  # the same questions and answers
    assert rows[0]["answer"] == datasets.open_data(RUN[6:7], split="heldout").at(0).answer


def test_the_protocol_has_every_task():
    """Tokens, samples, penalty: [PR1 code] answers greedily, with 1.05 for grounding alone."""
    table = protocols.PROTOCOLS
    assert set(table) == set(rewards.TASKS) == set(protocols.PROMPTS)
    grounding = table["grounding"]
    assert (grounding.max_tokens, grounding.samples, grounding.penalty) == (512, 1, 1.05)
    assert [task for task in table if table[task].penalty != 1] == ["grounding"]


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


def test_curriculum_writes_the_images_that_it_keeps(tmp_path, monkeypatch, alone):
    in_this_process(monkeypatch, alone)
    evaluation.main(["curriculum", "--model", "tiny", "--data", "synthetic:grounding?size=56x56", "--out",
                     str(tmp_path), "--low", "0", "--samples", "2", "--samples-per-question", "2", "--max-tokens", "4"])
    (first, _) = datasets.open_data([f"{tmp_path}/curriculum.jsonl"]).sources[0]
    assert first.images[0].size == (56, 56) and first.answer == datasets.open_data(
        ["synthetic:grounding?size=56x56"]).at(0).answer
