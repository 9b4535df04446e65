"""How is it written on disk? From a row to the fields of a sample: the table of published layouts.

§1 a row's fields · §2 layouts that names of fields cannot say · §3 the table
"""
import ast
import json
import re

from readers import true_numbers
from rewards import PLACED
from rows import read_rows

IMAGE_MARK = "<image>"  # in a question: an image goes here
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SENTENCES = {  # around a name, as published; and what else tells a sentence
    "grounding": ((r".*\bsentence describes:?\s*(.+)",  # VLM-R1
                   r"output the bounding box of the (.+) in the image\.?"),  # [PR1 T8]
                  r"\bbounding box|\bcoordinates?\b"),
    "counting": ((r"(?:how many|what number of) (.+?) are there(?: in (?:the|this) "
                  r"(?:image|picture|photo))?\s*\?",  # MMR1, R1-V
                  r"output all the bounding boxes of the (.+?)\.?"),  # [PR1 T8]
                 r"^(how many|what number of|(what is )?the number of)\b|\bbounding box"),
}


# §1 ─────────────────────────────────── a row's fields ───────────────────────────────────────


def pick(row, names):
    """The first of "a|b.c" that is not empty, else the first that is there; None without any."""
    found = []
    for name in names.split("|"):
        value = row.get(name)
        if name not in row and "." in name:
            value = row
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    for value in found:
        if value not in ("", []):
            return value
    return found[0] if found else None


def place_images(task, question, images):
    """(question with as many IMAGE_MARKs as images or none, the images in their order).

    <image>, <image1>, <image 2>, <|image_3|>, Qwen's own three: each says where an image goes.
    """
    slot = r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>"
    marker = rf"(?i)<\|?image[ _]?(\d*)\|?>|{slot}"
    if "<video>" in question:
        raise ValueError("the question marks the place of a video: images only")
    numbers = re.findall(marker, question)
    if not numbers:
        return question, images
    if len(numbers) != len(images):
        raise ValueError(f"the question marks the place of {len(numbers)} images, the row has "
                         f"{len(images)}: one mark an image, or none for images first")
    if any(numbers):
        order = [int(number or -1) for number in numbers]
        first = min(order)
        if first not in (0, 1) or sorted(order) != [*range(first, first + len(order))]:
            raise ValueError(f"the question numbers its images {numbers}: each once, from 1")
        if task in PLACED and order != sorted(order):
            raise ValueError("the answer lies in the first image: let the question name it first")
        images = [images[number - first] for number in order]
    question = re.sub(marker, IMAGE_MARK, question)
    if task in PLACED and len(images) == 1:
        question = question.replace(IMAGE_MARK, "").strip()  # it is a name in our prompt
    elif task in PLACED:
        question = re.sub(rf"^(\s*{IMAGE_MARK}\s*)+", "", question)
    return question, images


def name_of(task, question):
    """The name that grounding and counting ask for, out of the sentence that others put round it.

    ValueError for a sentence of which that cannot be said: our prompt around it would be nonsense.
    """
    known, suspect = SENTENCES.get(task, ((), None))
    for sentence in known:
        told = re.fullmatch(f"(?is){sentence}", question)
        if told:
            return told[1].strip()
    if suspect and re.search(f"(?i){suspect}", question):
        raise ValueError(f"{task} asks for a name, not {question!r:.80}: put the name in its "
                         "field, or ask the question as it stands with ?task=math")
    return question


def from_xywh(answer):
    """The answer with each box [x, y, w, h] as [x1, y1, x2, y2]; JSON as text is read first."""
    if isinstance(answer, str):
        found = re.search(r"(?s)[\[{].*[\]}]", answer)
        return from_xywh(json.loads(found[0])) if found else answer
    if isinstance(answer, dict):
        boxes = {key: from_xywh(answer[key]) for key in ("bbox_2d", "target_box") if key in answer}
        return answer | boxes
    if not isinstance(answer, list):
        return answer
    if len(answer) != 4 or isinstance(answer[0], (list, dict)):
        return [from_xywh(item) for item in answer]
    x, y, width, height = map(float, answer)
    if not (width > 0 and height > 0):
        raise ValueError(f"the box {answer} (x, y, w, h) has no area")
    return [x, y, x + width, y + height]


