"""formats.py: every layout of the table on a small file in its true form, and what is refused."""

import base64
import json

import pytest
from PIL import Image
from small import HERE, RED, SMALL, check, one, write

import formats
from data import DataError, open_data

PNG = (HERE / "a.png").read_bytes()
CELL = {"bytes": PNG, "path": None}  # as the hub's parquet files keep an image


def parquet(folder, *rows, name="train-00000-of-00001.parquet", **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name, **options)
    return str(folder / name)


def fault(folder, row, spec=""):
    """The one fault of a row that stands beside a good one."""
    Image.open(HERE / "a.png").save(folder / "a.png")
    good = {"task": "math", "question": "q", "answer": "a", "id": "good"}
    if spec.startswith("?"):
        spec = write(folder, row) + spec
        (found,) = check([spec], **SMALL)
        return found
    (found,) = check([spec + write(folder, good, row)], **SMALL)
    return found


# ---- named fields ----


def test_own_jsonl_with_many_images_and_with_none():
    box, points, text = (one("@own.jsonl", i) for i in range(3))
    assert (box.id, box.task, box.question) == ("g", "grounding", "red block")
    assert [image.size for image in points.images] == [(112, 56), (56, 28)]
    assert points.answer == [pytest.approx([44.8, 28.0])] and points.id == "own-2"
    assert text.images == () and text.image_size is None and text.answer == "6"
    assert text.question == "2*3 <|image_pad|>"  # text: the encoder keeps it from being a slot


def test_refcoco_in_both_scales_is_one_box():
    assert one("refcoco-vlmr1:@refcoco_vlmr1.json").answer == pytest.approx(RED)
    for index in (0, 1):  # 0 … 1000 as a list and as the text of one
        assert one("refcoco-pr1:@refcoco_pr1.json", index).answer == pytest.approx(RED)
    sample = one("refcoco-pr1:@refcoco_pr1.json", 1)
    assert (sample.task, sample.question, sample.id) == ("grounding", "the block", "refcoco_pr1-2")


def test_refcoco_parquet_has_a_sample_a_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"ref_id": 8, "image_path": "a.png", "bbox": [20.0, 10.0, 60.0, 40.0],
             "captions": ["red block", "the one"], "sent_ids": [1, 2], "split": "train"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    mix = open_data([f"refcoco:{tmp_path}/r.parquet?folder={HERE}"], **SMALL)
    assert [(mix.at(i).id, mix.at(i).question) for i in range(len(mix))] == [
        ("8-0", "red block"), ("8-1", "the one")]
    assert mix.at(1).answer == pytest.approx(RED)


