"""The papers' metrics through eval.py's command: each against numbers worked by hand, each bad input."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_plots import refused, write

import eval as evaluation
import protocols

HERE = Path(__file__).parent / "fixtures" / "eval"


def scored(capsys, task, path, *options):
    """The JSON object that `eval.py metrics` prints, and that it prints nothing else."""
    evaluation.main(["metrics", "--task", task, "--predictions", str(path), *map(str, options)])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def close(got, **want):
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


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


@pytest.mark.parametrize("answer, said", [
    (7, "7"), (7.5, "7.5"), ("<answer>abc</answer>", "abc"), ("<think>hm</think><answer>abc</answer>", "abc"),
])
def test_ocr_reads_true_answers_as_the_reward_does(answer, said):
    exact = {"edit_distance": 0, "f1": 1, "precision": 1, "recall": 1}
    assert protocols.ocr({"completion": said, "answer": answer}) == exact


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
    ("ocr", {"id": 1, "completion": "a", "answer": ["a"]}, "p.jsonl:2: the true answer in ocr"),
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
