"""What a static plan keeps of each stack of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def of(self, key: str, value: Any) -> Any:
        """What a setting of the config is after the cut: unchanged unless it is about single blocks."""
        if key in WINDOWS and isinstance(value, list | tuple) and len(value) == self.length:
            return self._windows(value)
        return cut_setting(key, value, self.length, self.blocks)

    def _windows(self, value: Sequence[int]) -> Sequence[int]:
        """The windows of the kept blocks; of all where the widest would go, to which a forward pads its input."""
        left = type(value)(value[number] for number in self.blocks)  # type: ignore[call-arg]
        return left if max(left) == max(value) else value


def kept_of(plan: Plan) -> list[Kept]:
    """What a static plan keeps of each stack that it takes blocks from."""
    skipped = {stack: numbers for stack, numbers in plan.phases[0].skip.items() if numbers}
    lengths = plan.model.stacks
    return [
        Kept(stack, lengths[stack], tuple(i for i in range(lengths[stack]) if i not in numbers))
        for stack, numbers in skipped.items()
    ]