def test_images_inside_parquet_and_pixmo_points(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    png = {"bytes": (HERE / "a.png").read_bytes(), "path": None}
    rows = [{"image": png, "image_url": "http://x", "image_sha256": "f0", "count": 1,
             "points": [{"x": 50.0, "y": 25.0}], "label": "block"},
            {"image": png, "image_url": "http://x", "image_sha256": "f0", "count": 4,
             "points": [], "label": "dots"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    mix = open_data([f"pixmo-count:{tmp_path}/p.parquet"], **SMALL)
    assert mix.at(0).answer == [pytest.approx([56, 28])] and mix.at(1).answer == 4
    table = pyarrow.Table.from_pylist([{k: v for k, v in rows[0].items() if k != "image"}])
    parquet.write_table(table, tmp_path / "q.parquet")
    (tmp_path / "f0").write_bytes(png["bytes"])  # downloaded under its hash
    assert open_data([f"pixmo-count:{tmp_path}/q.parquet"], **SMALL).at(0).images


def test_pixmo_counts_of_perception_r1():
    assert one("pixmo-pr1:@pixmo_val.jsonl").answer == 3
    train = one("pixmo-pr1:@pixmo_train.json")  # clicks (400, 500), (100, 900) of 1000 in 112 x 56
    assert train.answer == [pytest.approx([44.8, 28.0]), pytest.approx([11.2, 50.4])]
    assert train.question == "blocks"


def test_fox_page():
    sample = one("fox:@en_page_ocr.json")
    assert (sample.answer, sample.question, sample.task) == ("Hi there", "", "ocr")
    assert sample.id == "en_1.png" and sample.response is None and sample.image_size == (56, 28)


def test_coco_boxes_labels_crowds_and_empty_images():
    mix = open_data([f"coco:{HERE}/instances_val.json"], **SMALL)
    full, empty = mix.at(0), mix.at(1)
    assert full.id == "139" and full.question == "person, toothbrush"
    assert [item["label"] for item in full.answer] == ["person", "toothbrush"]
    assert full.answer[0]["bbox_2d"] == pytest.approx(RED)
    assert full.answer[1]["bbox_2d"] == pytest.approx([0, 0, 6.16, 4.48])
    assert empty.id == "7" and empty.answer == []


def test_maths_benchmarks():
    math500 = one("math500:@math500.jsonl")
    assert (math500.id, math500.answer, math500.images) == ("test/algebra/1.json", "2", ())
    lettered, value, pictured = (one("mathvision:@mathvision.jsonl", i) for i in range(3))
    assert (lettered.task, lettered.answer) == ("choice", "A")
    assert lettered.question == "Which side is longer?\n<image>\nA. width\nB. height"
    assert (value.task, value.answer, value.question) == ("math", "1", "How many blocks? <image>")
    assert (pictured.task, pictured.question) == ("choice", "Which one? <image>")
    verse = open_data([f"mathverse:{HERE}/mathverse.json"], **SMALL)
    assert [verse.at(i).id for i in range(len(verse))] == ["5", "10"]  # vision-only rows
    assert (verse.at(0).task, verse.at(0).answer) == ("choice", "C")
    assert (verse.at(1).task, verse.at(1).answer) == ("math", "12")
    assert verse.at(0).question


def test_reasoning_traces_in_three_spellings():
    named, chat, shared = (one("traces:@traces.jsonl", i) for i in range(3))
    assert (named.question, named.response) == ("1+1?", "<think>easy</think>2")
    assert (named.answer, named.system) == ("", None)
    assert (chat.question, chat.response, chat.system) == ("2+2?", "4", "Be brief.")
    assert chat.answer == "4" and (shared.question, shared.response) == ("3+3?", "6")


def test_traces_of_open_r1(tmp_path):
    turns = [{"content": "2+2?", "role": "user"},
             {"content": "<think>\nso\n</think>\n\n\\boxed{4}", "role": "assistant"}]
    mixture = {"messages": turns, "num_tokens": 12, "source": "open-r1/OpenR1-Math-220k"}
    (tmp_path / "math").mkdir()
    parquet(tmp_path / "math", mixture)
    sample = open_data([f"traces:{tmp_path}@math/train"]).at(0)
    assert (sample.task, sample.question, sample.response) == ("math", "2+2?", turns[1]["content"])
    row = {"problem": "2+2?", "solution": "It is 4.", "answer": "4", "generations": ["a", "b"], "messages": turns}
    sample = one(f"traces:{parquet(tmp_path, row)}")
    assert (sample.answer, sample.response) == ("4", turns[1]["content"])  # not "It is 4."
    named = {"problem": "2+2?", "solution": "<think>so</think>4"}
    assert one("traces:" + write(tmp_path, named)).response == "<think>so</think>4"
    assert formats.HUB["open-r1/Mixture-of-Thoughts"] == "traces"


def test_any_other_file_by_naming_its_fields(tmp_path):
    path = write(tmp_path, {"problem": "1+2?", "solution": "3"})
    for mix in (open_data([path + "?task=math"], fields="question=problem,answer=solution"),
                open_data([path + "?task=math&question=problem&answer=solution"])):
        assert (mix.at(0).question, mix.at(0).answer) == ("1+2?", "3")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "pictures" / "b.png")
    row = {"task": "counting", "image": "b.png", "question": "dots", "answer": [[500, 250]]}
    path = write(tmp_path, row)
    mix = open_data([path + "?folder=pictures&frame=1000"], **SMALL)
    assert mix.at(0).answer == [[14.0, 7.0]]


# ---- the hub's sets ----


def test_geometry3k_as_its_parquet_has_it(tmp_path):
    path = parquet(tmp_path, {"images": [CELL], "problem": "<image>Find x.", "answer": "3 \\sqrt { 2 }"})
    sample = one(f"geometry3k:{path}")
    assert (sample.task, sample.question, sample.answer) == ("math", "<image>Find x.", "3 \\sqrt { 2 }")
    assert [image.size for image in sample.images] == [(112, 56)]


def test_virl39k_names_the_images_of_its_archive(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").write_bytes(PNG)
    row = {"question": "<image>\nHow many?\nA. 1\nB. 2", "answer": "\\boxed{B}", "qid": "q-7",
           "image": ["images/b.png"], "source": "s", "category": "c", "PassRate_32BTrained": 0.5}
    sample = one(f"virl39k:{parquet(tmp_path, row, name='39Krelease.parquet')}")
    assert (sample.id, sample.answer, sample.image_size) == ("q-7", "B", (112, 56))


@pytest.mark.parametrize("question, solution, answer", [
    ("How many items are there in the image?", "<answer> 3 </answer>", "3"),  # clevr_cogen_a_train
    ("Find AB.", "<think>As 3 + 4 = 7 …</think>\n<answer>7</answer>", "7"),  # open-r1-8k-verified
])
def test_r1v_unwraps_its_solutions(tmp_path, question, solution, answer):
    path = parquet(tmp_path, {"image": CELL, "problem": question, "solution": solution})
    sample = one(f"r1v:{path}")
    assert (sample.task, sample.question, sample.answer) == ("math", question, answer)
    assert sample.images
    counted = one(f"r1v:{path}?task=counting") if "How many" in question else None
    assert counted is None or (counted.question, counted.answer) == ("items", 3)


def test_refcoco_of_lmms_lab_is_x_y_w_h_and_a_sample_an_expression(tmp_path):
    row = {"question_id": "469306", "image": CELL, "question": "Please carefully observe …",
           "answer": ["red block", "the block"], "segmentation": [1.0, 2.0],
           "bbox": [20.0, 10.0, 40.0, 30.0], "iscrowd": 0, "file_name": "COCO_train2014_1_16.jpg"}
    mix = open_data([f"refcoco-lmms:{parquet(tmp_path, row)}"], **SMALL)
    assert [mix.at(i).question for i in range(2)] == ["red block", "the block"]
    assert mix.at(1).answer == pytest.approx(RED)  # 20, 10, 20 + 40, 10 + 30, by 1.12


def test_mmk12(tmp_path):
    row = {"id": "k-1", "question": "<image> What is x?", "answer": "$2\\pi$", "subject": "math", "image": CELL}
    sample = one(f"mmk12:{parquet(tmp_path, row)}")
    assert (sample.id, sample.question, len(sample.images)) == ("k-1", "<image> What is x?", 1)


def test_detection_of_perception_r1(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    solution = json.dumps({"target_id": [1, 90], "target_box": [RED, [0, 0, 50, 25]]})  # resized
    row = {"image": "a.png", "problem": "Please output …", "solution": solution}
    sample = one("coco-pr1:" + write(tmp_path, row))
    assert [item["label"] for item in sample.answer] == ["person", "toothbrush"]
    assert sample.answer[0]["bbox_2d"] == pytest.approx(RED)


def test_vlmevalkit_tables(tmp_path):
    text = base64.b64encode(PNG).decode()
    lines = ["index\timage\tquestion\thint\tA\tB\tC\tD\tanswer",
             f"1\t{text}\tWhich?\t\tcat\tdog\t\t\tB",
             "1000001\t1\tWhich then?\tLook.\tdog\tcat\t\t\tA"]  # the picture of row 1
    (tmp_path / "bench.tsv").write_text("\n".join(lines))
    first, second = (one(f"vlmeval:{tmp_path}/bench.tsv", i) for i in range(2))
    assert (first.id, first.task, first.answer, first.question) == ("1", "choice", "B", "Which?\nA. cat\nB. dog")
    assert second.question == "Look.\nWhich then?\nA. dog\nB. cat"
    assert first.images == second.images and first.image_size == (112, 56)


# ---- dialogues ----


CHATS = [
    {"image": "a.png", "conversations": [  # VLM-R1, LLaVA
        {"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "2"}]},
    {"images": ["a.png"], "messages": [  # LLaMA-Factory
        {"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "2"}]},
    {"images": ["a.png"], "messages": [  # OpenAI, TRL
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]},
    {"image": "a.png", "prompt": [{"role": "user", "content": "<image>How many?"}],
     "completion": [{"role": "assistant", "content": "2"}]},
    {"answer": "2", "message": json.dumps([  # MM-Eureka: a dialogue as text
        {"role": "user", "content": [{"type": "image", "image": "file://a.png"},
                                     {"type": "text", "text": "How many?"}]}])},
    {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}},
            {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "<think>Two.</think><answer>2</answer>"}]},
]


@pytest.mark.parametrize("row", CHATS)
@pytest.mark.parametrize("layout", ["chat", "jsonl"])
def test_dialogues_have_their_truth_in_the_assistants_turn(tmp_path, row, layout):
    (tmp_path / "a.png").write_bytes(PNG)
    sample = one(f"{layout}:{write(tmp_path, row)}?task=math")
    assert (sample.question, sample.answer, sample.response) == ("<image>How many?", "2", None)
    assert sample.image_size == (112, 56)


def test_a_sentence_around_a_name_gives_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    turns = [{"from": "human", "value": "<image>Please provide the bounding box coordinate of the "
              "region this sentence describes: red block"}, {"from": "gpt", "value": "[20, 10, 60, 40]"}]
    sample = one("chat:" + write(tmp_path, {"image": "a.png", "conversations": turns}) + "?task=grounding")
    assert sample.question == "red block" and sample.answer == pytest.approx(RED)
    for task, question, name in (
            ("counting", "How many red dogs are there in the image?", "red dogs"),
            ("counting", "Output all the bounding boxes of the red dogs", "red dogs"),
            ("grounding", "Output the bounding box of the man in red in the image.", "man in red"),
            ("grounding", "where many boxes are?", "where many boxes are?"),
            ("math", "How many dogs on the left are awake?", "How many dogs on the left are awake?")):
        assert formats.name_of(task, question) == name
    for task, question in (("counting", "How many dogs on the left are awake?"),
                           ("grounding", "Give the bounding box of the dog.")):
        with pytest.raises(ValueError, match="asks for a name"):
            formats.name_of(task, question)


def test_verl_by_its_nested_field(tmp_path):
    row = {"data_source": "hiyouga/geometry3k", "prompt": [{"role": "user", "content": "<image>Find x."}],
           "images": [CELL], "ability": "math", "reward_model": {"style": "rule", "ground_truth": "48"}}
    path = parquet(tmp_path, row)
    assert (one(f"verl:{path}").question, one(f"verl:{path}").answer) == ("<image>Find x.", "48")
    by_name = one(f"chat:{path}?task=math", fields="answer=reward_model.ground_truth")
    assert by_name.answer == "48"


def test_objects_of_ms_swift(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    turns = [{"role": "user", "content": "<image>Find the <ref-object>"},
             {"role": "assistant", "content": '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]'}]
    row = {"messages": turns, "images": ["a.png"],
           "objects": {"ref": ["block", "block"], "bbox": [[20, 10, 60, 40]]}}
    sample = one("chat:" + write(tmp_path, row) + "?task=detection")
    assert (sample.question, sample.answer[0]["label"]) == ("block", "block")
    assert sample.answer[0]["bbox_2d"] == pytest.approx(RED)
    turns[1]["content"] = "<bbox>"
    unit = {"ref": ["block"], "bbox": [[0.2, 0.2, 0.6, 0.8]], "bbox_type": "norm1"}
    sample = one("chat:" + write(tmp_path, row | {"objects": unit}) + "?task=grounding")
    assert sample.answer == pytest.approx(RED)  # 0.2 · 112, 0.2 · 56, 0.6 · 112, 0.8 · 56
    more = row | {"objects": {"ref": ["block"], "bbox": [[0, 0, 9, 9]] * 2}}
    (found,) = check(["chat:" + write(tmp_path, more) + "?task=grounding"])
    assert "more boxes than its turns" in found
    for objects, words in ((unit | {"image_id": [1]}, "in other images than the first"),
                           (unit | {"bbox_type": "norm1000"}, "'norm1000' is neither real nor norm1")):
        (found,) = check(["chat:" + write(tmp_path, row | {"objects": objects}) + "?task=grounding"])
        assert words in found


@pytest.mark.parametrize("turns, words", [
    ([("user", "a"), ("assistant", "b"), ("user", "c")], "split the dialogue"),
    ([("user", "a"), ("tool", "b")], "a user's and an assistant's"),
    ([("assistant", "b")], "a user's and an assistant's"),
    ([("user", [{"type": "video", "video": "x.mp4"}])], "type 'video'"),
    ([("user", None)], "a turn holds None: text or a list"),
])
def test_other_dialogues_are_refused(tmp_path, turns, words):
    row = {"messages": [{"role": who, "content": content} for who, content in turns]}
    assert words in fault(tmp_path, row | {"task": "math"})


# ---- image marks ----


@pytest.mark.parametrize("question, canonical, order", [
    ("<image>Same as <image>?", "<image>Same as <image>?", [0, 1]),
    ("<image1> or <image2>?", "<image> or <image>?", [0, 1]),
    ("<image 2> after <image 1>?", "<image> after <image>?", [1, 0]),
    ("<|image_1|><|image_2|>Which?", "<image><image>Which?", [0, 1]),
    ("<|image|><|image|>Which?", "<image><image>Which?", [0, 1]),
    ("<Image> or <IMAGE>?", "<image> or <image>?", [0, 1]),
    ("<|vision_start|><|image_pad|><|vision_end|>" * 2 + "Which?", "<image><image>Which?", [0, 1]),
    ("No mark, and <|image_pad|> is text.", "No mark, and <|image_pad|> is text.", [0, 1]),
])
def test_marks_say_where_an_image_goes(question, canonical, order):
    found, images = formats.place_images("math", question, ["0.png", "1.png"])
    assert found == canonical and images == [f"{number}.png" for number in order]


@pytest.mark.parametrize("question, images, words", [
    ("<image>Which?", 2, "the place of 1 images, the row has 2"),
    ("<image><image>Which?", 1, "the place of 2 images, the row has 1"),
    ("<image>Which?", 0, "the place of 1 images, the row has 0"),
    ("<image 1> or <image 1>?", 2, "each once"),
    ("<image 2> or <image 3>?", 2, "each once"),
    ("<image> or <image 1>?", 2, "each once"),
    ("<video>What happens?", 0, "a video: images only"),
])
def test_marks_must_be_as_many_as_images(question, images, words):
    with pytest.raises(ValueError, match=words):
        formats.place_images("math", question, ["a.png"] * images)
    with pytest.raises(ValueError, match="first image"):
        formats.place_images("counting", "<image 2> <image 1>", ["a.png"] * 2)


def test_a_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    row = {"task": "grounding", "image": "a.png", "question": "<image>\nred block", "answer": [20, 10, 60, 40]}
    assert one(write(tmp_path, row)).question == "red block"


# ---- true answers ----


@pytest.mark.parametrize("task, answer, read", [
    ("math", "<think>so</think><answer>$\\frac{1}{2}$</answer>", "\\frac{1}{2}"),
    ("math", "3 · 6 = <<3*6=18>>18\n#### 18", "18"), ("math", "<think>so</think>\n\n4", "4"), ("math", "<answer>4", "4"), ("ocr", "<think>a</think>Hi", "Hi"),
    ("math", "\\boxed{4}", "4"), ("choice", "(b).", "B"), ("counting", "<answer> 3 </answer>", 3),
])
def test_answers_wrapped_for_other_trainers_are_unwrapped(tmp_path, task, answer, read):
    (tmp_path / "a.png").write_bytes(PNG)
    row = {"task": task, "image": "a.png", "question": "q", "answer": answer}
    assert str(one(write(tmp_path, row)).answer).strip("$") == str(read)


@pytest.mark.parametrize("task, answer", [
    ("counting", -1), ("counting", 2.7), ("counting", True), ("math", ["1", "2"]), ("ocr", {"text": "a"}),
    ("math", ""), ("ocr", "  "), ("math", "['3', '4']"), ("math", "<think>still thinking"), ("ocr", "<answer> </answer>"), ("detection", [{"bbox_2d": [1, 2, 3, 4], "label": None}]),
    ("detection", [{"bbox_2d": [1, 2, 3, 4], "label": ""}]), ("choice", 2), ("math", None),
])
def test_a_truth_that_nothing_can_match_is_a_fault(tmp_path, task, answer):
    row = {"task": task, "image": "a.png", "question": "q", "answer": answer}
    assert "rows.jsonl:2: " in fault(tmp_path, row)


def test_boxes_as_x_y_w_h_are_asked_about_and_read(tmp_path):
    row = {"task": "grounding", "image": "a.png", "question": "q", "answer": [60, 10, 30, 20]}
    assert "is it x, y, w, h? then ?box=xywh" in fault(tmp_path, row)
    said = "<think>At [1, 2]?</think><answer>[20, 10, 40, 30]</answer>"
    for answer in ([20, 10, 40, 30], "[20, 10, 40, 30]", said):
        sample = one(write(tmp_path, row | {"answer": answer}) + "?box=xywh")
        assert sample.answer == pytest.approx(RED)
    items = [{"bbox_2d": [20, 10, 40, 30], "label": "block"}]
    sample = one(write(tmp_path, row | {"task": "detection", "answer": items}) + "?box=xywh")
    assert sample.answer[0]["bbox_2d"] == pytest.approx(RED)
    assert "no area" in fault(tmp_path, row | {"answer": [20, 10, 0, 30]}, "?box=xywh")
    many = [row | {"id": str(number)} for number in range(12)]
    (found,) = check([write(tmp_path, *many, row | {"answer": [1, 2, 30, 40]})])
    assert "12 rows are as this one: " in found and "?box=xywh" in found  # once, not a row a line
    assert len(check([write(tmp_path, *many, row | {"answer": [1, 2, 30, 40]}) + "?box=corners"])) == 12


def test_boxes_within_0_and_1_are_asked_about(tmp_path):
    row = {"task": "grounding", "image": "a.png", "question": "q", "answer": [0.2, 0.2, 0.6, 0.8]}
    (tmp_path / "a.png").write_bytes(PNG)
    path = write(tmp_path, row, row | {"answer": [0, 0, 1, 1]})
    (found,) = check([path], **SMALL)
    assert "is it ?frame=1" in found
    assert one(path + "?frame=1").answer == pytest.approx(RED)
    assert check([path + "?frame=pixels"], **SMALL) == []
    assert check([write(tmp_path, row, row | {"answer": [0, 0, 2, 1]})], **SMALL) == []


# ---- options ----


EXAM = {"id": "1", "question": "Which?", "answer": "B", "image": "a.png"}


@pytest.mark.parametrize("options", [
    ["cat", "dog"], "['cat', 'dog']", {"A": "cat", "B": "dog"}, ["A. cat", "B. dog"],
    ["(A) cat", "(B) dog"], {"A": "cat", "B": "dog", "C": None},
])
def test_options_in_many_spellings_are_one_question(tmp_path, options):
    (tmp_path / "a.png").write_bytes(PNG)
    sample = one("mathvision:" + write(tmp_path, EXAM | {"options": options}))
    assert (sample.task, sample.question, sample.answer) == ("choice", "Which?\nA. cat\nB. dog", "B")
    sample = one("mathvision:" + write(tmp_path, EXAM | {"options": options, "answer": "dog"}))
    assert sample.answer == "B"  # the option's own text
    sample = one("mathvision:" + write(tmp_path, EXAM | {"options": options, "answer": "(B) dog"}))
    assert sample.answer == "B"


@pytest.mark.parametrize("options, answer, words", [
    ("cat or dog", "A", "no list"), ({"1": "cat", "2": "dog"}, "A", "not A, B, C"), (["cat"], "A", "no list"),
    ([["cat"], ["dog"]], "A", "no list"), (["cat", "dog"], "C", "has 2 options"), (["cat", "dog"], 1, "one letter"),
    ([str(n) for n in range(30)], "A", "no letters"),
])
def test_options_that_are_not_clear_are_refused(tmp_path, options, answer, words):
    row = EXAM | {"options": options, "answer": answer}
    (tmp_path / "a.png").write_bytes(PNG)
    (found,) = check(["mathvision:" + write(tmp_path, EXAM, row | {"id": "2"})])
    assert words in found


def test_options_of_a_plain_row_are_asked(tmp_path):
    row = {"task": "choice", "question": "Which?", "options": ["cat", "dog"], "answer": "dog"}
    sample = one(write(tmp_path, row))
    assert (sample.question, sample.answer) == ("Which?\nA. cat\nB. dog", "B")
    listed = row | {"question": "Which?\n(A) cat (B) dog", "answer": "B"}
    assert one(write(tmp_path, listed)).question == "Which?\n(A) cat (B) dog"
    within = row | {"question": "A dog with 1 of 2 cats?", "options": ["1", "2"], "answer": "A"}
    assert one(write(tmp_path, within)).question == "A dog with 1 of 2 cats?\nA. 1\nB. 2"
    assert "is it ?task=choice" in fault(tmp_path, row | {"task": "math", "answer": "(B)"})
    open_question = row | {"task": "math", "options": ["11", "12"], "answer": "12"}
    assert one(write(tmp_path, open_question)).question == "Which?"


def test_an_image_under_another_name_is_not_left_out(tmp_path):
    for value in ("a.png", ["a.png"], {"path": "a.png"}, "data:image/png;base64,AAAA", "a.TIF",
                  base64.b64encode(PNG).decode()):
        row = {"task": "math", "question": "q", "answer": "1", "picture": value}
        assert "'picture' looks like an image: is it ?image=picture" in fault(tmp_path, row)


# ---- COCO ----


def coco(folder, **changed):
    whole = {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [20, 10, 40, 30]}],
             "categories": [{"id": 3, "name": "block"}, {"id": 9, "name": "dot"}]} | changed
    (folder / "a.png").write_bytes(PNG)
    (folder / "coco.json").write_text(json.dumps(whole))
    return f"coco:{folder}/coco.json"


def test_categories_of_one_name_are_one(tmp_path):
    names = [{"id": 3, "name": "block"}, {"id": 7, "name": "block"}, {"id": 9, "name": "dot"}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9]},
             {"id": 2, "image_id": 1, "category_id": 7, "bbox": [9, 9, 9, 9]}]
    sample = one(coco(tmp_path, categories=names, annotations=boxes))
    assert sample.question == "block, dot" and [i["label"] for i in sample.answer] == ["block"] * 2
    merged, numbers = formats.merge_categories(
        {"images": [], "annotations": boxes, "categories": names})
    assert numbers == {"block": 3, "dot": 9}
    assert [item["category_id"] for item in merged["annotations"]] == [3, 3]
    assert [c["id"] for c in merged["categories"]] == [3, 9] and boxes[1]["category_id"] == 7


@pytest.mark.parametrize("change, where, words", [
    ({"category_id": 99}, "image 1", "annotation 1: its category 99 is not among"),
    ({"bbox": [1, 2, 3]}, "image 1", "annotation 1: its bbox is not [x, y, w, h] but [1, 2, 3]"),
    ({"bbox": [9, 9, -3, 3]}, "image 1", "a side below 0"),
    ({"image_id": 5}, "annotation 1", "its image 5 is not among"),
    ({"image_id": [1]}, "annotation number 1", "needs an image_id"),
    ({"category_id": [3]}, "image 1", "annotation 1: its category [3] is not among"),
    ({"bbox": [1, 2, "x", 3]}, "image 1", "annotation 1: its bbox is not [x, y, w, h] but [1, 2, 'x', 3]"),
])
def test_a_bad_annotation_is_one_rows_fault(tmp_path, change, where, words):
    item = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [20, 10, 40, 30]} | change
    (found,) = check([coco(tmp_path, annotations=[item])])
    assert found.startswith(f"{tmp_path}/coco.json: {where}: ") and words in found


def test_an_image_without_a_name_is_one_rows_fault(tmp_path):
    (found,) = check([coco(tmp_path, images=[{"id": 1}, {"id": 2, "file_name": "a.png"}])])
    assert found == f"{tmp_path}/coco.json: image 1: an image needs an id of its own and a file_name"
    twice = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "a.png"}]
    (found,) = check([coco(tmp_path, images=twice)])  # the second one had lost its objects
    assert found == f"{tmp_path}/coco.json: image 1: an image needs an id of its own and a file_name"
    for broken in ({"categories": [{"id": 1}]}, {"annotations": None}):
        with pytest.raises(DataError, match="categor"):
            open_data([coco(tmp_path, **broken)])
