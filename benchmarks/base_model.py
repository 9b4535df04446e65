"""base/, a tiny model that sees: what its training logged, how it is published and measured.

  torchrun --nproc_per_node=2 sft_coldstart.py --preset base     builds it, in five stages
  python benchmarks/base_model.py stages runs/base/boxes runs/base/small …   what they logged
  python benchmarks/base_model.py publish runs/base/last/model         writes base/ in bf16
  python benchmarks/base_model.py measure [MODEL]                      results/base.jsonl
  python benchmarks/base_model.py plateau                              what 600 more steps would add
  python benchmarks/base_model.py card                                 base/README.md from those rows

A row: a task asked in one form of thinking, 300 scenes of the held-out stream with a seed that no
training used. greedy and sampled (the mean of 8 answers at T = 1) are `rewards.correct`: IoU > 0.5,
exact count, F1, similarity, right or wrong. best of 8 is the mean over scenes of the best of the 8,
which is pass@8 where an answer is right or wrong: what is in reach of reinforcement.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from claims_report import read_rows  # noqa: E402

import fsdp  # noqa: E402
import grpo_vl  # noqa: E402
import presets  # noqa: E402
import tiny  # noqa: E402
import training  # noqa: E402

BASE = ROOT / "base"
ROWS = ROOT / "results" / "base.jsonl"
SEED = 1000  # of the scenes asked about
SCENES = 300
STAGES = [options for name, options in presets.COLD_START.items() if name.startswith("base")]
ASKED = {"no": "plainly", "before": "to think first", "after": "to think after"}
BUILD = "torchrun --nproc_per_node=2 sft_coldstart.py --preset base"


def publish(source: Path) -> None:
    """The finished run's model in bf16, with tokenizer, chat template and image processor."""
    from transformers import AutoTokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    model = Qwen.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    shutil.copy(source / "preprocessor_config.json", BASE)
    for file in BASE.iterdir():
        file.chmod(0o644)
    print(f"{sum(file.stat().st_size for file in BASE.iterdir()) / 1e6:.2f} MB in {BASE}")


def worlds() -> list[tuple[str, str]]:
    """(name, spec) of each of the base's worlds."""
    found = []
    for spec in presets.BASE_LAST:
        spec, _, _ = spec.rpartition(":")
        name = spec.removeprefix("synthetic:").partition("?")[0]
        if spec == tiny.FEW:
            name = "detection, 1 to 3 objects"
        if spec == tiny.SUMS_AS_TEXT:
            name = "math as text"
        found.append((name, spec))
    return found


def measure_one(
    model: Path | str, spec: str, form: str, ranks, scenes: int = SCENES, tries: int = 8
) -> dict:
    """Greedy, sampled and best-of-8 accuracy on the held-out scenes of one world."""
    greedy, sampled, best = accuracies(model, spec, form, ranks, scenes, SEED, tries)
    return {"scenes": scenes, "greedy": round(greedy, 4), "sampled": round(sampled, 4),
            f"best of {tries}": round(best, 4)}


def accuracies(
    model: Path | str, spec: str, form: str, ranks, scenes: int, seed: int, tries: int
) -> list[float]:
    """[greedy] and, of `tries` sampled answers, the mean and the mean of each scene's best."""
    config = grpo_vl.Config(
        model=str(model), data=(spec,), eval_every=1, think=form, seed=seed, eval_samples=scenes)
    run = training.prepare(config, ranks, str(model), frozen=True)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    answers = training.answer_heldout(run, scenes, tries=1, max_tokens=256, greedy=True)
    greedy = fmean(training.right(config, row) for row in answers)
    if tries == 0:
        return [greedy]
    answers = training.answer_heldout(run, scenes, tries=tries, max_tokens=256, greedy=False)
    best, scores = {}, []
    for row in answers:
        score = training.right(config, row)
        scores.append(score)
        best[row["id"]] = max(best.get(row["id"], 0.0), score)
    return [greedy, fmean(scores), fmean(best.values())]