# §2 ───────────────────── layouts that names of fields cannot say ────────────────────────────
# Each takes a row and what was picked from it; it returns the fields, or None without a sample.


def read_chat(row, fields):
    """A dialogue of one question: the truth is the assistant's turn, unless the row names it."""
    said, images = turns_of(row)
    if not said:
        return fields
    if row.get("objects"):
        said, fields = read_objects(row["objects"], said, fields)
    if fields["answer"] is None:
        fields["answer"] = said.get("assistant")
    fields["system"] = fields["system"] or said.get("system")
    fields["image"] = images or fields["image"]
    if fields["question"] is None or isinstance(fields["question"], list):
        fields["question"] = said["user"]  # verl's "prompt" is the dialogue
    return fields


def read_trace(row, fields):
    """A reasoning trace to imitate: named fields, or the assistant's turn of a dialogue."""
    answer = fields["answer"]
    fields = read_chat(row, fields)
    if fields["response"] is None:  # OpenR1-Math: "solution" is a person's, without the trace
        fields["response"] = turns_of(row)[0].get("assistant", row.get("solution"))
    return fields | {"answer": answer}


def turns_of(row):
    """({"user": text, "assistant": text, …}, images in them) of a dialogue; ({}, []) without."""
    said, images = {}, []
    for name in ("messages", "conversations", "conversation", "message", "prompt"):
        turns = row.get(name)
        if isinstance(turns, str) and turns.lstrip().startswith("[{"):
            turns = json.loads(turns)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            break
    else:
        return said, images
    if isinstance(row.get("completion"), list):  # TRL
        turns = turns + row["completion"]
    names = {"human": "user", "gpt": "assistant"}
    for turn in turns:
        who = turn.get("role") or turn.get("from")
        who = names.get(who, who)
        if who in said:
            raise ValueError("one user and one assistant message are expected: split the dialogue")
        content = turn.get("content")
        said[who], found = read_content(turn.get("value") if content is None else content)
        images += found
    unknown = said.keys() - {"system", "user", "assistant"}
    if unknown or "user" not in said:
        raise ValueError(f"a dialogue of {', '.join(map(str, said))}: a user's and an assistant's "
                         "turn are expected, and perhaps a system's")
    return said, images


def read_content(content):
    """(text, images) of a turn: text, or a list of parts as OpenAI, TRL and Qwen write them."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError(f"a turn holds {content!r:.60}: text or a list of parts is expected")
    texts, images = [], []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"])
        elif part["type"] in ("image", "image_url"):
            texts.append(IMAGE_MARK)
            found = pick(part, "image|image_url.url|image_url|url|path|base64")
            images += [found] if found else []
        else:
            raise ValueError(f"a turn holds a part of type {part['type']!r}: text and image only")
    return "".join(texts), images


def read_objects(objects, said, fields):
    """ms-swift: each <ref-object> and <bbox> of the turns stands for the next of `objects`."""
    if any(objects.get("image_id") or ()):
        raise ValueError("objects have boxes in other images than the first (image_id): ours "
                         "lie in the first")
    if objects.get("bbox_type") not in (None, "real", "norm1"):
        raise ValueError(f"bbox_type {objects['bbox_type']!r} is neither real nor norm1")
    values = {"<ref-object>": list(objects.get("ref") or ()), "<bbox>": list(objects["bbox"])}
    if "<bbox>" in said["user"]:
        raise ValueError("a box in the question is not read: it could not follow the image's size")
    asked = []

    def fill(mark):
        if not values[mark[0]]:
            raise ValueError(f"there are more {mark[0]} in the turns than in the row's objects")
        value = values[mark[0]].pop(0)
        asked.append(value)
        return value if mark[0] == "<ref-object>" else json.dumps(value)

    filled = {"user": re.sub("<ref-object>", fill, said["user"])}
    names = ", ".join(dict.fromkeys(asked))
    filled["assistant"] = re.sub("<ref-object>|<bbox>", fill, said.get("assistant", ""))
    if values["<bbox>"]:
        raise ValueError("the row's objects have more boxes than its turns have <bbox>")
    if asked and names and fields["task"] in PLACED:
        filled["user"] = names  # the names alone: our prompt stands around them
    if objects.get("bbox_type") == "norm1":
        fields["frame"] = 1
    return said | filled, fields


def read_fox(row, fields):
    """Fox PageOCR: the page's text is the second turn; the folder follows the language."""
    name, page = row["image"], row["conversations"][1]["value"]
    return fields | {"question": "", "answer": page, "image": f"{name[:2]}_pdf_png/{name}"}


