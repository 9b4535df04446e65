r"""Siege of rewards.py: mutated completions over all tasks and options, by hand, not by pytest.

    python benchmarks/fuzz_rewards.py --count 1000000 --seed 0
    python benchmarks/fuzz_rewards.py --only 4711       # that item again: its inputs and its score

An item fails if it raises, takes 60 s, or has a total or a part out of its range. The first
--symbolic items are maths that the real children compare (--seconds of processor time, twice, in
which they may be idle: 600 s by the clock are allowed); the others need a child seldom. What failed
goes to stderr with its index (exit status 1). Stdout is a JSON line; median_ms, worst_ms (with the
index and head of that completion) and share_over_100_ms leave the symbolic items out.
"""
import argparse
import json
import multiprocessing
import random
import signal
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import scipy.optimize  # noqa: F401  slow; before any clock runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import formulas
import rewards

CAT, ITEM = '{"bbox_2d": [10, 10, 40, 40], "label": "cat"}', '{"point_2d": [5, 5], "label": "x"}'
NAMED, BLOCK = "<|object_ref_start|>a cat<|object_ref_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>"
SEEDS = [
    "", "[0.5, 0.25, 30.125, 40]", f"```json\n[{CAT}, {CAT}]\n```", "2", "[]", f"[{CAT}, {ITEM}]",
    f"[{CAT}{f',{CAT}' * 300}]", f"[{ITEM}{f',{ITEM}' * 300}]", f"{NAMED}{BLOCK * 300}<|im_end|>",
    "It is (1,2),(30,40) or (1, 2, 30, 40).", f"<think>So: {CAT}</think><answer>[{CAT}]</answer>",
    "<think><think>a</think>\n</think><answer>B</answer><answer>C</answer>", "日本\u202e\ud800",
    "(C) 42 cm\nA. 1", "答案：B，不选A", "<answer>[]</answer><think>B</think>", '{"count": 2}',
    '<points x1="1" y1="2" x2="3" y2="4" alt="x">x</points>', "[[1, 2], [3, 4]]", "The answer is **A** or B, not D", "\\boxed{\\text{(B)}} \\boxed{7",
    "9" * 99, "\\boxed{9**9**9**9}", "\\boxed{" * 9 + "}" * 9, "[" * 99 + "]" * 99, '{"a":' * 99,
    '[{"bbox_2d": [NaN, -Infinity, 1e999, 0], "label": ["cat"]}, null, {"bbox_2d": "[1,2,3,4]"}]',
]  # fmt: skip
FORMULAS = ["\\frac{2}{4}", "x+1", "12 cm", "(x+1)^2", "\\{2, 1\\}", "(9\\cdot 1)^{(9\\cdot 1)^9}",
            "√3", "1½ cm^2", "x²", "30°", "0.33", "6\\%", "7,7", "31_8"]
TOKENS = [
    *'[]{}()<>,:.-"\\$^!|*\n ', "0", "-1", "1e7", "1e308", "9" * 30, "NaN", "Infinity", "null",
    "true", "<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "<|endoftext|>", BLOCK,
    NAMED, CAT, ITEM, "```json", "```", '"label": "dog"', "bbox_2d", "point_2d", "\\boxed{", "**9",
    "\\frac{1}{3}", "\\left(", "\\text{", "Answer: B", "option (A)", "not", "I", "\ud83d",
]  # fmt: skip
TRUE = {
    "grounding": [[10, 10, 40, 40], [1.5, 2, 30, 40], [5, 5, 6, 6], "[-9, 0, 1e7, 40]"],
    "counting": [[[5, 5], [20, 20]], [], 2, 0, [[k, 9 * k] for k in range(40)]],
    "detection": [f"[{CAT}]", [], {"target_id": [17, 90], "target_box": [[1, 2, 3, 4]] * 2},
              [{"bbox_2d": [5, 5, 6, 6], "label": "é"}, {"bbox_2d": [1, 2, 3, 4], "label": "a"}]],
    "ocr": ["a word", " $", "Straße 日本語 \ud800", "word " * 200],
    "math": ["x+1", "\\frac{1}{2}", "12", "5", "{", "$\\boxed{\\sqrt{2}}$", "(1,2)"],
    "choice": ["B", "(c)", "I"],
}


