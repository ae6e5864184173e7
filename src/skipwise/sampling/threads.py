"""How many of torch's threads a generation is worth on a CPU.

Threads that share a small product wait for each other longer than they work: a step of tiny-dllm takes 4.7 ms in one
thread and 21 in two that wait passively, as they do under the command line.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

GRAIN = 2_000_000  # multiplications of a product that a thread is worth: 20 to 40 microseconds


@contextmanager
def worthwhile_threads(model: nn.Module, tokens: int) -> Iterator[None]:
    """No more threads, for as long as the `with` lasts, than the model's products of so many tokens are worth."""
    before, found = torch.get_num_threads(), _worthwhile(model, tokens)
    if found >= before:
        yield
        return
    torch.set_num_threads(found)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _worthwhile(model: nn.Module, tokens: int) -> int:
    """By the product of the middle one of all weights, as most of a step is made of such."""
    weights = [part for part in model.parameters() if part.ndim == 2]
    if not weights or any(part.device.type != "cpu" for part in weights):
        return torch.get_num_threads()
    middle = statistics.median_low(part.numel() for part in weights)
    return max(1, tokens * middle // GRAIN)
