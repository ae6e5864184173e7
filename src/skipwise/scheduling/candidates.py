"""The schedules that a search is over: segments of the trajectory, heavy or light, and what they save by formula."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, Protocol

from skipwise.blocks import find_contract
from skipwise.cost import Prices, cost_of, price_blocks
from skipwise.errors import UserError, unknown
from skipwise.examples import Size
from skipwise.loading import load_skeleton
from skipwise.plan import ModelShape, Plan
from skipwise.planners.sandwich import Light, from_segments, schedule

Count = Literal["all-in", "block"]  # FLOPs: of everything, or of the blocks alone

MOST = 5000  # schedules of one search


class Screen(Protocol):
    """What foretells a schedule's cost without running it: `skipwise.scheduling.importance.Importance`."""

    models: tuple[ModelShape, ModelShape]

    def cost(self, segments: str) -> float:
        """How much is lost, such as by "LHHL"; lower is better."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A schedule. Saved FLOPs are fractions by formula; importance: what the screen foretells, None without one."""

    segments: str
    plan: Plan
    saved_block_flops: float
    saved_all_in_flops: float
    importance: float | None = None

    def saved(self, count: Count) -> float:
        """The fraction of FLOPs saved, by one count or the other."""
        return self.saved_all_in_flops if count == "all-in" else self.saved_block_flops


@dataclass(frozen=True)
class Space:
    """A heavy model, what is light beside it, and what each costs: prices at the length that tasks have."""

    shape: ModelShape
    light: Light
    light_shape: ModelShape
    prices: Prices
    others: dict[str, Prices]

    @classmethod
    def of(cls, model: str, light: Light, tokens: int) -> "Space":
        """From the models' configs alone; no weight is read."""
        size = Size(tokens=tokens)
        heavy = load_skeleton(model)
        shape, prices = find_contract(heavy).shape, price_blocks(heavy, size)
        if isinstance(light, Plan):
            return cls(shape, light, shape, prices, {})
        other = load_skeleton(light)
        return cls(shape, light, find_contract(other).shape, prices, {light: price_blocks(other, size)})

    def candidate(self, segments: str) -> Candidate:
        """The schedule of these segments, such as "LHHL"."""
        plan = from_segments(self.shape, segments, self.light)
        cost = cost_of(self.prices, plan, self.others)
        return Candidate(segments, plan, cost.saved_block_flops, cost.saved_all_in_flops)

    def with_light(self, segments: int, count: int) -> list[Candidate]:
        """Every schedule with `count` light segments. Raises UserError when there are none, or too many to search."""
        if not 1 <= count <= segments:
            raise UserError(f"{count} of {segments} segments cannot be light; choose from 1 to {segments}.")
        _check_number(math.comb(segments, count), segments)
        return [self.candidate(letters(segments, light)) for light in combinations(range(segments), count)]

    def saving(self, segments: int, budget: float, count: Count) -> list[Candidate]:
        """Every schedule that saves at least `budget` of the FLOPs. Raises UserError, with the nearest, for none."""
        if not 0 < budget < 1:
            raise UserError(f"budget={budget:g} is no part of the FLOPs to save; choose one between 0 and 1.")
        _check_number(2**segments, segments)
        subsets = (light for n in range(1, segments + 1) for light in combinations(range(segments), n))
        found = [self.candidate(letters(segments, light)) for light in subsets]
        fitting = [one for one in found if one.saved(count) >= budget - 1e-9]
        if not fitting:
            most = max(found, key=lambda one: one.saved(count))
            raise UserError(
                f"No schedule of {segments} segments saves {budget:.1%} of the {count} FLOPs: the nearest is "
                f"{most.segments}, which saves {most.saved(count):.1%}. Lower the budget or choose a lighter model."
            )
        return fitting

    def sandwich(self, segments: int, count: int) -> Candidate:
        """The paper's schedule with this many light segments' worth: half of it first, half last."""
        half = count // 2
        if count % 2 == 0:
            found = self.candidate("L" * half + "H" * (segments - count) + "L" * half)
            return replace(found, plan=found.plan.named("sandwich"))
        plan = schedule(self.shape, self.light, "sandwich", count / segments)
        cost = cost_of(self.prices, plan, self.others)
        return Candidate("sandwich", plan, cost.saved_block_flops, cost.saved_all_in_flops)


def letters(segments: int, light: Iterable[int]) -> str:
    """`letters(4, [0, 3])` -> "LHHL"."""
    chosen = set(light)
    return "".join("L" if number in chosen else "H" for number in range(segments))


def _check_number(count: int, segments: int) -> None:
    if count > MOST:
        raise UserError(
            f"There are {count} schedules of {segments} segments, and {MOST} can be searched; use fewer segments, or "
            "fix the number of light ones."
        )


def check_segments(segments: int) -> None:
    """Raise UserError unless a trajectory can be cut into so many."""
    if segments < 1:
        raise UserError(f"segments={segments}; the trajectory is cut into at least one.")


def check_count(count: str) -> None:
    """Raise UserError for a count of FLOPs that there is not."""
    if count not in ("all-in", "block"):
        raise unknown("count of FLOPs", count, ("all-in", "block"))


def screened(candidates: Sequence[Candidate], screen: Screen, space: Space) -> list[Candidate]:
    """The candidates with what the screen foretells, best first, equals in their order.

    Raises UserError for a screen of other models.
    """
    shapes = (space.shape, space.light_shape)
    for which, measured, own in zip(("heavy", "light"), screen.models, shapes, strict=True):
        if measured != own:
            raise UserError(
                f"The importance was measured with a {which} model of {measured.architecture} {measured.stacks}, "
                f"this search has {own.architecture} {own.stacks}; measure it with `skipwise schedule importance`."
            )
    rated = [replace(one, importance=screen.cost(one.segments)) for one in candidates]
    return sorted(rated, key=lambda one: one.importance or 0.0)
