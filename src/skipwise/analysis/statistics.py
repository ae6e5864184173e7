"""The statistics of one kind of reading, kept together: of plain texts, a part of the trajectories, a noise level."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor

from skipwise.analysis.cka import CKA, texts_a_group
from skipwise.analysis.lens import LensStatistics, Tail
from skipwise.analysis.states import StateStatistics, at_once
from skipwise.analysis.sums import Sums
from skipwise.analysis.tokens import SHORTEST, TokenStatistics

DISTANCES = 64  # up to which token-wise similarity is kept


class Statistics:
    """Those statistics of boundary states that `parts` asks for, of "layers", "cka", "tokens" and "lens".

    longest: tokens of the longest text that will be read.
    """

    def __init__(self, parts: Sequence[str], blocks: int, outliers: Tensor, longest: int):
        n, distances = blocks + 1, min(DISTANCES, longest - 1)
        self.layers = StateStatistics(blocks, outliers) if "layers" in parts else None
        self.cka = CKA(n) if "cka" in parts else None
        self.tokens = TokenStatistics(n, distances) if "tokens" in parts and longest >= SHORTEST else None
        self.lens = LensStatistics(n) if "lens" in parts else None
        self.forwards = Sums(number=())

    @property
    def sums(self) -> list[Sums]:
        """All sums that are kept."""
        found = (self.layers, self.cka, self.tokens, self.lens, self.forwards)
        return [each for each in found if each is not None]

    @property
    def used(self) -> bool:
        """Whether anything was read."""
        return bool(self.forwards.totals["number"])

    @classmethod
    def combined(cls, parts: Sequence[Self]) -> Self:
        """Over everything that any of `parts` has read."""
        total = copy.deepcopy(parts[0])
        for part in parts[1:]:
            for mine, other in zip(total.sums, part.sums, strict=True):
                mine.accumulate(**other.totals)
        return total

    def add(self, states: Sequence[Tensor]) -> None:
        """states: n tensors (batch, length, width), the boundary states of one forward over whole texts."""
        self.forwards.accumulate(number=1)
        if self.cka:
            self.cka.add(states, texts_a_group(states[0].shape[1]))
        if not (self.layers or self.tokens):
            return
        rows = max(1, at_once(states[0][:1]) // len(states))
        for start in range(0, len(states[0]), rows):
            some = torch.stack([state[start : start + rows] for state in states]).float()
            if self.layers:
                self.layers.add(some.flatten(1, 2))
            if self.tokens:
                self.tokens.add(some)

    def look(
        self, tail: AbstractContextManager[Tail], input_ids: Tensor, states: Sequence[Tensor], keep: Tensor
    ) -> None:
        """The logit lens on the same states; input_ids and keep: (batch, length)."""
        if self.lens and len(input_ids):
            with tail as predict:
                self.lens.add(predict, input_ids, torch.stack(list(states)), keep)

    def tensors(self) -> dict[str, Tensor]:
        """What was measured, by the names of `Analysis`, without a step's or level's axis."""
        found: dict[str, Tensor | None] = {}
        if self.layers:
            found |= {"similarity": self.layers.similarity, "update_norm": self.layers.update_norm}
            if len(self.layers.outliers):
                found["similarity_without_outliers"] = self.layers.similarity_without_outliers
                found["outlier_share"] = self.layers.outlier_share
        if self.cka:
            found["cka"] = self.cka.cka
        if self.tokens:
            found |= {"token_similarity": self.tokens.similarity, "token_similarity_far": self.tokens.far}
            found["recency"] = self.tokens.recency
        if self.lens and self.lens.totals["positions"]:
            found["lens_agreement"] = self.lens.agreement
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def profile(self) -> dict[str, Tensor]:
        """What is kept by step and by noise level: one (n,) or (n + 1,) a statistic; NaN where nothing was read."""
        found: dict[str, Tensor] = {}
        if self.layers:
            found |= {"similarity": self.layers.successive_similarity, "update_norm": self.layers.update_norm}
            if len(self.layers.outliers):
                without = self.layers.similarity_without_outliers
                found["similarity_without_outliers"] = torch.diagonal(without, offset=1)
        if self.tokens:
            found["recency"] = self.tokens.recency
        if self.lens:
            found["lens_agreement"] = self.lens.agreement
        return found
