"""How is it written on disk? The table of published layouts, and their readers."""
import json
import re


def read_rows(path):
    """("file:line", row) of a .json list, a .parquet file, or JSONL under any other name."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise ValueError("a pickle can run any code when read, so use this data as JSON or parquet")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"parquet needs pyarrow (pip install pyarrow): {error}") from error
        rows = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise ValueError("a JSON list of rows is expected; COCO annotations open as coco:FILE")
    else:  # lines stay bytes here: each is parsed where its fault can be noted
        with path.open("rb") as file:
            yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        return
    yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows, 1))


def read_coco(path):
    """COCO instances, a row an image; crowds and boxes without area are no objects to find."""
    coco = json.loads(path.read_bytes())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = {image["id"]: [] for image in coco["images"]}
    for item in coco["annotations"]:
        x, y, w, h = item["bbox"]
        if not item.get("iscrowd") and w > 0 and h > 0:
            label = names[item["category_id"]]
            found[item["image_id"]].append({"bbox_2d": [x, y, x + w, y + h], "label": label})
    for image in coco["images"]:
        row = {"id": image["id"], "image": image["file_name"], "answer": found[image["id"]]}
        yield f"{path}: image {image['id']}", row | {"question": ", ".join(names.values())}


def read_chat(row, fields):
    """A reasoning trace: named fields, or chat messages with one question and one answer."""
    if messages := row.get("messages") or row.get("conversations"):
        turns = [(m.get("role") or m["from"], m.get("content") or m["value"]) for m in messages]
        said = {{"human": "user", "gpt": "assistant"}.get(who, who): text for who, text in turns}
        if len(said) < len(turns) or not {"user", "assistant"} <= set(said):
            raise ValueError("one user and one assistant message are expected: split the dialogue")
        fields.update(question=said["user"], response=said["assistant"], system=said.get("system"))
    return fields | {"answer": fields["answer"] or ""}  # imitation needs none


def read_fox(row, fields):
    """Fox PageOCR: the page's text is the second turn; the folder follows the language."""
    name, page = row["image"], row["conversations"][1]["value"]
    return fields | {"question": "", "answer": page, "image": f"{name[:2]}_pdf_png/{name}"}


def read_exam(row, fields):
    """MathVision and MathVerse: a letter where the row has options, else a value."""
    if row.get("problem_version", "Vision Only") != "Vision Only":  # the part that OVR reports
        return None
    question = fields["question"] or "Answer the question in the image."  # vision-only: no other
    question = re.sub(r"<image\d*>\s*", "", question).strip()
    options, letters = list(row.get("options") or []), list("ABCDEFGHIJKLMNOP")
    if options != letters[: len(options)]:  # else they are in the image
        question += "".join(f"\n{letter}. {text}" for letter, text in zip(letters, options))
    choice = options or row.get("question_type") == "multi-choice"
    return fields | {"question": question, "task": "choice" if choice else "math"}


FORMATS = {  # fields of FileSource; "a|b" is a, or b where a is missing or empty
    "jsonl": {},
    "refcoco": {"task": "grounding", "question": "captions", "answer": "bbox", "id": "ref_id"},
    "refcoco-vlmr1": {"task": "grounding", "answer": "solution"},
    "refcoco-pr1": {"task": "grounding", "answer": "normalized_solution|solution", "frame": "1000"},
    "pixmo-count": {"task": "counting", "question": "label", "answer": "points|count"},  # by hash
    "pixmo-pr1": {"task": "counting", "question": "label|question|problem", "frame": "1000",
                  "answer": "clicks|ground_truth|solution"},
    "fox": {"task": "ocr", "id": "image", "adapt": read_fox},
    "coco": {"task": "detection", "read": read_coco},
    "math500": {"task": "math", "id": "unique_id|id"},  # and AIME
    "mathvision": {"image": "decoded_image|image", "adapt": read_exam},
    "mathverse": {"id": "sample_index", "adapt": read_exam},
    "traces": {"task": "math", "question": "problem|question|prompt", "adapt": read_chat,
               "response": "response|generation|solution"}}
