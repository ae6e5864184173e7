"""What a static plan keeps of each stack of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipwise.per_layer import cut_setting
from skipwise.plan import Plan

WINDOWS = ("attention_window",)  # a list with an entry for each layer, by a name that does not say so


@dataclass(frozen=True)
class Kept:
    """The blocks of one stack that are kept, by their old numbers."""

    stack: str
    length: int
    blocks: tuple[int, ...]

    @property
    def skipped(self) -> list[int]:
        """The numbers of the others."""
        return [number for number in range(self.length) if number not in self.blocks]

    @property
    def is_first(self) -> bool:
        """Whether these are the first blocks, each of which keeps its number."""
        return self.blocks == tuple(range(len(self.blocks)))

    def share(self, size: int) -> int:
        """What is left of something that has as much for each block."""
        return size // self.length * len(self.blocks)

    def of(self, key: str, value: Any) -> Any:
        """What a setting of the config is after the cut: unchanged unless it is about single blocks."""
        if key in WINDOWS and isinstance(value, list | tuple) and len(value) == self.length:
            return self._windows(value)
        return cut_setting(key, value, self.length, self.blocks)

    def _windows(self, value: Sequence[int]) -> Sequence[int]:
        """The windows of the kept blocks; of all where the widest would go, to which a forward pads its input."""
        left = type(value)(value[number] for number in self.blocks)  # type: ignore[call-arg]
        return left if max(left) == max(value) else value


@dataclass(frozen=True)
class Slices:
    """What is left of a tensor outside of the blocks that has a slice for each along one dimension, one after the other
    (the contact head of ESM, which reads the attentions of all layers).
    """

    dimension: int
    kept: Kept

    def of(self, tensor: Tensor) -> Tensor:
        """The slices of the kept blocks."""
        parts = tensor.chunk(self.kept.length, self.dimension)
        return torch.cat([parts[number] for number in self.kept.blocks], self.dimension).contiguous()


def slices(old: Sequence[int], new: Sequence[int], kept: Sequence[Kept]) -> Slices | None:
    """How a shape becomes another one by leaving out the slices of skipped blocks; None where it does not, or where it
    cannot be told of which stack they are.
    """
    differing = [place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(old) != len(new) or len(differing) != 1:
        return None
    (place,) = differing
    found = [one for one in kept if is_share(old[place], new[place], one)]
    return Slices(place, found[0]) if len(found) == 1 else None


def is_share(old: int, new: int, kept: Kept) -> bool:
    """Whether a size is as much for each block as it was."""
    return old % kept.length == 0 and new == kept.share(old)


def kept_of(plan: Plan) -> list[Kept]:
    """What a static plan keeps of each stack that it takes blocks from."""
    skipped = {stack: numbers for stack, numbers in plan.phases[0].skip.items() if numbers}
    lengths = plan.model.stacks
    return [
        Kept(stack, lengths[stack], tuple(i for i in range(lengths[stack]) if i not in numbers))
        for stack, numbers in skipped.items()
    ]
