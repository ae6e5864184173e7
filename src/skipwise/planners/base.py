"""What all planners share: the registry, how many blocks to skip, and the plan that comes out."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skipwise.analysis.record import Analysis
from skipwise.errors import UserError, unknown
from skipwise.plan import Plan, Provenance
from skipwise.versions import versions


@dataclass(frozen=True)
class Choice:
    """The blocks of one stack in the order in which a method gives them up, and the scores it went by (one a block)."""

    order: tuple[int, ...]
    scores: dict[str, list[float]] = field(default_factory=dict)


# (analysis, stack, **settings) -> Choice
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


def make_plan(
    analysis: Analysis,
    method: str = "similarity",
    *,
    skip: int | None = None,
    budget: float | None = None,
    stack: str | None = None,
    **settings: Any,
) -> Plan:
    """A static plan that skips blocks of one stack, chosen by `method`.

    Give either skip, a number of blocks, or budget, the fraction in [0, 1) of the stack's FLOPs to save; the plan never
    saves more than the budget. stack: the longest one when left out. settings: what the method takes, such as
    `forbid_neighbours` (similarity) or `seed` (random).
    Raises UserError for an unknown method, stack or setting, and for more blocks than the method can give.
    """
    if method not in _planners:
        raise unknown("planning method", method, _planners)
    stack = _stack(analysis, stack)
    _check_settings(method, settings)
    length = analysis.model.stacks[stack]
    if (skip is None) == (budget is None):
        raise UserError(
            "Give either skip (a number of blocks) or budget (a fraction of the FLOPs), not both or neither."
        )
    if skip is not None and not 0 <= skip <= length:
        raise UserError(f"Cannot skip {skip} blocks: {stack} has {length}. Choose 0 to {length}.")
    if budget is not None and not 0 <= budget < 1:
        raise UserError(f"budget={budget} is not a fraction; choose from 0 (save nothing) to below 1, such as 0.18.")
    choice = _planners[method](analysis, stack, **settings)
    numbers = choice.order[:skip] if skip is not None else within_budget(analysis, stack, choice, budget or 0.0)
    if skip is not None and len(numbers) < skip:
        raise UserError(
            f"{method} with {settings} can give up at most {len(choice.order)} of {length} blocks, not {skip}."
        )
    asked = {"skip": skip} if skip is not None else {"budget": budget}
    made_by = Provenance(
        method=method,
        settings=asked | settings,
        calibration=analysis.calibration,
        scores={stack: choice.scores},
        versions=versions(),
    )
    return Plan.static(analysis.model, {stack: numbers}, made_by)


def _stack(analysis: Analysis, stack: str | None) -> str:
    if stack is None:
        return analysis.main_stack
    if stack not in analysis.stacks:
        raise unknown("stack", stack, analysis.stacks)
    return stack


def _check_settings(method: str, settings: dict[str, Any]) -> None:
    legal = list(inspect.signature(_planners[method]).parameters)[2:]
    for name in settings:
        if name not in legal:
            raise unknown(f"setting of {method}", name, legal)


def within_budget(analysis: Analysis, stack: str, choice: Choice, budget: float) -> tuple[int, ...]:
    """The first blocks of the order that together stay within `budget` of the stack's FLOPs."""
    flops = analysis.tensors[f"{stack}/block_flops"]
    left = budget * float(flops.sum()) * (1 + 1e-9)  # 0.25 of 24 equal blocks is 6, whatever rounding says
    numbers = []
    for block in choice.order:
        left -= float(flops[block])
        if left < 0:
            break
        numbers.append(block)
    return tuple(numbers)
