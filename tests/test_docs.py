"""What the documents promise: arrows, deviations, commands, tables."""
import ast
import dataclasses
import json
import re
import subprocess
import sys
from statistics import median

import pytest
from conftest import ROOT

import grpo_vl
import sft_coldstart

ORDER = (  # each may use those before it; those that stand together do not use each other
    ("naive_grpo",), ("needs",), ("tiny", "pictures", "formulas", "rows", "lora", "measures"), ("readers", "presets"), ("rewards",), ("reward_function", "formats"), ("sources",), ("data",), ("qwen_vl",), ("packing", "prompts"),
    ("policy", "run_folder"), ("kv_cache", "noise", "weight_copy"), ("sampler", "fsdp", "plan"), ("options",), ("training",), ("sft_coldstart",), ("grpo_vl",), ("plots", "protocols", "behaviours", "average", "curriculum"), ("sheets",), ("eval",),
)
SCRIPTS = tuple(name for level in ORDER for name in level if (ROOT / f"{name}.py").exists())
README = (ROOT / "README.md").read_text()


def source(name):
    return (ROOT / f"{name}.py").read_text()


def test_arrows_only_run_downward():
    assert set(SCRIPTS) == {path.stem for path in ROOT.glob("*.py")}
    below = set()
    for level in ORDER:
        for name in set(level) & set(SCRIPTS):
            imported = set()
            for node in ast.walk(ast.parse(source(name))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module)
            assert imported & set(SCRIPTS) <= below, name
        below |= set(level) - {"naive_grpo"}


def test_rewards_and_data_need_no_torch():
    code = "import sys, rewards, data, formats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("target, tests_too", [("demo", False), ("test", True)])
def test_the_demo_installs_nothing_that_only_tests_read(target, tests_too):
    said = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-r requirements.txt" in said and ("-r requirements-test.txt" in said) == tests_too
    for_tests = set(re.findall(r"^(\w+)==", (ROOT / "requirements-test.txt").read_text(), re.M))
    assert for_tests == {"pytest", "hypothesis", "peft", "ruff"}
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", "\n".join(map(source, SCRIPTS)), re.M))
    assert "torch" in imported and not imported & for_tests


def test_deviations_are_in_step():
    """Docstring of grpo_vl.py and README name the same deviations with the same words."""
    def squeeze(text):
        return " ".join(text.split())

    in_code = dict(re.findall(r"DEVIATION (D\d+): (.*?)(?=\nDEVIATION|\n\n|$)", grpo_vl.__doc__.strip(), re.S))
    in_readme = dict(re.findall(r"- \*\*(D\d+)\*\* (.*?)(?=\n- |\n\n)", README, re.S))
    assert {k: squeeze(v) for k, v in in_code.items()} == {k: squeeze(v) for k, v in in_readme.items()}
    assert set(in_code) == {"D1", "D2"}


def test_sections_are_numbered_as_the_docstring_says():
    sections = re.findall(r"^# (§\d+) ", source("grpo_vl"), re.M)
    assert sections == [f"§{n}" for n in range(1, 7)]
    assert re.findall(r"§\d+(?= [a-z])", grpo_vl.__doc__.split("[PR1]")[0]) == sections


def test_paper_tags_are_known():
    known = {"PR1", "OVR", "ORZ", "DSM", "DAPO", "DRG", "GSPO", "RLOO", "LoRA"}
    for name in SCRIPTS:
        tags = re.findall(r"\[([A-Z][A-Za-z0-9]+) (?:§|Eq|T\d|Fig|code)", source(name))
        assert set(tags) <= known, name


@pytest.mark.parametrize("module", [grpo_vl, sft_coldstart])
def test_help_lists_each_option(module):
    script = f"{module.__name__}.py"
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for field in dataclasses.fields(module.Config):
        assert "--" + field.name.replace("_", "-") in shown.stdout, field.name
    assert "OVR" in shown.stdout and "--preset" in shown.stdout


def test_readme_flags_exist():
    options = {"--" + f.name.replace("_", "-") for m in (grpo_vl, sft_coldstart) for f in dataclasses.fields(m.Config)}
    options |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "benchmarks" / "bench_step.py").read_text()))
    options |= {"--no-checkpointing", "--no-graphs", "--preset", "--config", "--help", "--seeds", "--nproc"}
    for script in ("eval", "benchmarks/claims"):  # their commands
        options |= set(re.findall(r"--[a-z][a-z-]+", source(script).split('"""')[1]))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.replace("--nproc_per_node", "--nproc")))
    assert used <= options, used - options


