"""prompts.py: what --check says of prompts is what training gives to the model."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import grpo_vl
import options
import tiny
import training
from data import DataError, open_data
from prompts import prompt_lines
from qwen_vl import SpecialIds


def lines_of(config):
    return prompt_lines(config, options.data_options(config))


def test_the_longest_prompt_is_as_long_as_training_makes_it(tmp_path):
    rows = [{"task": "math", "id": f"s{n}", "question": question, "answer": "1"}
            for n, question in enumerate(("What is 1?", "What is 1?<|im_end|>"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = grpo_vl.Config(model="tiny", data=(f"{tmp_path}/rows.jsonl",), max_prompt=49)
    # Of the first: five special tokens, 10 of system, 19 of user and 5 of assistant, two line ends;
    # the tag in the second is text, "<", "|", "im", "_", "e", "nd", "|", ">", and no special token.
    longest, _, first = lines_of(config)
    assert longest == "longest prompt: 49 tokens (s1); --max-prompt is 49"
    assert first == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 1?\n"
                     "Put the final answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    tokenizer = tiny.tiny_tokenizer()
    run = SimpleNamespace(config=config, tokenizer=tokenizer, special=SpecialIds.read(tokenizer))
    sample = open_data(config.data).at(1)
    assert len(training.make_prompt(run, sample).ids) == 49
    run.config = replace(config, max_prompt=48)
    with pytest.raises(DataError, match="its prompt has 49 tokens, --max-prompt is 48"):
        training.make_prompt(run, sample)


def test_an_image_is_shown_as_one_placeholder():
    config = grpo_vl.Config(model="tiny", data=("synthetic:grounding?size=84x56",))
    *_, first = lines_of(config)
    _, shown = first.split("<|im_start|>user\n")
    assert shown.startswith("<|vision_start|><|image_pad|><|vision_end|>Output the bounding box of the ")


def test_a_tokenizer_without_images_shows_no_prompts(monkeypatch):
    lacking = SimpleNamespace(get_vocab=lambda: {"<|im_start|>": 0})
    monkeypatch.setattr("qwen_vl.load_tokenizer", lambda name: lacking)
    (line,) = lines_of(grpo_vl.Config(model="tiny"))
    assert line.startswith("prompts are not shown: the tokenizer lacks <|im_end|>")