def measure(model: Path, name: str, forms=("no", "before", "after")) -> None:
    """A row a world and form, appended to results/base.jsonl."""
    ranks = fsdp.start_processes(3600)
    for world, spec in worlds():
        for form in forms:
            row = {"model": name, "world": world, "think": form}
            row |= measure_one(model, spec, form, ranks) | {"spec": spec, "seed": SEED}
            with open(ROWS, "a") as file:
                print(json.dumps(row), file=file)
            print(row, flush=True)
    fsdp.leave()


def stages(folders: list[Path]) -> None:
    """A row a finished stage: its steps, seconds, data and last loss."""
    for folder in folders:
        rows = read_rows(folder / "metrics.jsonl")
        config = json.loads((folder / "config.json").read_text())
        losses = [row["loss"] for row in rows[-100:]]
        stage = {
            "stage": folder.name, "steps": len(rows), "seed": config["seed"],
            "seconds": round(rows[-1]["seconds/total"]), "data": config["data"],
            "loss of the last 100 steps": round(fmean(losses), 4)}
        with open(ROWS, "a") as file:
            print(json.dumps(stage), file=file)


def plateau() -> None:
    """600 more supervised steps from base/ on its own data, then the plain form of every task."""
    out = ROOT / "runs/base/plateau"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "sft_coldstart.py",
        "--preset", "base", "--after", "", "--model", str(BASE), "--steps", "600", "--seed", "4",
        "--eval-every", "0", "--lr", "3e-4", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    measure(out / "model", "600 more steps", forms=("no",))


def card() -> None:
    """base/README.md: what it is, how to build it, and the measured table."""
    rows = read_rows(ROWS)
    lines = ["| task | asked | greedy | sampled | best of 8 | greedy after 600 more steps |",
             "|---|---|---|---|---|---|"]
    later = {row["world"]: row["greedy"] for row in rows if row.get("model") == "600 more steps"}
    for row in rows:
        if row.get("model") == "base":
            more = ""
            if row["think"] == "no":
                more = f"{later[row['world']]:.3f}" if later else "not run"
            lines.append(f"| {row['world']} | {ASKED[row['think']]} | {row['greedy']:.3f} | "
                         f"{row['sampled']:.3f} | {row['best of 8']:.3f} | {more} |")
    text = (Path(__file__).parent / "base_model_card.md").read_text()
    worlds_text = ""
    for stage in STAGES:
        listed = "\n".join(f"- `{spec}`" for spec in stage["data"])
        worlds_text += f"\n\n{Path(stage['out']).name}:\n\n{listed}"
    text = text.replace("<!-- build -->", BUILD).replace("<!-- table -->", "\n".join(lines))
    (BASE / "README.md").write_text(text.replace("<!-- worlds -->", worlds_text.strip()))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("publish").add_argument("source", type=Path)
    for name in ("plateau", "card"):
        commands.add_parser(name)
    commands.add_parser("measure").add_argument("model", type=Path, nargs="?", default=BASE)
    commands.add_parser("stages").add_argument("folders", type=Path, nargs="+")
    one = commands.add_parser("one", help="one model on one world, as a JSON object")
    one.add_argument("model", type=Path)
    one.add_argument("spec")
    one.add_argument("--scenes", type=int, default=SCENES)
    one.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "publish":
        publish(given.source)
    elif given.command == "measure":
        measure(given.model, "base" if given.model == BASE else str(given.model))
    elif given.command == "one":
        ranks = fsdp.start_processes(3600)
        row = measure_one(given.model, given.spec, "no", ranks, given.scenes)
        given.out.write_text(json.dumps(row | {"world": given.spec}))
        fsdp.leave()
    elif given.command == "stages":
        stages(given.folders)
    elif given.command == "plateau":
        plateau()
    else:
        card()


if __name__ == "__main__":
    main()
