"""Small files in their true form, for the tests of rows, formats, sources and data."""

import base64
import json
from pathlib import Path

from PIL import Image

from data import examine, open_data

HERE = Path(__file__).parent / "fixtures" / "data"
SMALL = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64}
# a.png is 100 x 50 with a red block over columns 20 … 59 and rows 10 … 39. smart_resize of 50 x 100
# is round(50/28) = 2 and round(100/28) = 4 patches: 112 x 56, so x by 1.12 and y by 1.12.
RED = [22.4, 11.2, 67.2, 44.8]


def one(spec, index=0, **options):
    """A sample of a spec in which @ stands for the fixtures' folder."""
    return open_data([spec.replace("@", f"{HERE}/")], **(SMALL | options)).at(index)


def check(specs, **options):
    """Every fault of a data set."""
    faults, _ = examine(specs, **options)
    return faults


def write(folder, *rows, name="rows.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return str(folder / name)


def pictures_of(folder, count, *, by_bytes=False):
    """A row for each of two expressions about each of `count` images."""
    rows = []
    for number in range(count):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(folder / f"{number}.png")
        for part in "ab":
            row = {"task": "ocr", "question": f"{number} {part}", "answer": "x", "image": f"{number}.png"}
            if by_bytes:
                content = (folder / f"{number}.png").read_bytes()
                row["image"] = base64.b64encode(content).decode()
            rows.append(row)
    return rows
