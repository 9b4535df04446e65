"""Which rows does a file, a folder or a data set of the hub hold? And what goes wrong in them.

§1 faults · §2 files · §3 rows · §4 images

A row is a dict, or a line's bytes, or the ValueError that says why it cannot be read.
"""
import ast
import base64
import csv
import glob
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BATCH = 8  # rows of a parquet file held at a time
READING = dict(pre_buffer=False, buffer_size=1 << 20)  # nor more of the file than they need
FAULTS = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, SyntaxError,
          TypeError, ValueError)  # what data and options can raise


# §1 ────────────────────────────────────── faults ────────────────────────────────────────────


class DataError(ValueError):
    """A fault in data or in a spec: the message says where it is and what to do."""


def words(error):
    """What went wrong, for a person who knows the data and not this code."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno} column {error.colno}".removeprefix("line 1 ")
        return f"{error.msg} at {place}: this is not JSON, is it another format?"
    if isinstance(error, UnicodeDecodeError):
        return "this is not UTF-8 text: is it another format?"
    if isinstance(error, RecursionError):
        return "this is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (AttributeError, IndexError, SyntaxError, TypeError)):
        return f"not a row of this format ({error}): see python data.py --help"
    return str(error)


@contextmanager
def blame(where, faults=FAULTS):
    """Whatever of `faults` goes wrong within becomes a DataError that begins with its place."""
    try:
        yield
    except faults as error:
        raise DataError(f"{where}: {words(error)}") from error


# §2 ────────────────────────────────────── files ─────────────────────────────────────────────


def find_files(target):
    """(files, folder, cache): what FILE, FOLDER, PATTERN* or hf:OWNER/NAME stands for.

    @SPLIT or @CONFIG/SPLIT after a folder or a hub's name takes that part of it. Images may be
    named from the folder too; `cache` is where the hub's links lead, or None.
    """
    if target.startswith("hf:"):
        repository, _, part = target.removeprefix("hf:").partition("@")
        folder = download(repository, part)
        return files_of_part(folder, part), folder, folder.parent.parent
    path = Path(target)
    if path.is_dir():
        return files_of_part(path, ""), path, None
    name, at, part = target.rpartition("@")
    if at and not path.exists() and Path(name).is_dir():
        return files_of_part(Path(name), part), Path(name), None
    if "*" not in target:
        return [path], path.parent, None
    files = [Path(name) for name in sorted(glob.glob(target, recursive=True))]
    if not files:
        raise DataError(f"no file is named {path}")
    return files, Path(target.partition("*")[0] + "x").parent, None


def files_of_part(folder, part):
    """The files with rows of one split in a folder, in order; DataError if there are several."""
    held, found = set(), {}
    for kind in ("parquet", "jsonl", "tsv", "csv", "json"):
        for file in sorted(folder.rglob(f"*.{kind}")):
            name = part_of(file.relative_to(folder))
            held.add(name)
            if not part or f"/{name}".endswith(f"/{part}"):
                found.setdefault(name, []).append(file)
        if found:
            break
    if not held:
        raise DataError(f"{folder} has no .parquet, .jsonl, .tsv, .csv or .json file: a folder of "
                        "images needs a metadata.jsonl with a file_name and an answer a row")
    if len(found) != 1:
        names = ", ".join(sorted(name or "files of no split" for name in found or held))
        raise DataError(f"{folder} holds {names}: choose one with @NAME, or files with PATTERN*")
    _, files = found.popitem()
    return files


def part_of(path):
    """What "train" is in train-00000-of-00002.parquet, train.jsonl, train/0.parquet; else ""."""
    folders = [name for name in path.parts[:-1] if name != "data"]
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}.*", path.stem)
    split = re.compile("train|val|test|dev")
    name = shard[1] if shard else path.stem
    if not shard and not split.match(name):
        name = folders.pop() if folders and split.match(folders[-1]) else ""
    return "/".join([*folders, name]).rstrip("/")


def download(repository, part):
    """The folder of a hub's data set, from its cache where it is complete there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError("hf: needs huggingface_hub (pip install huggingface_hub)") from error
    patterns = [f"*{part.replace('/', '*')}*"] if part else None
    try:
        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except OSError as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"the hub's {repository} cannot be had: is this its name, is the machine "
                         f"online, does it need HF_TOKEN? ({type(error).__name__}: {first})"
                         ) from error
    return Path(folder)


# §3 ─────────────────────────────────────── rows ─────────────────────────────────────────────


