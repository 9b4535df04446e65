"""PyTorch 2.13's gloo kills a process now and then: the smallest program that shows it.

  OMP_NUM_THREADS=1 python results/gloo_race.py --workers 2      dies in some runs
  OMP_NUM_THREADS=1 python results/gloo_race.py --workers 1      does not

ProcessGroupGloo runs collectives on two worker threads. After each one, `runLoop` assigns the
collective's name to one std::string of the group, without a lock. "ALLGATHER_COALESCED" has 19
characters and lies on the heap, in a chunk of 32 bytes; "ALLREDUCE" is copied into the buffer that
the string has. Two assignments at once free a buffer twice, or write into a freed one.
FSDP2 gathers its shards, and DTensor.full_tensor its own, by the collective with the long name.
"""
import argparse
import time

import torch
import torch.distributed as dist


def gloo_with_workers(count: int):
    """A backend's constructor: init_process_group offers no option for gloo's threads."""

    def create(about, _):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        options._threads = count
        options._timeout = about.timeout
        return dist.ProcessGroupGloo(about.store, about.group_rank, about.group_size, options)

    return create


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    create = gloo_with_workers(given.workers)
    dist.Backend.register_backend("counted", create, extended_api=True, devices=["cpu"])
    dist.init_process_group("counted", rank=0, world_size=1, store=dist.HashStore())
    group = dist.group.WORLD
    whole, part, small = torch.ones(1), torch.ones(1), torch.ones(1)
    count, end = 0, time.time() + given.seconds
    while time.time() < end:
        works = []
        for _ in range(10):
            works.append(group.allgather_into_tensor_coalesced([whole], [part]))
            works.append(group.allreduce([small]))
        for work in works:
            work.wait()
        count += len(works)
    print("no death in", count, "collectives")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
