"""base/ as it is published: through Hugging Face alone, and as good as its card says; its measuring."""
import json
import sys

import pytest
import torch
from conftest import ROOT

import behaviours
import presets
import qwen_vl
import rewards
import tiny
from data import open_data
from sampler import Sampler

sys.path.insert(0, str(ROOT / "benchmarks"))
import base_model
from claims_report import read_rows

BASE = str(ROOT / "base")
CARD = [row for row in read_rows(base_model.ROWS) if row.get("model") == "base"]


def test_base_is_small_and_the_commit_holds_all_of_it():
    model, _ = qwen_vl.load(BASE)
    assert sum(weight.numel() for weight in model.parameters()) <= 2_500_000
    assert (ROOT / "base" / "model.safetensors").stat().st_size <= 5_000_000
    config = json.loads((ROOT / "base" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and config["dtype"] == "bfloat16"


@pytest.mark.parametrize("row", CARD, ids=lambda row: f"{row['world']}-{row['think']}")
def test_base_answers_as_its_card_says(row, alone):
    """Greedily, on 40 other scenes: within three standard errors of a share, the card's added."""
    (found,) = base_model.accuracies(BASE, row["spec"], row["think"], alone, scenes=40, seed=7, tries=0)
    p = min(max(row["greedy"], 0.05), 0.95)
    error = (p * (1 - p) * (1 / 40 + 1 / row["scenes"])) ** 0.5
    assert abs(found - row["greedy"]) <= 3 * error, (found, row)


def test_the_card_shows_the_measured_rows():
    shown = (ROOT / "base" / "README.md").read_text()
    for row in CARD:
        numbers = f"{row['greedy']:.3f} | {row['sampled']:.3f} | {row['best of 8']:.3f}"
        assert f"| {row['world']} | {base_model.ASKED[row['think']]} | {numbers} |" in shown
    assert len(CARD) == 3 * len(base_model.worlds())


def test_what_base_learnt_to_think_holds_no_behaviour_of_the_lexicon():
    """So that a later cold start's traces can be told from it."""
    for spec in presets.BASE_LAST:
        mixture = open_data([spec], seed=0)
        for index in range(50):
            sample = mixture.at(index)
            text = rewards.reference(sample.task, sample.answer, sample.question, think="before")
            shown = [name for name in behaviours.BEHAVIOURS if behaviours.lexicon_count(name, {"completion": text})]
            assert not shown, text


def test_hugging_face_alone_asks_as_we_do_and_hears_the_same():
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    model = Qwen.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer, image_processor = AutoTokenizer.from_pretrained(BASE), AutoImageProcessor.from_pretrained(BASE)
    ours, own_tokenizer = qwen_vl.load(BASE)
    special = qwen_vl.SpecialIds.read(own_tokenizer, ours.config)
    sampler = Sampler(ours, special)
    sampler.refresh((f"model.{name}", weight) for name, weight in ours.named_parameters())
    sample = open_data([tiny.FEW], seed=5, split="heldout").at(0)
    text = rewards.prompt(sample.task, sample.question)
    turns = [{"role": "system", "content": qwen_vl.SYSTEM},
             {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    pixels = image_processor(sample.images[0], return_tensors="pt")
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer.encode(asked.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")
    prompt = qwen_vl.encode_chat(own_tokenizer, special, text, sample.images)
    assert ids[0].tolist() == prompt.ids
    kinds = (ids == model.config.image_token_id).long()
    banned = special.banned_V.nonzero().flatten().tolist()
    said = model.generate(
        input_ids=ids, mm_token_type_ids=kinds, do_sample=False, max_new_tokens=16, suppress_tokens=banned, **pixels)
    ((own,),) = sampler.generate([prompt], None, 16)
    assert own.tokens == said[0, ids.shape[1] :].tolist()


def test_a_measured_model_has_a_row_a_world_and_form(alone, tmp_path, monkeypatch):
    """Scores worked out by hand from answers that are put in the model's place."""
    said = {"greedy": ["4", "5"], "sampled": ["4", "5", "6", "6"]}  # the truths are 4 and 6

    def answers(run, count, *, tries, max_tokens, greedy):
        texts = said["greedy" if greedy else "sampled"]
        return [{"id": str(i // tries), "task": "math", "answer": "46"[i // tries], "image_size": None,
                 "completion": f"\\boxed{{{text}}}"} for i, text in enumerate(texts)]

    monkeypatch.setattr(base_model.training, "answer_heldout", answers)
    found = base_model.measure_one(BASE, tiny.SUMS_AS_TEXT, "no", alone, scenes=2, tries=2)
    # greedy: right, wrong; sampled: right, wrong; right, right; the best of each two: right, right
    assert found == {"scenes": 2, "greedy": 0.5, "sampled": 0.75, "best of 2": 1.0}


def test_stages_are_a_row_each(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "ROWS", tmp_path / "rows.jsonl")
    run = tmp_path / "tasks"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 3, "data": ["x"]}))
    steps = [{"step": 0, "loss": 3.0, "seconds/total": 1.0}, {"step": 1, "loss": 1.0, "seconds/total": 2.4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    base_model.stages([run])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {
        "stage": "tasks", "steps": 2, "seed": 3, "seconds": 2, "data": ["x"], "loss of the last 100 steps": 2.0}
