"""The control: skip blocks at random. A method that does not beat this has found nothing."""

import random

from skipwise.analysis.record import Analysis
from skipwise.planners.base import Allowance, Choice, planner


@planner("random")
def at_random(analysis: Analysis, stack: str, allowance: Allowance, seed: int = 0) -> Choice:
    """A uniformly random order of the blocks, the same for the same seed."""
    order = list(range(analysis.model.stacks[stack]))
    random.Random(seed).shuffle(order)
    return Choice(allowance.take(order))