def read_plain(row, fields):
    """Named fields; without a question, a dialogue; with options, a question that lists them."""
    fields = read_chat(row, fields)
    names = "options", "choices"
    lettered = re.fullmatch(r"\(?[A-Z][).]?", str(fields["answer"]))
    if fields["task"] == "math" and lettered and pick(row, "|".join(names)):
        raise ValueError("the row has options and its answer is a letter: is it ?task=choice")
    if fields["task"] != "choice" or not isinstance(fields["question"], str):
        return fields
    options = read_options(row, names)
    question = ask_options(fields["question"], options)
    return fields | {"question": question, "answer": letter_of(fields["answer"], options)}


def read_exam(row, fields):
    """A letter where the row has options, else a value."""
    if row.get("problem_version", "Vision Only") != "Vision Only":  # the part that OVR reports
        return None
    question = fields["question"] or "Answer the question in the image."  # vision-only: no other
    marks = re.findall(r"<image\d+>", question)
    if len(fields["image"]) == 1 < len(marks) == len(set(marks)):  # MathVision: one picture of all
        for mark in marks[1:]:
            question = question.replace(mark, "")
    if row.get("hint"):
        question = f"{row['hint']}\n{question}"
    options = read_options(row, ("options", "choices", *LETTERS))
    fields = fields | {"task": "math", "question": ask_options(question, options)}
    if options or row.get("question_type") == "multi-choice":
        fields["task"] = "choice"
        fields["answer"] = letter_of(fields["answer"], options)
    return fields


def ask_options(question, options):
    """The question with a line an option, unless it has them or they are letters in the image."""
    pairs = [*zip(LETTERS, options)]
    if all(re.search(rf"\b{letter}\W{{1,3}}{re.escape(text)}", question) for letter, text in pairs):
        return question
    if options == [*LETTERS[: len(options)]]:
        return question
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in pairs)])


def letter_of(answer, options):
    """The letter of an answer that may be an option's own text; ValueError beyond the last."""
    if isinstance(answer, str) and options.count(answer) == 1 and answer not in [*LETTERS]:
        return LETTERS[options.index(answer)]
    for letter, text in zip(LETTERS, options):
        if re.fullmatch(rf"\(?{letter}[).:]\s*{re.escape(text)}", str(answer)):
            return letter  # "B. dog"
    letter = re.sub(r"\W", "", str(answer)).upper()
    if options and letter in [*LETTERS[len(options) :]]:
        raise ValueError(f"the answer is {answer!r}, but the row has {len(options)} options")
    return answer


def read_options(row, names):
    """The texts of a row's options: a list, a list as text, or fields by letter; [] without."""
    options = pick(row, "|".join(names[:2]))
    if options in (None, ""):
        options = {key: row[key] for key in names[2:] if row.get(key) is not None}
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)  # reads literals and runs nothing
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"the options are text that is no list: {options!r:.60}") from error
    if isinstance(options, dict):
        options = {key: text for key, text in options.items() if text is not None}
        if [*options] != [*LETTERS[: len(options)]]:
            raise ValueError(f"the options are {', '.join(map(str, options))}: not A, B, C, …")
        options = [*options.values()]
    options = list(options or ())
    if any(not isinstance(text, (str, int, float)) for text in options) or len(options) == 1:
        raise ValueError(f"the options are no list of texts: {options!r:.60}")
    texts = [str(text) for text in options]
    if len(texts) > len(LETTERS):
        raise ValueError(f"the row has {len(texts)} options: there are no letters for them")
    lettered = [re.fullmatch(rf"(?s)\(?{letter}[).:]\s*(.+)", text)
                for letter, text in zip(LETTERS, texts)]
    return [found[1] for found in lettered] if all(lettered) else texts


def read_vlmeval(path):
    """Rows of VLMEvalKit's tables: an image that is another row's index is that row's image."""
    images = {}
    for where, row in read_rows(path):
        if isinstance(row, dict) and "image" in row:
            image = images.get(row["image"], row["image"])
            images[row.get("index")] = row["image"] = image
        yield where, row


