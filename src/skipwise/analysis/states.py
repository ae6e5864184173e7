"""Statistics of hidden states between blocks, streamed: memory does not grow with the number of tokens.

Source: "Skip to the Good Part" (arXiv 2603.07475), layer-wise analysis: cosine similarity between the hidden states of
every pair of layers, averaged over tokens. The relative update norm beside it is ours, because one outlier channel can
hold a cosine near 1 (arXiv 2605.06366). States are read at the blocks, so the last one is before the final norm.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.blocks import Stack, bind, module_list

_EPSILON = 1e-12


class StateStatistics:
    """Running sums over tokens of one stack's boundary states; a stack of n blocks has n + 1."""

    def __init__(self, blocks: int):
        self.tokens = 0
        self._similarity = torch.zeros(blocks + 1, blocks + 1, dtype=torch.float64)
        self._update_norm = torch.zeros(blocks, dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """states: (blocks + 1, tokens, width), any float dtype."""
        states = states.float()
        norms = states.norm(dim=-1).clamp_min(_EPSILON)  # (blocks + 1, tokens)
        # the sum over tokens of the cosines of every pair is one product of the flattened unit vectors
        unit = (states / norms[..., None]).flatten(1)
        self._similarity += (unit @ unit.T).double().cpu()
        updates = (states[1:] - states[:-1]).norm(dim=-1)
        self._update_norm += (updates / norms[:-1]).double().sum(1).cpu()
        self.tokens += states.shape[1]

    @property
    def similarity(self) -> Tensor:
        """(blocks + 1, blocks + 1): mean cosine of every pair of boundary states; NaN before any token."""
        return self._similarity / self.tokens if self.tokens else torch.full_like(self._similarity, torch.nan)

    @property
    def update_norm(self) -> Tensor:
        """(blocks,): mean of |output - input| / |input|; NaN before any token."""
        return self._update_norm / self.tokens if self.tokens else torch.full_like(self._update_norm, torch.nan)

    @property
    def successive_similarity(self) -> Tensor:
        """(blocks,): mean cosine between the input and the output of every block."""
        return torch.diagonal(self.similarity, offset=1)


class StateReader:
    """Collects the boundary states of one stack during a forward of its model."""

    def __init__(self, model: nn.Module, stack: Stack):
        self._blocks = list(module_list(model, stack.name))
        self._signature = inspect.signature(type(self._blocks[0]).forward)
        # of several streams the one that a block takes first: the image's, which the last block returns too
        order = list(self._signature.parameters)
        self._stream = min(stack.streams, key=lambda stream: order.index(stream.argument))
        self._states: list[Tensor] = []

    @contextmanager
    def reading(self) -> Iterator["StateReader"]:
        """Attach to the model for a while; every forward inside replaces the states of the one before."""

        def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._states = [bind(self._signature, module, args, kwargs)[self._stream.argument]]

        def each(module: nn.Module, args: tuple, result: Any) -> None:
            self._states.append(result if self._stream.output is None else result[self._stream.output])

        handles = [self._blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
        handles += [block.register_forward_hook(each) for block in self._blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._states = []

    def boundaries(self) -> list[Tensor]:
        """The last forward's boundary states, each (batch, length, width): what goes into every block, and the end."""
        return list(self._states)

    def states(self, keep: Tensor) -> Tensor:
        """(blocks + 1, tokens, width): the last forward's states at positions where `keep` (batch, length) is true."""
        return torch.stack([state[keep] for state in self._states])
