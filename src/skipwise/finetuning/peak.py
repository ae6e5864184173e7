"""Peak memory of what runs, by part, counted at torch's dispatcher: on fake tensors an estimate, on real ones a
measurement.

Every storage that an op makes is counted until it is let go. What an op takes and frees within itself (a kernel's
workspace), the allocator's rounding and fragments, and the context of the device are not seen.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# in the order in which tables show them
PARTS = ("weights", "lora", "gradients", "optimiser", "activations", "residuals", "inputs")


@dataclass(frozen=True)
class Bytes:
    """An amount of memory by part, in bytes; parts are those of `PARTS`."""

    by_part: tuple[int, ...] = (0,) * len(PARTS)

    @classmethod
    def of(cls, **parts: int) -> "Bytes":
        """`Bytes.of(weights=4)`."""
        return cls(tuple(parts.get(name, 0) for name in PARTS))

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.by_part)

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(tuple(a + b for a, b in zip(self.by_part, other.by_part, strict=True)))

    def __sub__(self, other: "Bytes") -> "Bytes":
        return self + -1 * other

    def __rmul__(self, times: float) -> "Bytes":
        return Bytes(tuple(round(times * part) for part in self.by_part))

    def as_dict(self) -> dict[str, int]:
        """Part -> bytes."""
        return dict(zip(PARTS, self.by_part, strict=True))


@dataclass
class Segment:
    """What happens between two marks: memory at its begin, at its highest moment and at its end."""

    label: str
    begin: Bytes
    peak: Bytes
    end: Bytes


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live storages by part while it is active, and remembers the highest moment of each segment.

    New storages are `part`'s, by default activations: what autograd saved, gradients on their way, temporaries.
    """

    def __init__(self, part: str = "activations"):
        super().__init__()
        self._new = PARTS.index(part)
        self._live: dict[int, tuple[int, int]] = {}  # storage -> bytes, number of the part
        self._now = [0] * len(PARTS)
        self._total = self._highest = 0
        self.segments = [Segment("", Bytes(), Bytes(), Bytes())]

    @property
    def now(self) -> Bytes:
        """What is held at this moment."""
        return Bytes(tuple(self._now))

    @property
    def peak(self) -> Bytes:
        """What was held at the highest moment so far."""
        self._close()
        return max((segment.peak for segment in self.segments), key=lambda peak: peak.total)

    def label(self, tensors: Iterable[Any], part: str) -> None:
        """Count these tensors' storages, whether they are known or not, as this part."""
        number = PARTS.index(part)
        for leaf in tree_leaves(list(tensors)):
            if isinstance(leaf, Tensor):
                self._count(leaf, number, relabel=True)
        self._raise()

    def mark(self, label: str) -> None:
        """Begin a segment."""
        self._close()
        now = self.now
        self.segments.append(Segment(label, now, now, now))
        self._highest = self._total

    def _close(self) -> None:
        self.segments[-1].end = self.now

    def _count(self, tensor: Tensor, part: int, relabel: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            size, before = self._live[key]
            if relabel and before != part:
                self._now[before] -= size
                self._now[part] += size
                self._live[key] = size, part
            return
        size = storage.nbytes()
        self._live[key] = size, part
        self._now[part] += size
        self._total += size
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, part = self._live.pop(key)
        self._now[part] -= size
        self._total -= size

    def _raise(self) -> None:
        if self._total > self._highest:
            self._highest = self._total
            self.segments[-1].peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count what it made."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._new)
        self._raise()
        return result


def compose(segments: Iterable[Segment], repeats: Mapping[str, float], start: Bytes) -> tuple[Bytes, Bytes]:
    """(peak, end) when these segments follow each other from `start` on, those labelled in `repeats` that many times.

    Every repetition of a segment adds the same, so that its first or its last one is the highest.
    """
    level = highest = start
    for segment in segments:
        times = repeats.get(segment.label, 1)
        change = segment.end - segment.begin
        for before in (level, level + (times - 1) * change):
            highest = max(highest, before + (segment.peak - segment.begin), key=lambda amount: amount.total)
        level = level + times * change
    return highest, level
