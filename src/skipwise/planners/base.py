"""What all planners share: the registry, how much may be skipped, and the plan that comes out."""

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from skipwise.analysis.record import Analysis
from skipwise.calibration import Calibration
from skipwise.errors import UserError, unknown
from skipwise.plan import Plan, Provenance
from skipwise.versions import versions


@dataclass(frozen=True)
class Choice:
    """The blocks of one stack that a method gives up, in its order, and the scores it went by."""

    blocks: tuple[int, ...]
    scores: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Allowance:
    """How much of a stack may be skipped: a number of blocks, or a fraction of the FLOPs of its blocks."""

    flops: tuple[float, ...]
    skip: int | None = None
    budget: float | None = None

    def holds(self, blocks: Collection[int]) -> bool:
        """Whether these blocks together are not too many."""
        if self.skip is not None:
            return len(blocks) <= self.skip
        # 0.25 of 24 equal blocks is 6, whatever rounding says
        return sum(self.flops[block] for block in blocks) <= (self.budget or 0.0) * sum(self.flops) * (1 + 1e-9)

    def take(self, order: Iterable[int]) -> tuple[int, ...]:
        """The first blocks of an order that together are not too many; the order is not run further than that."""
        taken: list[int] = []
        if not any(self.holds([block]) for block in range(len(self.flops))):
            return ()
        for block in order:
            if not self.holds([*taken, block]):
                break
            taken.append(block)
            if self.skip == len(taken):
                break
        return tuple(taken)


# (analysis, stack, allowance[, calibration], **settings) -> Choice; a method that runs the model takes `calibration`
Planner = Callable[..., Choice]

_planners: dict[str, Planner] = {}


def planner(name: str) -> Callable[[Planner], Planner]:
    """Register a planner under a name: `@planner("similarity")`."""

    def register(function: Planner) -> Planner:
        if name in _planners:
            raise ValueError(f"two planners are named {name!r}")
        _planners[name] = function
        return function

    return register


def planner_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_planners)


def needs_model(method: str) -> bool:
    """Whether a method runs the model, and so takes a calibration. Raises UserError for an unknown one."""
    if method not in _planners:
        raise unknown("planning method", method, _planners)
    return "calibration" in inspect.signature(_planners[method]).parameters


def make_plan(
    analysis: Analysis,
    method: str = "similarity",
    *,
    skip: int | None = None,
    budget: float | None = None,
    stack: str | None = None,
    calibration: Calibration | None = None,
    **settings: Any,
) -> Plan:
    """A static plan that skips blocks of one stack, chosen by `method`.

    Give either skip, a number of blocks, or budget, the fraction in [0, 1) of the stack's FLOPs to save; the plan never
    saves more than the budget. stack: the longest one when left out. calibration: the model and texts, for methods that
    run it (greedy). settings: what the method takes, such as `forbid_neighbours` (similarity) or `seed` (random).
    Raises UserError for an unknown method, stack or setting, and for more blocks than the method can give.
    """
    with_model = needs_model(method)
    stack = _stack(analysis, stack)
    _check_settings(method, settings)
    length = analysis.model.stacks[stack]
    _check_amount(skip, budget, stack, length)
    if with_model and calibration is None:
        raise UserError(f"{method} runs the model; give calibration=Calibration.of(model, tokenizer, texts).")
    flops = analysis.get(stack, "block_flops")
    if flops is None:
        raise UserError(f"{analysis.name} has no block_flops of {stack}; make it anew with `skipwise analyze`.")
    allowance = Allowance(tuple(flops.tolist()), skip, budget)
    needed = {"calibration": calibration} if with_model else {}
    choice = _planners[method](analysis, stack, allowance, **needed, **settings)
    if skip is not None and len(choice.blocks) < skip:
        raise UserError(
            f"{method} with {settings} can give up at most {len(choice.blocks)} of {length} blocks, not {skip}."
        )
    asked = {"skip": skip} if skip is not None else {"budget": budget}
    facts = calibration.facts if with_model and calibration else analysis.calibration
    made_by = Provenance(
        method=method,
        settings=asked | settings,
        calibration=facts,
        scores={stack: choice.scores},
        versions=versions(),
    )
    return Plan.static(analysis.model, {stack: choice.blocks}, made_by)


def _check_amount(skip: int | None, budget: float | None, stack: str, length: int) -> None:
    if (skip is None) == (budget is None):
        raise UserError(
            "Give either skip (a number of blocks) or budget (a fraction of the FLOPs), not both or neither."
        )
    if skip is not None and not 0 <= skip <= length:
        raise UserError(f"Cannot skip {skip} blocks: {stack} has {length}. Choose 0 to {length}.")
    if budget is not None and not 0 <= budget < 1:
        raise UserError(f"budget={budget} is not a fraction; choose from 0 (save nothing) to below 1, such as 0.18.")


def _stack(analysis: Analysis, stack: str | None) -> str:
    if stack is None:
        return analysis.main_stack
    if stack not in analysis.stacks:
        raise unknown("stack", stack, analysis.stacks)
    return stack


def _check_settings(method: str, settings: dict[str, Any]) -> None:
    legal = [name for name in list(inspect.signature(_planners[method]).parameters)[3:] if name != "calibration"]
    for name in settings:
        if name not in legal:
            raise unknown(f"setting of {method}", name, legal)
