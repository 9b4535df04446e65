"""A model that benchmarks/base_model.py published, through Hugging Face alone; its measuring."""
import json
import sys

import pytest
import torch
from conftest import ROOT

import qwen_vl
import rewards
import sft_coldstart
import tiny
from data import open_data
from sampler import Sampler

sys.path.insert(0, str(ROOT / "benchmarks"))
import base_model


@pytest.fixture(scope="module")
def base(alone, tmp_path_factory):
    """A run of one step, published."""
    folder = tmp_path_factory.mktemp("base")
    config = sft_coldstart.Config(
        model="tiny", data=(tiny.WORLD,), train="all", batch=2, steps=1, max_tokens=256, out=str(folder / "run"))
    assert sft_coldstart.train(config, alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "BASE", folder / "base")
        base_model.publish(folder / "run" / "model")
    return folder / "base"


def test_hugging_face_alone_asks_as_we_do_and_hears_the_same(base):
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    model = Qwen.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer, image_processor = AutoTokenizer.from_pretrained(base), AutoImageProcessor.from_pretrained(base)
    ours, own_tokenizer = qwen_vl.load(str(base))
    special = qwen_vl.SpecialIds.read(own_tokenizer, ours.config)
    sampler = Sampler(ours, special)
    sampler.refresh((f"model.{name}", weight) for name, weight in ours.named_parameters())
    sample = open_data([tiny.WORLD], seed=5, split="heldout").at(0)
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


def test_a_measured_model_has_a_row_a_world_and_form(base, alone, tmp_path, monkeypatch):
    """Scores worked out by hand from answers that are put in the model's place."""
    said = {"greedy": ["4", "5"], "sampled": ["4", "5", "6", "6"]}  # the truths are 4 and 6

    def answers(run, count, *, tries, max_tokens, greedy):
        texts = said["greedy" if greedy else "sampled"]
        return [{"id": str(i // tries), "task": "math", "answer": "46"[i // tries], "image_size": None,
                 "completion": f"\\boxed{{{text}}}"} for i, text in enumerate(texts)]

    monkeypatch.setattr(base_model.training, "answer_heldout", answers)
    found = base_model.measure_one(base, tiny.SUMS_AS_TEXT, "no", alone, scenes=2, tries=2)
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