def read_coco(path):
    """COCO instances, a row an image, with its annotations as they are: a bad one is its fault."""
    coco, _ = merge_categories(json.loads(path.read_bytes()))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    asked = ", ".join(names.values())
    found, taken = {}, set()
    for number, item in enumerate(coco["annotations"], 1):
        if has_ids(item, "image_id"):
            found.setdefault(item["image_id"], []).append(item)
        else:
            yield f"{path}: annotation number {number}", ValueError("it needs an image_id")
    for number, image in enumerate(coco["images"], 1):
        row = ValueError("an image needs an id of its own and a file_name")
        if not has_ids(image, "id"):
            yield f"{path}: image number {number}", row
            continue
        name = image["id"]
        objects = found.pop(name, [])
        if has_ids(image, "file_name") and name not in taken:
            row = dict(id=name, image=image["file_name"], question=asked, names=names)
            row["objects"] = objects
        taken.add(name)
        yield f"{path}: image {name}", row
    for image, items in found.items():
        for item in items:
            words = f"its image {image!r} is not among the file's images"
            yield f"{path}: annotation {item.get('id')}", ValueError(words)


def has_ids(item, *names):
    """Whether a part of COCO is an object in which these are numbers or names."""
    return isinstance(item, dict) and all(isinstance(item.get(n), (int, str)) for n in names)


def read_instances(row, fields):
    """An image of COCO; crowds and boxes without area are no objects to find."""
    answer = []
    for item in row["objects"]:
        fault = f"annotation {item.get('id')}"
        category, box = item.get("category_id"), true_numbers(item.get("bbox"), 4)
        if not box:
            raise ValueError(f"{fault}: its bbox is not [x, y, w, h] but {item.get('bbox')!r:.60}")
        if not has_ids(item, "category_id") or category not in row["names"]:
            raise ValueError(f"{fault}: its category {category!r} is not among the file's "
                             "categories")
        label = row["names"][category]
        x, y, width, height = box
        if width < 0 or height < 0:
            raise ValueError(f"{fault}: its bbox {box} has a side below 0")
        if not item.get("iscrowd") and width > 0 and height > 0:
            answer.append({"bbox_2d": [x, y, x + width, y + height], "label": label})
    return fields | {"answer": answer}


def merge_categories(coco):
    """(instances in which the categories of one name are one, {name: id}); ValueError for others.

    Of categories with the same name the first one's id stays, and annotations follow it there.
    """
    parts = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or any(not isinstance(coco.get(part), list) for part in parts):
        raise ValueError("COCO instances need the lists images, annotations and categories")
    numbers, moved, kept = {}, {}, []
    for category in coco["categories"]:
        number, name = category.get("id"), category.get("name")
        if number is None or not isinstance(name, str) or number in moved:
            raise ValueError(f"the category {category!r:.80} needs an id of its own and a name")
        if name not in numbers:
            numbers[name] = number
            kept.append(category)
        moved[number] = numbers[name]
    items = []
    for item in coco["annotations"]:
        if has_ids(item, "category_id"):
            number = item["category_id"]
            item = item | {"category_id": moved.get(number, number)}
        items.append(item)
    return coco | {"categories": kept, "annotations": items}, numbers


