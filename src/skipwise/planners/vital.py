"""Train the blocks through which the subject's words reach the picture; all others can be left out of training.

Source: DiT-BlockSkip (arXiv 2603.20755): blocks are selected by masking the attention to the subject's text tokens, and
what turns out vital is mostly in the middle; early and late blocks are left out. The text we have does not say how
blocks are chosen from what is measured. Ours are therefore the score (`skipwise.analysis.vitality`), its price per
byte, and the reading of the paper's rule as one consecutive window; "middle" and "last" are plain rules to hold these
against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from skipwise.analysis.vitality import Block, BlockScores, Sample, in_order, score_vital
from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError, unknown
from skipwise.masking import Tokens
from skipwise.plan import Plan, Provenance
from skipwise.versions import versions

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


@dataclass(frozen=True)
class Budget:
    """How much may be trained: the price of every block that is considered, and what all together may cost."""

    prices: tuple[int, ...]
    limit: float

    @classmethod
    def of(cls, budget: int | str, weights: Sequence[int]) -> "Budget":
        """From a number of blocks, each of price 1, or a size ("6GiB") or share ("40%") of their weights in bytes.

        Raises UserError for what is none of these, for more blocks than there are, and when no block fits.
        """
        text = str(budget).strip()
        unit = next((unit for unit in ("%", *UNITS) if text.endswith(unit)), "")
        try:
            amount = float(text.removesuffix(unit)) if unit else int(text)
        except ValueError:
            amount = -1
        if not 0 < amount < float("inf") or (unit == "%" and amount > 100):
            raise UserError(f"{budget!r} is no budget; give a number of blocks (12), a size (6GiB) or a share (40%).")
        if not unit:
            if amount > len(weights):
                raise UserError(f"Cannot train {text} blocks: there are {len(weights)}. Choose 1 to {len(weights)}.")
            return cls((1,) * len(weights), amount)
        limit = amount / 100 * sum(weights) if unit == "%" else amount * UNITS[unit]
        if limit < min(weights):
            raise UserError(
                f"No block fits in {budget}: the smallest weighs {min(weights) / 2**20:.4g} MiB; give more."
            )
        return cls(tuple(weights), limit)

    def holds(self, places: Sequence[int]) -> bool:
        """Whether these blocks together are not too many; 40% of ten equal blocks are four, whatever rounding says."""
        return sum(self.prices[place] for place in places) <= self.limit * (1 + 1e-9)


def vital_plan(
    model: nn.Module,
    samples: Sequence[Sample] = (),
    tokens: Tokens = (),
    *,
    budget: int | str,
    rule: str = "vital",
    subject: Sequence[Tensor] | None = None,
    stacks: Sequence[str] | None = None,
    example: Sample | None = None,
    **settings: Any,
) -> Plan:
    """A plan that trains the blocks that `rule` chooses under a budget; `score_vital`, then `choose_blocks`.

    The rules that need no scores ("middle", "last") leave samples and tokens aside and do not run the model. settings:
    of `score_vital`.
    """
    _considered(model, budget, rule, stacks, example)  # a mistake in these comes before the hours
    scores = None
    if rule in SCORED:
        scores = score_vital(model, samples, tokens, subject, stacks=stacks, example=example, **settings)
    return choose_blocks(model, budget, rule, scores, stacks, example)


def choose_blocks(
    model: nn.Module,
    budget: int | str,
    rule: str = "vital",
    scores: BlockScores | None = None,
    stacks: Sequence[str] | None = None,
    example: Sample | None = None,
) -> Plan:
    """A plan that trains the blocks chosen by a rule. The model is not run and may be on the meta device.

    budget: how many blocks (12), or how much their weights may weigh, as the model holds them now ("6GiB", "512MiB"),
    or which share of the weights of all blocks that are considered ("40%"). What is trained never exceeds it.
    rule: "vital", the blocks with the greatest score per byte (per block, when blocks are counted) that still fit, one
    after the other; "paper", the consecutive blocks, in order of execution and across stacks, whose scores sum to most;
    "middle", as many as fit of the consecutive blocks in the middle of that order, and "last", at its end, so that
    nothing is skipped behind the trained ones. stacks: those considered; those scored, or all, by default.
    Raises UserError for a rule that is unknown or lacks scores, and for a budget in which no block fits.
    """
    if rule in SCORED and scores is None:
        raise UserError(f"Rule {rule} goes by scores; give those of score_vital, or choose middle or last.")
    stacks = stacks or (list(scores.score) if scores else None)
    order, allowed = _considered(model, budget, rule, stacks, example)
    values = [scores.score[stack][number] for stack, number in order] if scores else [0.0] * len(order)
    chosen = [order[place] for place in RULES[rule](allowed, values)]
    if not chosen:
        raise UserError(f"Rule {rule} finds no block in its place that fits in {budget}; give more.")
    train = {stack: tuple(sorted(n for s, n in chosen if s == stack)) for stack in dict(order)}
    made_by = Provenance(
        method=f"vital/{rule}",
        settings={"budget": budget, "rule": rule, **(scores.settings if scores else {})},
        calibration=dict(scores.calibration) if scores else {},
        scores=_record(scores) if scores else {},
        versions=versions(),
    )
    shape = find_contract(model, example).shape
    return Plan(model=shape, train={stack: numbers for stack, numbers in train.items() if numbers}, made_by=made_by)


def _considered(
    model: nn.Module, budget: int | str, rule: str, stacks: Sequence[str] | None, example: Sample | None
) -> tuple[list[Block], Budget]:
    """The blocks that may be chosen, in order of execution, and the budget for them."""
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    order = in_order(find_contract(model, example), stacks)
    return order, Budget.of(budget, [_weight(model, block) for block in order])


def _weight(model: nn.Module, block: Block) -> int:
    """Bytes of a block's weights, as the model holds them."""
    stack, number = block
    return sum(p.numel() * p.element_size() for p in module_list(model, stack)[number].parameters())


def _record(scores: BlockScores) -> dict[str, Any]:
    kinds = {"score": scores.score, "inside": scores.inside, "outside": scores.outside}
    return {stack: {kind: list(of[stack]) for kind, of in kinds.items() if of} for stack in scores.score}


def _vital(budget: Budget, scores: Sequence[float]) -> list[int]:
    taken: list[int] = []
    for place in sorted(range(len(scores)), key=lambda place: (-scores[place] / budget.prices[place], place)):
        if budget.holds([*taken, place]):
            taken.append(place)
    return taken


def _paper(budget: Budget, scores: Sequence[float]) -> list[int]:
    number = len(scores)
    windows = [range(start, stop) for start in range(number) for stop in range(start + 1, number + 1)]
    held = [window for window in windows if budget.holds(window)]
    return list(max(held, key=lambda window: sum(scores[place] for place in window), default=()))


def _middle(budget: Budget, scores: Sequence[float]) -> list[int]:
    number = len(scores)
    middles = [range((number - k) // 2, (number - k) // 2 + k) for k in range(number, 0, -1)]
    return list(next((window for window in middles if budget.holds(window)), ()))


def _last(budget: Budget, scores: Sequence[float]) -> list[int]:
    number = len(scores)
    return list(next((range(start, number) for start in range(number) if budget.holds(range(start, number))), ()))


# name -> (budget, scores of the blocks in order of execution) -> places in that order
RULES: Mapping[str, Callable[[Budget, Sequence[float]], list[int]]] = {
    "vital": _vital,
    "paper": _paper,
    "middle": _middle,
    "last": _last,
}
SCORED = ("vital", "paper")
