"""Fixtures. Two-rank tests share one pair of worker processes for the whole run (gloo on CPU)."""
import importlib
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fsdp

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def worker(rank, store_file, commands, results):
    """A rank that runs the functions it is sent: (module, function, keyword arguments)."""
    torch.set_num_threads(1)

    store = dist.FileStore(store_file, 2)
    dist.init_process_group(fsdp.register_gloo(), rank=rank, world_size=2, store=store, timeout=timedelta(seconds=90))
    ranks = fsdp.Processes(rank, 2, torch.device("cpu"))
    while command := commands.get():
        module, name, arguments = command
        try:
            outcome = getattr(importlib.import_module(module), name)(ranks, **arguments)
            results.put(("done", outcome))
        except Exception:
            results.put(("failed", traceback.format_exc()))


class Pair:
    """Two ranks: pair.run("module.function", …) → [result of rank 0, result of rank 1]."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self.queues = [(context.Queue(), context.Queue()) for _ in range(2)]
        self.processes = [
            context.Process(target=worker, args=(rank, str(folder / "store"), *queues), daemon=True)
            for rank, queues in enumerate(self.queues)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, timeout=120, **arguments):
        module, name = function.split(".")
        for commands, _ in self.queues:
            commands.put((module, name, arguments))
        outcomes = [results.get(timeout=timeout) for _, results in self.queues]
        for state, outcome in outcomes:
            assert state == "done", outcome
        return [outcome for _, outcome in outcomes]

    def close(self):
        for commands, _ in self.queues:
            commands.put(None)
        for process in self.processes:
            process.join(5)
            process.kill()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def alone():
    """This process as a world of one, with one thread as each of the pair: two would cut sums otherwise, and round."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group(fsdp.register_gloo(), rank=0, world_size=1, store=dist.HashStore())
    return fsdp.Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def world(request):
    """(policy, Hugging Face twin, tokenizer, special ids, prompts), tied and untied; new for each test file."""
    from references import make_world  # here: most files do without Hugging Face's model

    return make_world(request.param)
