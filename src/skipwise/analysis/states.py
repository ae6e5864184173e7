"""Statistics of hidden states between blocks, streamed: memory does not grow with the number of tokens.

Source: "Skip to the Good Part" (arXiv 2603.07475), layer-wise analysis: cosine similarity between the hidden states of
every pair of layers, averaged over tokens. Ours, because one outlier channel can hold a cosine near 1 (arXiv
2605.06366): the same without the outlier channels, and the relative update norm. States are read at the blocks, so the
last one is before the final norm.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.sums import Sums
from skipwise.blocks import Stack, bind, module_list, trace_calls
from skipwise.errors import UserError
from skipwise.examples import example_inputs
from skipwise.models.hooks import Onlooker
from skipwise.twins import twin

_EPSILON = 1e-24  # of a squared norm
_FEWEST = 32  # tokens that are looked at at once


class StateStatistics(Sums):
    """Sums over tokens of one stack's boundary states; a stack of n blocks has n + 1.

    outliers: the channels, (c,) int64, that `similarity_without_outliers` leaves out.
    """

    def __init__(self, blocks: int, outliers: Tensor | None = None):
        self.outliers = torch.zeros(0, dtype=torch.long) if outliers is None else outliers
        pairs = (blocks + 1, blocks + 1)
        share = (blocks + 1, len(self.outliers))
        super().__init__(
            tokens=(), similarity=pairs, without_outliers=pairs, outlier_share=share, update_norm=(blocks,)
        )

    @property
    def tokens(self) -> int:
        """How many tokens went in."""
        return int(self.totals["tokens"])

    def add(self, states: Tensor) -> None:
        """states: (blocks + 1, tokens, width), any float dtype."""
        for part in states.split(max(_FEWEST, at_once(states[:, :1])), dim=1):
            self._add(part.float())

    def _add(self, states: Tensor) -> None:
        outliers = self.outliers.to(states.device)
        apart = states[..., outliers]  # (blocks + 1, tokens, c)
        rest = states.index_fill(-1, outliers, 0.0) if len(outliers) else states
        # a token's products are summed without its outliers first: beside them, in float32, the rest would be lost
        products = _products(rest)
        squares = products.diagonal(dim1=1, dim2=2).T  # (blocks + 1, tokens)
        inverse = _inverse_norms(squares)
        without = similarity = _weighted(products, inverse)
        if len(outliers):
            inverse = _inverse_norms(squares + apart.square().sum(-1))
            apart *= inverse[..., None]
            similarity = _weighted(products, inverse) + apart.flatten(1) @ apart.flatten(1).T
        updates = (states[1:] - states[:-1]).norm(dim=-1)  # (blocks, tokens)
        self.accumulate(
            tokens=states.shape[1],
            without_outliers=without,
            similarity=similarity,
            outlier_share=apart.square().sum(1),
            update_norm=(updates * inverse[:-1]).sum(1),
        )

    @property
    def similarity(self) -> Tensor:
        """(blocks + 1, blocks + 1): mean cosine of every pair of boundary states; NaN before any token."""
        return self._mean("similarity")

    @property
    def similarity_without_outliers(self) -> Tensor:
        """(blocks + 1, blocks + 1): the same of states whose outlier channels are set to zero."""
        return self._mean("without_outliers")

    @property
    def outlier_share(self) -> Tensor:
        """(blocks + 1, c): mean share of a token's squared norm that each outlier channel holds."""
        return self._mean("outlier_share")

    @property
    def update_norm(self) -> Tensor:
        """(blocks,): mean of |output - input| / |input|; NaN before any token."""
        return self._mean("update_norm")

    @property
    def successive_similarity(self) -> Tensor:
        """(blocks,): mean cosine between the input and the output of every block."""
        return torch.diagonal(self.similarity, offset=1)

    def _mean(self, name: str) -> Tensor:
        return self.totals[name] / self.totals["tokens"]


def _products(states: Tensor) -> Tensor:
    """(tokens, n, n): of each token's states (n, tokens, width), the dot products of every pair."""
    return torch.bmm(states.permute(1, 0, 2), states.permute(1, 2, 0))


def _inverse_norms(squares: Tensor) -> Tensor:
    """1 over the norms whose squares these are."""
    return squares.clamp_min(_EPSILON).rsqrt()


def _weighted(products: Tensor, inverse: Tensor) -> Tensor:
    """(n, n): sum over tokens of products (tokens, n, n) over both norms; inverse: 1 over the norms, (n, tokens)."""
    weights = inverse.T
    return (products * weights[:, :, None]).mul_(weights[:, None]).sum(0)


def at_once(item: Tensor) -> int:
    """How many such items are best looked at together: on a CPU, what its cache holds (three times as fast as all)."""
    return max(1, (2**17 if item.device.type == "cpu" else 2**26) // item.numel())


def outlier_channels(states: Tensor, count: int) -> Tensor:
    """(count,) int64: the channels that hold the largest share of the mean square over tokens, the largest first.

    states: (n, tokens, width). The share is averaged over the n boundary states, whose norms differ, so that every pair
    of them is compared on the same channels. Raises UserError when no channel would be left.
    """
    if not 0 <= count < states.shape[-1]:
        raise UserError(f"outliers={count} is not a number of channels to leave out of {states.shape[-1]}; 1 is usual.")
    squares = states.double().square().mean(1)  # (n, width)
    shares = squares / squares.sum(1, keepdim=True).clamp_min(_EPSILON)
    return shares.mean(0).topk(count).indices


class StateReader:
    """Collects the boundary states of one stack during a forward of its model."""

    def __init__(self, model: nn.Module, stack: Stack):
        self._blocks = list(module_list(model, stack.name))
        self._signature = inspect.signature(type(self._blocks[0]).forward)
        # of several streams the one that a block takes first: the image's, which the last block returns too
        order = list(self._signature.parameters)
        self.stream = min(stack.streams, key=lambda stream: order.index(stream.argument))
        self._axes = self._find_axes(model, stack)
        self._states: list[Tensor] = []

    def _find_axes(self, model: nn.Module, stack: Stack) -> tuple[int, int]:
        """Which axes of states are texts and tokens, seen in a call of one short text: 0 and 1; where they are (length,
        batch, width), as XLNet's and FSMT's, 1 and 0; where several streams come first, as Gemma3n's, 1 and 2.
        """
        other = twin(model)
        traces = trace_calls(other, {stack.name: module_list(other, stack.name)}, example_inputs(other))
        state = traces[stack.name].calls[0].arguments[self.stream.argument]
        if state.shape[0] == 1 or state.shape[1] > 1:
            return 0, 1
        return 1, (0 if state.ndim == 3 else 2)

    def _by_text(self, state: Tensor) -> Tensor:
        """(batch, length, width); what a token has in several streams (hyper-connections) side by side."""
        state = state.movedim(self._axes, (0, 1))
        return state.flatten(2) if state.ndim > 3 else state

    @contextmanager
    def reading(self) -> Iterator["StateReader"]:
        """Attach to the model for a while; every forward inside replaces the states of the one before."""

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
            if module is self._blocks[0]:
                self._states = [self._by_text(bind(self._signature, module, args, kwargs)[self.stream.argument])]
            self._states.append(self._by_text(result if self.stream.output is None else result[self.stream.output]))

        onlooker = Onlooker(look)
        handles = [block.register_forward_hook(onlooker, with_kwargs=True) for block in self._blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._states = []

    def take(self) -> list[Tensor]:
        """blocks + 1 tensors (batch, length, width) of the last forward, which are forgotten here."""
        states, self._states = self._states, []
        return states