def mutated(dice, text):
    """The text with something new at i, or in the place of text[i:k]."""
    i, j, k = sorted(dice.randint(0, len(text)) for _ in range(3))
    times, coding = 2 ** dice.choice((1, 4, 6, 13)), dice.choice(("latin-1", "utf-8", "utf-16-le"))
    repeated, swapped = text[i:k][: 100_000 // times] * times, text[j:k] + text[i:j]
    noise, spliced = dice.randbytes(8).decode(coding, "replace"), dice.choice(SEEDS)[i % 50 :]
    new = dice.choice(("", repeated, swapped, noise, spliced, dice.choice(TOKENS)))
    return text[:i] + new + text[dice.choice((i, k)) :]


def drawn(index, seed, symbolic):
    """-> (task, completion, answer), the options; the same for the same numbers."""
    dice, by_child = random.Random(f"{seed} {index}"), index < symbolic
    task = "math" if by_child else dice.choice(rewards.TASKS)
    answer = dice.choice(TRUE[task])
    right, other = rewards.reference(task, answer, "x"), dice.choice(SEEDS)
    text = dice.choice(FORMULAS if by_child else (right, other))
    for _ in range(dice.choice((0, 1, 1, 2, 4, 8))):
        text = mutated(dice, text)
    options = {"think": dice.choice((False, "before", "after"))}
    options["format_weight"] = dice.choice((None, None, 0, 0.1, 2))
    if by_child:
        return (task, f"\\boxed{{{text}}}", answer), options
    text = dice.choice((text, text, text, f"<think>{other}</think><answer>{text}</answer>"))
    options |= {"truncated": dice.random() < 0.2, "image_size": dice.choice((None, (56, 84)))}
    options |= {name: dice.choice(some) for name, some in rewards.OPTIONS.get(task, {}).items()}
    if task == "detection" and dice.random() < 0.3:
        options["components"] = dice.sample(rewards.COMPONENTS, dice.randint(0, 5))
        options["penalty"] = dice.choice((0, 0.5, 9))
    return (task, text, answer), options


def in_range(result, task, think, format_weight):
    """By hand, from the docstring of rewards.py: 0 ≤ total ≤ the task's best + weight · think."""
    weight = (task not in ("math", "choice")) if format_weight is None else format_weight
    # grounding: format + IoU;  detection: 0.25·format + 0.75 + 1 + 1, at most 3;  else a share
    best = {"grounding": weight + 1, "detection": min(3, 0.25 * weight + 2.75)}.get(task, 1)
    best += weight * bool(think) + 1e-9
    # Each part is a share, but the penalty FP/n_pred + FN/n_gt is two. NaN is in no range.
    parts = all(0 <= part <= 1 + (name == "penalty") for name, part in result.parts.items())
    return parts and isinstance(result.total, float) and 0 <= result.total <= best


def siege(indices, item):
    """-> (task, milliseconds, what failed or "") of each index."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
    rows = []
    for index, ((task, *inputs), options) in zip(indices, map(item, indices), strict=True):
        failure, start = "", time.perf_counter()
        signal.alarm(600 if index < item.keywords["symbolic"] else 60)
        try:
            result = rewards.score(task, *inputs, **options)
            if not in_range(result, task, options["think"], options["format_weight"]):
                failure = f"out of range: {result}"
        except (Exception, KeyboardInterrupt) as error:  # any: they are what is looked for
            failure = f"exception: {error!r}"
        signal.alarm(0)
        rows.append((task, 1000 * (time.perf_counter() - start), failure))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"count": 1_000_000, "seed": 0, "workers": 2, "symbolic": 2000}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a comparison, default 1")
    parser.add_argument("--only", type=int, metavar="INDEX", help="show this item")
    given, began = parser.parse_args(), time.monotonic()
    formulas.SECONDS = given.seconds
    item = partial(drawn, seed=given.seed, symbolic=given.symbolic)
    if given.only is not None:
        inputs, options = item(given.only)
        print(ascii(inputs), options, rewards.score(*inputs, **options), sep="\n")
        return
    chunks = [range(given.count)[k : k + 100] for k in range(0, given.count, 100)]
    with multiprocessing.Pool(given.workers) as pool:
        rows = [row for rows in pool.imap(partial(siege, item=item), chunks) for row in rows]
    tasks, times, failures = zip(*rows, strict=True)
    failed = [index for index, failure in enumerate(failures) if failure]
    for index in failed[:20]:
        print(f"--only {index}: {failures[index]}, of {item(index)[0]!a:.3000}", file=sys.stderr)
    by_child, plain = times[: given.symbolic] or (0,), times[given.symbolic :] or times
    worst, exceptions = max(plain), sum(failure.startswith("exc") for failure in failures)
    print(json.dumps({
        "count": len(rows), "tasks": Counter(tasks), "exceptions": exceptions,
        "out_of_range": len(failed) - exceptions, "median_ms": round(statistics.median(plain), 3),
        "worst_ms": round(worst, 1), "share_over_100_ms": sum(t > 100 for t in plain) / len(plain),
        "worst_index": times.index(worst), "worst_head": item(times.index(worst))[0][1][:60],
        "symbolic_worst_ms": round(max(by_child), 1), "seconds": round(time.monotonic() - began, 1),
    }))  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