# §3 ────────────────────────────────────── the table ─────────────────────────────────────────
# "about" is for --help; the rest are options of sources.FileSource. "a|b" is a, or b where a is
# missing or empty. "(names not confirmed)": written without the published files at hand.
FORMATS = {
    "jsonl": {
        "about": 'a row in {"task", "question", "answer"} and perhaps "image" or "images"',
        "adapt": read_plain},
    "chat": {
        "about": "one question a dialogue: VLM-R1, LLaVA, LLaMA-Factory, ShareGPT, OpenAI, TRL, "
                 "MM-Eureka, ms-swift with its objects; give ?task=",
        "question": "", "adapt": read_chat},
    "verl": {
        "about": "verl: prompt, images, reward_model.ground_truth",
        "task": "math", "question": "", "answer": "reward_model.ground_truth", "adapt": read_chat},
    "traces": {
        "about": "reasoning traces to imitate: named fields, or a dialogue as in open-r1/"
                 "Mixture-of-Thoughts (messages) and OpenR1-Math-220k (messages beside solution)",
        "task": "math", "question": "problem|question|prompt",
        "response": "response|generation", "adapt": read_trace},
    "refcoco": {
        "about": "jxu124/refcoco and its sisters: x1, y1, x2, y2",
        "task": "grounding", "question": "captions", "answer": "bbox", "id": "ref_id"},
    "refcoco-lmms": {
        "about": "lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: expressions in `answer`, bbox as "
                 "x, y, w, h (so lmms-eval reads it; the data's own card is not confirmed)",
        "task": "grounding", "question": "answer", "answer": "bbox", "id": "", "box": "xywh"},
    "refcoco-vlmr1": {
        "about": "VLM-R1's rec_jsons_processed: pixels",
        "task": "grounding", "answer": "solution"},
    "refcoco-pr1": {
        "about": "Perception-R1's grounding: 0 … 1000",
        "task": "grounding", "answer": "normalized_solution|solution", "frame": "1000"},
    "pixmo-count": {
        "about": "allenai/pixmo-count, its images downloaded under their hashes",
        "task": "counting", "question": "label", "answer": "points|count"},
    "pixmo-pr1": {
        "about": "Perception-R1's counting: clicks in 0 … 1000, or a number",
        "task": "counting", "question": "label|question|problem", "frame": "1000",
        "answer": "clicks|ground_truth|solution"},
    "coco-pr1": {
        "about": "Perception-R1's detection: target_id, target_box in pixels of the image resized "
                 "to multiples of 28",
        "task": "detection", "question": "", "answer": "solution", "frame": "resized"},
    "coco": {
        "about": "COCO's instances_*.json",
        "task": "detection", "read": read_coco, "adapt": read_instances},
    "fox": {
        "about": "Fox PageOCR: en_page_ocr.json, cn_page_ocr.json",
        "task": "ocr", "id": "image", "adapt": read_fox},
    "r1v": {
        "about": "R1-V's sets (clevr_cogen_a_train: counting 70k, GEOQA_R1V_Train_8K) and lmms-lab/"
                 "multimodal-open-r1-8k-verified: image, problem, solution in <answer> tags",
        "task": "math", "question": "problem", "answer": "solution"},
    "geometry3k": {
        "about": "hiyouga/geometry3k: images, problem, answer",
        "task": "math", "question": "problem"},
    "virl39k": {
        "about": "TIGER-Lab/ViRL39K: unpack its images.zip, ?folder=DIR",
        "task": "math", "id": "qid"},
    "mmk12": {
        "about": "FanqingM/MMK12: image, question, answer",
        "task": "math"},
    "math500": {
        "about": "MATH-500, AIME: problem, answer",
        "task": "math", "id": "unique_id|id"},
    "mathvision": {
        "about": "MathVision",
        "image": "decoded_image|image", "adapt": read_exam},
    "mathverse": {
        "about": "MathVerse, its vision-only rows",
        "id": "sample_index", "adapt": read_exam},
    "vlmeval": {
        "about": "VLMEvalKit's .tsv: index, image in base64, question, hint, A, B, C, D, answer",
        "id": "index", "image": "image|image_path", "read": read_vlmeval, "adapt": read_exam},
}
HUB = {  # hf:OWNER/NAME opens in this format
    "jxu124/refcoco": "refcoco", "jxu124/refcocoplus": "refcoco", "jxu124/refcocog": "refcoco",
    "lmms-lab/RefCOCO": "refcoco-lmms", "lmms-lab/RefCOCOplus": "refcoco-lmms",
    "lmms-lab/RefCOCOg": "refcoco-lmms", "allenai/pixmo-count": "pixmo-count",
    "leonardPKU/clevr_cogen_a_train": "r1v", "leonardPKU/GEOQA_R1V_Train_8K": "r1v",
    "lmms-lab/multimodal-open-r1-8k-verified": "r1v", "hiyouga/geometry3k": "geometry3k",
    "TIGER-Lab/ViRL39K": "virl39k", "FanqingM/MMK12": "mmk12", "MathLLMs/MathVision": "mathvision",
    "open-r1/Mixture-of-Thoughts": "traces", "open-r1/OpenR1-Math-220k": "traces",
    "HuggingFaceH4/MATH-500": "math500", "HuggingFaceH4/aime_2024": "math500"}
