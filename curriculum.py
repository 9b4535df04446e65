"""What is neither too easy nor too hard? Samples by pass rate, easy before hard [PR1 §4.3]."""
import hashlib
from pathlib import Path
from statistics import fmean


def pass_rates(answers: list[dict]) -> dict[str, float]:
    """Of each sample by id: the mean of "correct" over its answers."""
    tries = {}
    for row in answers:
        tries.setdefault(row["id"], []).append(row["correct"])
    return {name: fmean(right) for name, right in tries.items()}


def rows_of(samples, rates: dict, folder: Path) -> list[dict]:
    """The samples as rows of a data file, easy to hard; their images are written to images/."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in samples:
        names = []
        for image in sample.images:  # named by what is on it: samples are held out by image
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            name = f"images/{digest[:16]}.png"
            image.save(folder / name)
            names.append(name)
        row = {
            "id": sample.id, "task": sample.task, "question": sample.question, "images": names,
            "answer": sample.answer, "pass_rate": rates[sample.id]}
        if sample.system:
            row["system"] = sample.system
        rows.append(row)
    return sorted(rows, key=lambda row: -row["pass_rate"])