def test_readme_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"python ((?:benchmarks/)?\w+\.py)", README):
        assert (ROOT / path).exists(), path


def test_the_readmes_arms_are_those_of_the_demos_page():
    """A line an arm: errors before → after and their factor, greedy and sampled, as in results/demo.md."""
    page = (ROOT / "results" / "demo.md").read_text()
    measured = {}
    for line in page.splitlines():
        if line.startswith("| "):
            arm, _, before, after, factor = line.removeprefix("| ").split(" | ")[:5]
            measured.setdefault(arm, [arm]).extend([f"{before} → {after}", factor])
    del measured["arm"]  # the heading
    table = README.split("<!-- arms -->")[1].split("<!-- /arms -->")[0]
    _, _, *shown = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    assert shown == [*measured.values()] and len(shown) == 4


def test_speed_is_the_kept_bench():
    """Each ratio in the table of results/speed.md, from the raw lines, and those that the README repeats."""
    *against, groups = [json.loads(line) for line in (ROOT / "results" / "bench.jsonl").read_text().splitlines()]
    asked = [(row["image_tokens"], row["checkpointing"], row.get("keep_attention", False)) for row in against]
    assert asked == [
        (256, True, False), (1024, True, False), (256, False, False), (1024, False, False), (256, True, True), (1024, True, True)]
    assert groups["ours"]["prompt_tokens"] == 1025
    table = (ROOT / "results" / "speed.md").read_text()
    shown = [float(number) for number in re.findall(r"\*\*([\d.]+)×?\*\*", table)]
    kept = [row[name] for row in against for name in ("ratio", "memory_ratio")]
    assert shown == pytest.approx([*kept, groups["ours"]["g_scaling"]["ratio"]], abs=0.006)
    for line in (ROOT / "results" / "bench_again.jsonl").read_text().splitlines():
        assert "{:.2f} and {:.2f}".format(*json.loads(line)["ratios"]) in table
    small, large, *_ = against
    alone = [json.loads(line) for line in (ROOT / "results" / "bench_keep_attention.jsonl").read_text().splitlines()]
    assert [row["keep_attention"] for row in alone] == [False, True, False, True, False, True, True, False]
    found = {}
    for keep in (False, True):
        part = [row["ours"] for row in alone if row["keep_attention"] == keep]
        step = median(sum(one["steps"]) / 2 for one in part)
        update = median(one["seconds"]["train"] / one["seconds"]["sample"] for one in part)
        memory = sorted(one["memory"]["net"] for one in part)
        found[keep] = f"{step:.2f}", f"{update:.2f}", f"{memory[0]:.2f} to {memory[-1]:.2f}"
    table = " ".join(table.split())
    (step, update, memory), (step_once, update_once, memory_once) = found[False], found[True]
    assert f"takes {step} s without it and {step_once} with it" in table and f"{update} and {update_once}." in table
    assert f"{memory} GiB and {memory_once}" in table
    said = " ".join(README.split())
    assert f"{small['ratio']:.1f} times as fast at 256 image tokens, {large['ratio']:.1f} times at 1,024" in said
    assert "{:.1f} and {:.1f} times".format(*(row["ratio"] for row in against[2:4])) in said
    assert f"with {small['memory_ratio']:.2f} and {large['memory_ratio']:.2f} of the memory" in said


def test_readme_reliability_is_the_kept_sieges():
    """What results/reliability.md says of kills and inputs, from the raw lines."""
    rows = [json.loads(line) for line in (ROOT / "results" / "reliability.jsonl").read_text().splitlines()]
    text = (ROOT / "results" / "reliability.md").read_text()
    sieges, (fuzz,) = [r for r in rows if "kills" in r], [r for r in rows if "exceptions" in r]
    for siege in sieges:
        assert all(value for value in siege.values() if isinstance(value, bool)), siege
        assert re.search(rf"\| `{siege['script']}` \| {siege['ranks']} \| {siege['kills']} \|", text)
    assert fuzz["exceptions"] == fuzz["out_of_range"] == 0 and f"{fuzz['count']:,}" in text