def read_rows(path):
    """("file:line", row) of .json, .parquet, .csv, .tsv, or of JSON lines under any other name."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise ValueError("a pickle can run any code when read, so use this data as JSON or parquet")
    readers = {".parquet": read_parquet, ".json": read_json, ".csv": read_table,
               ".tsv": read_table}
    return readers.get(path.suffix, read_lines)(path)


def read_lines(path):
    with path.open("rb") as file:  # bytes: each is parsed where its fault can be noted
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip()


def read_json(path):
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from read_lines(path)  # JSON lines under another name
        return
    if not isinstance(rows, list):
        raise ValueError("a JSON list of rows is expected; COCO annotations open as coco:FILE")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def read_table(path):
    """A row a line of .csv or .tsv; empty cells are no fields."""
    csv.field_size_limit(2**31 - 1)  # images in base64 are long
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), 1):
            fault = ValueError("this row has more cells than the table has columns")
            filled = {name: cell for name, cell in row.items() if cell}
            yield f"{path}: row {number}", fault if None in row else filled


def read_parquet(path):
    """Rows of a parquet file, its images left in it: BATCH of them are held at a time."""
    try:
        from pyarrow import default_memory_pool, parquet
    except ImportError as error:
        raise ValueError(f"parquet needs pyarrow (pip install pyarrow): {error}") from error
    number = 0
    with parquet.ParquetFile(path, **READING) as file:
        binary = [field.name for field in file.schema_arrow if "binary" in str(field.type)]
        for group in range(file.num_row_groups):
            before = number
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                for row in batch.to_pylist():
                    place = path, group, number - before
                    for name in binary:
                        row[name] = leave(row[name], place, (name,))
                    number += 1
                    yield f"{path}: row {number}", row
    default_memory_pool().release_unused()


def leave(value, place, keys):
    """The value of a cell, each of its bytes objects as Stored."""
    if isinstance(value, bytes):
        return Stored(*place, keys, digest(value))
    if isinstance(value, dict):
        return {key: leave(part, place, (*keys, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [leave(part, place, (*keys, index)) for index, part in enumerate(value)]
    return value


# §4 ────────────────────────────────────── images ────────────────────────────────────────────


@dataclass(frozen=True)
class Stored:
    """Bytes that stay in their parquet file until they are asked for."""
    path: Path
    group: int  # number of the row group
    row: int  # number in it
    keys: tuple  # the column, then the way down to the bytes
    digest: str  # of the bytes

    def read(self):
        from pyarrow import parquet

        skip = self.row
        with parquet.ParquetFile(self.path, **READING) as file:
            column = dict(row_groups=[self.group], columns=[self.keys[0]])
            for batch in file.iter_batches(BATCH, **column):
                if skip < len(batch):
                    value = batch.column(0)[skip].as_py()
                    break
                skip -= len(batch)
        for key in self.keys[1:]:
            value = value[key]
        return value


def digest(content):
    """What tells images apart: the same for the same bytes, wherever they are kept."""
    return hashlib.sha256(content).hexdigest()


def image_list(value):
    """What a row's images are, each: paths, base64, bytes or {"bytes", "path"}."""
    if isinstance(value, str) and value.startswith(("['", '["')):
        try:
            value = ast.literal_eval(value)  # reads literals and runs nothing
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"the images are a list as text, but cut: {value[:60]!r}") from error
    if value in (None, ""):
        return []
    return value if isinstance(value, list) else [value]


def find_image(image, folders, trusted):
    """What an image opens from: its bytes, or the path of its file in one of the folders.

    Errors: DataError if it is in none, or leads out of the `trusted` folders (None: any will do).
    """
    if isinstance(image, dict):  # parquet
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, Stored)):
        return image
    if not isinstance(image, str):
        raise DataError(f"an image is a path, base64 or bytes, not {image!r:.60}")
    if image.startswith(("http://", "https://")):
        raise DataError(f"the image {image[:80]} is on the web: download it and name the file")
    name = image.removeprefix("file://")
    if max(len(part) for part in name.split("/")) < 256:  # else no path
        for folder in folders:
            found = (folder / name).resolve()
            safe = trusted is None or any(found.is_relative_to(f.resolve()) for f in trusted)
            if safe and found.is_file():
                return str(found)
    decoded = decode_image(image)
    if decoded is None:
        raise DataError(f"no image {name[:80]!r} in {folders[0].resolve()}: set ?folder=DIR or "
                        "?allow_outside=1")
    return decoded


def looks_like_image(value):
    """Whether a field that nobody asked for holds an image."""
    if isinstance(value, list):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, dict):
        return looks_like_image(value.get("bytes")) or looks_like_image(value.get("path"))
    if isinstance(value, str):
        name = r"(?i)data:image/.*|[^\n]*\.(png|jpe?g|webp|gif|bmp|tiff?|avif)"
        content = value.startswith(("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR"))  # in base64
        return (content and len(value) > 80) or bool(re.fullmatch(name, value))
    return isinstance(value, (bytes, Stored))


def decode_image(text):
    """The bytes of an image in base64, bare or as a data: address; None if it is a file's name."""
    head, comma, body = text.partition(",")
    if comma and re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        text = body
    elif len(text) < 80 or not re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text):
        return None  # the name of a file has a dot
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise ValueError(f"an image in base64 of {len(text)} letters is cut or damaged") from error
