"""Logit lens: what the model would say if it stopped after block i, and how often that is its final word.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020). The model's own tail (final norm, head, and whatever
else stands after its last block) is run on each boundary state, which is the model with all later blocks skipped. How a
model's tail is made need not be known: all blocks but the last are skipped, and what the last returns is replaced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.sums import Sums
from skipwise.blocks import Contract, Stream, module_list
from skipwise.plan import Plan
from skipwise.skipping import skip

_POSITIONS = 512  # whose logits are held at once, or one text's

# (input_ids (rows, length), states (rows, length, width)) -> predicted token ids (rows, length), or None
Tail = Callable[[Tensor, Tensor], Tensor | None]


class LensStatistics(Sums):
    """Counts of positions at which the lens agrees with the final prediction, at each of `states` boundary states."""

    def __init__(self, states: int):
        super().__init__(agreed=(states,), positions=())

    def add(self, tail: Tail, input_ids: Tensor, states: Tensor, keep: Tensor) -> None:
        """input_ids and keep: (batch, length), states: (n, batch, length, width); counts where `keep` is true."""
        said = predictions(tail, input_ids, states)
        if said is not None:
            self.accumulate(agreed=(said == said[-1])[:, keep].sum(1), positions=keep.sum())

    @property
    def agreement(self) -> Tensor:
        """(n,): share of positions at which boundary state i already gives the final prediction; NaN before any."""
        return self.totals["agreed"] / self.totals["positions"]


def predictions(tail: Tail, input_ids: Tensor, states: Tensor) -> Tensor | None:
    """(n, batch, length): the token that each boundary state gives; None for a model whose forward has no logits.

    input_ids: (batch, length), states: (n, batch, length, width). Logits of a few texts only are held at once.
    """
    rows = max(1, _POSITIONS // input_ids.shape[1])
    ids = input_ids.repeat(len(states), 1)
    parts = []
    for some, inside in zip(ids.split(rows), states.flatten(0, 1).split(rows), strict=True):
        said = tail(some, inside)
        if said is None:
            return None
        parts.append(said)
    return torch.cat(parts).unflatten(0, states.shape[:2])


@contextmanager
def tail_of(model: nn.Module, contract: Contract, stack: str, stream: Stream) -> Iterator[Tail]:
    """The model's tail as a function, for as long as its other blocks are skipped."""
    given: list[Tensor] = []

    def replace(module: nn.Module, args: tuple, result: Any) -> Any:
        if stream.output is None:
            return given[0]
        return tuple(given[0] if place == stream.output else item for place, item in enumerate(result))

    def tail(input_ids: Tensor, states: Tensor) -> Tensor | None:
        given[:] = [states]
        logits = getattr(model(input_ids=input_ids), "logits", None)
        return None if logits is None else logits.argmax(-1)

    others = Plan.static(contract.shape, {stack: range(contract.stacks[stack].length - 1)})
    with skip(model, others):
        handle = module_list(model, stack)[-1].register_forward_hook(replace)
        try:
            yield tail
        finally:
            handle.remove()
