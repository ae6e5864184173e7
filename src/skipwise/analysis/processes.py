"""Several processes, one analysis: each reads its share of the batches, and the sums are added up.

The processes are torch.distributed's, however they were started: `accelerate launch`, `torchrun`, or an `Accelerator`
that the caller made. Without any, everything here does nothing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

from skipwise.analysis.sums import Sums

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every item goes to exactly one process."""
    rank, size = world()
    return items[rank::size]


def add_up(statistics: Iterable[Sums]) -> None:
    """Replace, in place and in every process, each total by its sum over the processes."""
    if world()[1] == 1:
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"  # nccl knows no tensors on the CPU
    for each in statistics:
        for name, total in each.totals.items():
            shared = total.to(device)
            distributed.all_reduce(shared)
            each.totals[name] = shared.cpu()


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that a launcher started beside this one; yields whether this is the one that writes files.

    With GPUs, "cuda" means within this the one of this process.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.is_available()
    own = launched and not distributed.is_initialized()
    if own:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("gloo")  # what is exchanged are small sums on the CPU
    try:
        yield world()[0] == 0
    finally:
        if own:
            distributed.destroy_process_group()
