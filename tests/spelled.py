"""What both test files of rewards.py write as a model would, and what they compare with."""
import json

import pytest

from rewards import score

OBJECTS = [
    {"bbox_2d": [0, 0, 10, 10], "label": "cat"},
    {"bbox_2d": [20, 20, 30, 30], "label": "dog"},
]


def boxes(*items):
    return json.dumps([{"bbox_2d": list(box), "label": label} for *box, label in items])


UNREADABLE = "<|object_ref_start|>a<|object_ref_end|><|box_start|>here<|box_end|>"


def points(*items):
    return json.dumps([{"point_2d": list(point), "label": "x"} for point in items])


def tokens(*items, stop="<|im_end|>"):
    blocks = "".join(f"<|box_start|>({a},{b}),({c},{d})<|box_end|>" for a, b, c, d in items)
    return f"<|object_ref_start|>the cat<|object_ref_end|>{blocks}{stop}"


def total(*args, **options):
    return pytest.approx(score(*args, **options).total, abs=1e-9)
