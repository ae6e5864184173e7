"""The settings with which a fine-tuning fits a given memory, and which blocks to train within a number of bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from skipwise.errors import UserError
from skipwise.finetuning.memory.estimate import Estimator, MemoryEstimate
from skipwise.finetuning.runs import Train
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.sizes import GIB, parse_bytes, show_bytes

# what a device needs besides what torch's allocator hands out: the CUDA context, then workspaces and fragments
CONTEXT, SHARE = GIB // 2, 0.05
ALIKE = 0.05  # trained bytes that differ by less, as a fraction of all blocks', count as equal
Place = Literal["middle", "end"]


@dataclass(frozen=True)
class Fit:
    """Settings that fit `memory` bytes, the blocks that are trained, and the estimate that says so."""

    memory: int
    estimate: MemoryEstimate
    blocks: int
    trained_bytes: int

    @property
    def settings(self) -> FinetuneSettings:
        """What fits."""
        return self.estimate.settings

    @property
    def train(self) -> Train:
        """The blocks, as in `Plan.train`."""
        return self.estimate.train

    def sentence(self) -> str:
        """For people."""
        settings, estimate = self.settings, self.estimate
        free = (needed(estimate) - estimate.peak) / GIB
        parts = [
            f"train {estimate.trained} of {self.blocks} blocks ({describe_blocks(self.train)}; "
            f"{self.trained_bytes / GIB:.2f} GiB of weights)",
            f"{'patches' if settings.patch else 'pictures'} of {settings.pixels} px",
            f"gradient checkpointing {'on' if settings.checkpointing else 'off'}",
            f"LoRA rank {settings.rank}",
            f"optimiser {settings.optimiser}",
            f"late blocks {settings.late}",
        ]
        return (
            f"{estimate.model} fits your {show_bytes(self.memory)} card with these settings: {', '.join(parts)}. "
            f"Estimated peak {estimate.peak / GIB:.2f} GiB (training {estimate.training.total / GIB:.2f}, making of "
            f"residuals {estimate.making.total / GIB:.2f}), and {free:.2f} GiB kept free "
            "for the device's own needs."
        )


def needed(estimate: MemoryEstimate) -> int:
    """Bytes that a device must have: the estimated peak, a twentieth of it, and half a GiB for its context."""
    return CONTEXT + round((1 + SHARE) * estimate.peak)


def in_order(sizes: Mapping[str, Sequence[int]]) -> list[tuple[str, int, int]]:
    """(stack, number, bytes) of all blocks, in the order in which they run."""
    return [(stack, number, size) for stack, row in sizes.items() for number, size in enumerate(row)]


def consecutive(sizes: Mapping[str, Sequence[int]], count: int, place: Place) -> dict[str, tuple[int, ...]]:
    """Stack -> numbers of `count` blocks that follow each other, in the middle of the order or at its end."""
    order = in_order(sizes)
    start = len(order) - count if place == "end" else (len(order) - count) // 2
    chosen: dict[str, tuple[int, ...]] = {}
    for stack, number, _ in order[start : start + count]:
        chosen[stack] = (*chosen.get(stack, ()), number)
    return chosen


def bytes_of(sizes: Mapping[str, Sequence[int]], train: Train) -> int:
    """Bytes of the weights of these blocks."""
    return sum(sizes[stack][number] for stack, numbers in train.items() for number in numbers)


def describe_blocks(train: Train) -> str:
    """`transformer_blocks 14-18, single_transformer_blocks 0-22`."""
    parts = []
    for stack, numbers in train.items():
        pieces: list[list[int]] = []
        for number in numbers:
            if pieces and pieces[-1][-1] == number - 1:
                pieces[-1].append(number)
            else:
                pieces.append([number])
        shown = " ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in pieces)
        parts += [f"{stack} {shown}"] if pieces else []
    return ", ".join(parts)


def cheapest(model: str | nn.Module | Estimator, memory: str | int, settings: FinetuneSettings | None = None) -> Fit:
    """The best settings with which a fine-tuning fits `memory` ("8GiB", or bytes), making of residuals included.

    settings: what to start from; precision, LoRA, batch and late mode are kept, and checkpointing, patch and optimiser
    only made cheaper. In this order:

    1. as many bytes of blocks trained as anything allows, less a twentieth of all blocks;
    2. AdamW rather than its 8-bit form, which needs bitsandbytes and saves little of a LoRA;
    3. whole pictures rather than patches of half the side, which cost quality (docs/results/p3.md);
    4. without gradient checkpointing rather than with, which costs time alone.

    Blocks are consecutive: the model's last, or, under late mode "residual", those in its middle. Raises UserError that
    says what the least is when nothing fits.
    """
    estimator = model if isinstance(model, Estimator) else Estimator(model)
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    search = _Search(estimator, limit, settings or FinetuneSettings())
    return search.best()


@dataclass
class _Search:
    """A small ordered search; `ways` go from the best to the cheapest."""

    estimator: Estimator
    limit: int
    base: FinetuneSettings

    def __post_init__(self) -> None:
        self.sizes = self.estimator.block_bytes(self.base.dtype)
        self.total = len(in_order(self.sizes))
        self.place: Place = "end" if self.base.rule == "last" else "middle"

    @property
    def ways(self) -> list[FinetuneSettings]:
        """Settings from the best to the cheapest."""
        base = self.base
        checkpointing = dict.fromkeys((base.checkpointing, True))
        patches = dict.fromkeys((base.patch, base.patch or base.resolution // 2))
        optimisers = dict.fromkeys((base.optimiser, "adamw8bit"))
        return [
            replace(base, checkpointing=c, patch=p, optimiser=o)
            for o in optimisers
            for p in patches
            for c in checkpointing
        ]

    def best(self) -> Fit:
        """The best that fits."""
        if self._fits(self.ways[0], self.total):
            return self._fit(self.ways[0], self.total)
        cheapest = self.ways[-1]
        most = self._most(cheapest)
        if not most:
            raise self._nothing(cheapest)
        slack = ALIKE * sum(size for *_, size in in_order(self.sizes))
        enough = bytes_of(self.sizes, self._blocks(most)) - slack
        least = _largest(most, lambda count: bytes_of(self.sizes, self._blocks(count)) < enough) + 1
        way = next((way for way in self.ways if self._fits(way, least)), cheapest)
        return self._fit(way, self._most(way))

    def _fit(self, way: FinetuneSettings, count: int) -> Fit:
        train = self._blocks(count)
        estimate = self.estimator.estimate(way, train)
        return Fit(self.limit, estimate, self.total, bytes_of(self.sizes, train))

    def _blocks(self, count: int) -> Train:
        return consecutive(self.sizes, count, self.place)

    def _fits(self, way: FinetuneSettings, count: int) -> bool:
        train = self._blocks(count)
        if self.estimator.at_least(way, train) > self.limit:
            return False
        return needed(self.estimator.estimate(way, train)) <= self.limit

    def _most(self, way: FinetuneSettings) -> int:
        return _largest(self.total, lambda count: self._fits(way, count))

    def _nothing(self, way: FinetuneSettings) -> UserError:
        estimate = self.estimator.estimate(way, self._blocks(1))
        stages = {"training one block": estimate.training, "making residuals": estimate.making,
                  "encoding pictures": estimate.encoding}  # fmt: skip
        what = max(stages, key=lambda name: stages[name].total)
        return UserError(
            f"{estimate.model} does not fit {show_bytes(self.limit)}: the nearest that is possible is "
            f"{needed(estimate) / GIB:.2f} GiB, for {what} with {way.pixels} px, checkpointing and {way.optimiser}; "
            "give more memory or a smaller batch, rank or resolution."
        )


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` for which `holds`, which holds up to some number and no further; 0 for none."""
    low, high = (most, most) if holds(most) else (0, most - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
