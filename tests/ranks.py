"""What several test files ask of ranks: each function runs on every rank (conftest.Pair) or on one alone."""
import contextlib
import json
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.checkpoint import state_dict as dist_state

import fsdp
import grpo_vl
import run_folder
import training

WORLD = "synthetic:grounding?size=56x56&distractors=0-2"
SMALL = dict(
    model="tiny", data=(WORLD,), prompts=4, group=3, max_tokens=8, lr=1.0, max_norm=1e9, checkpointing=False,
    steps=3, eval_samples=3, pictures_every=0, overlong="keep", micro_tokens=2000,
)


def by_length(task, completion, answer, image_size=None, *, truncated=False, **options):
    """A reward with variance for a model that knows nothing: hashes the text into [0, 1]."""
    return (sum(map(ord, completion)) % 97) / 97


def make_run(ranks, optimizer="sgd", reward=by_length, **changes):
    config = grpo_vl.Config(**(SMALL | changes))
    run = training.prepare(config, ranks, config.model, freeze_vision=config.freeze_vision, beta=config.beta)
    run.reward = reward
    if optimizer == "sgd":
        run.optimizer = torch.optim.SGD(fsdp.trainable_parameters(run.policy), lr=config.lr)
    run.sampler.refresh(fsdp.gathered_parameters(run.policy))
    return run


@contextlib.contextmanager
def computing_in_bf16():
    """As on GPUs."""
    with mock.patch.object(fsdp, "compute_dtype", lambda device: torch.bfloat16):
        yield


@contextlib.contextmanager
def compiling():
    """What is compiled is traced, forward and backward, and run as it is: seconds, not minutes. Yields its graphs."""
    graphs = []

    def run_as_it_is(graph, inputs, **options):
        graphs.append(graph)
        return aot_eager(graph, inputs, **options)

    torch._dynamo.reset()  # other tests' graphs
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=run_as_it_is)):
        yield graphs
    torch._dynamo.reset()


def full_weights(policy):
    if hasattr(policy, "units"):  # sharded by hand
        return {name: weight.clone() for name, weight in fsdp.full_parameters(policy)}
    options = dist_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {n: w.clone() for n, w in dist_state.get_model_state_dict(policy, options=options).items()}


def steps(ranks, count=3, **changes):
    """(metrics of each step, weights afterwards) of `count` steps from the same seed."""
    run = make_run(ranks, **changes)
    metrics = [grpo_vl.train_step(run, step) for step in range(count)]
    weights = full_weights(run.policy)
    return metrics, weights if ranks.rank == 0 else None


def export(ranks, folder, model):
    """A trained step's weights in Hugging Face format, and the policy's own log-probs to compare with."""
    run = make_run(ranks, model=model, lr=0.1)
    grpo_vl.train_step(run, 0)
    weights = fsdp.full_state_dict(run.policy)
    run_folder.export(Path(folder), run.policy, weights, run.tokenizer, model)
    return json.loads((Path(folder) / "config.json").read_text())["tie_word_embeddings"]
