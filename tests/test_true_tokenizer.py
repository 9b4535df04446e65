"""Once with Qwen2.5's own vocabulary: real ids, real special tokens, digits one by one."""
import base64
import zipfile
from itertools import pairwise

import pytest
import ranks
import torch
from conftest import ROOT
from PIL import Image

import qwen_vl
import rewards
import tiny
from noise import keyed_uniforms
from packing import pack_groups, prepare_attention
from policy import Policy
from qwen_vl import Group, SpecialIds
from sampler import Sampler


def merge_parts(token, rank_of, rank):
    """The two pieces whose merge made `token`: byte-pair encoding stopped before rank `rank`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks_of_pairs = [rank_of.get(a + b, rank) for a, b in pairwise(parts)]
        best = min(range(len(ranks_of_pairs)), key=ranks_of_pairs.__getitem__)
        assert ranks_of_pairs[best] < rank
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


@pytest.fixture(scope="module")
def tokenizer():
    wheels = [*(ROOT / ".venv" / "vocabulary").glob("dashscope-*.whl")]
    if not wheels:
        pytest.skip("`make test` downloads the wheel with Qwen2.5's vocabulary, which is not here")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    file = zipfile.ZipFile(wheels[0]).read("dashscope/resources/qwen.tiktoken").decode()
    rows = [line.split() for line in file.splitlines() if line]
    rank_of = {base64.b64decode(token): int(rank) for token, rank in rows}
    letters = bytes_to_unicode()

    def text(piece):
        return "".join(letters[byte] for byte in piece)

    vocabulary = {text(token): rank for token, rank in rank_of.items()}
    merges = [tuple(map(text, merge_parts(token, rank_of, rank)))
              for token, rank in rank_of.items() if len(token) > 1]
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tiny.QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in tiny.SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def test_ids_are_qwens(tokenizer):
    assert len(tokenizer) == 151_665
    ids = tokenizer.get_vocab()
    assert (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<|image_pad|>"]) == (151643, 151645, 151655)
    # as Qwen2.5's tokenizer splits them: digits stand alone, words keep their space
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.encode("1234") == [16, 17, 18, 19]
    box = '[{"bbox_2d": [12, 34, 560, 789], "label": "red circle"}]'
    assert tokenizer.decode(tokenizer.encode(box)) == box
    assert [tokenizer.decode(t) for t in tokenizer.encode("[12, 560]")] == [*"[12", ",", *" 560]"]


def test_prompt_sampler_and_trainer_with_true_ids(tokenizer):
    model = tiny.tiny_model(tokenizer)
    special = SpecialIds.read(tokenizer, model.config)
    banned = set(torch.nonzero(special.banned_V).flatten().tolist())
    assert {151652, 151653, 151654, 151655, 151656} <= banned and 151_665 in banned
    assert not banned & {151645, 151643, 151646, 151648}  # stops and box tokens may be sampled
    text = rewards.prompt("grounding", "red <|image_pad|> circle")
    prompt = qwen_vl.encode_chat(tokenizer, special, text, [Image.new("RGB", (84, 56), "red")])
    assert prompt.ids.count(151655) == 6  # 3 × 2 image tokens, none from the question
    assert prompt.ids[:2] == [151644, 8948]  # <|im_start|>system
    policy = Policy(model, special.banned_V)
    sampler = Sampler(model, special)
    sampler.refresh(policy.named_parameters())
    (rollouts,) = sampler.generate([prompt], [keyed_uniforms(0, 0, "x", 4, 6)], 6)
    pack = prepare_attention(pack_groups([Group(prompt, rollouts)]), torch.device("cpu"))
    with torch.no_grad():
        logp_S, _ = policy(pack)
    sampled = torch.tensor([logp for completion in rollouts for logp in completion.logps])
    assert (logp_S - sampled).abs().max() <= 1e-5
    assert not banned & {token for completion in rollouts for token in completion.tokens}


def test_a_training_step_with_true_ids(tokenizer, alone, monkeypatch):
    monkeypatch.setattr(qwen_vl, "load", lambda *a, **k: (tiny.tiny_model(tokenizer), tokenizer))
    metrics, _ = ranks.steps(alone, count=1, prompts=2)
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["sampler_gap"] < 1e-5
