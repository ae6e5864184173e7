"""Skip, one after the other, the block whose removal moves the model's predictions least.

Ours, in the spirit of greedy layer pruning; training-free. What "least" means is the KL divergence from the whole
model's distribution of the next (or masked) token to that of the model without the block and without those given up
before, on calibration data of any kind. A block is tested by running only the blocks behind it, on the state in front
of it, which all tests of a round share: half of the block evaluations that testing each on its own would take.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from skipwise.analysis.record import Analysis
from skipwise.analysis.states import StateReader
from skipwise.blocks import Contract, find_contract
from skipwise.calibration import Batch, Calibration, divergence
from skipwise.errors import UserError
from skipwise.planners.base import Allowance, Choice, planner
from skipwise.skipping import Cut, cutting
from skipwise.stand_ins import Stored


@planner("greedy")
def greedily(
    analysis: Analysis,
    stack: str,
    allowance: Allowance,
    calibration: Calibration,
    forbid_neighbours: bool = False,
) -> Choice:
    """Least harmful block first. Scores: their order, and the mean KL in nats a token after each."""
    search = _Search(calibration, stack, forbid_neighbours)
    blocks = allowance.take(search.order())
    return Choice(blocks, {"order": [float(block) for block in blocks], "kl": search.costs[: len(blocks)]})


class _Search:
    def __init__(self, calibration: Calibration, stack: str, forbid_neighbours: bool):
        self.model, self.stack, self.forbid_neighbours = calibration.model, stack, forbid_neighbours
        self.contract: Contract = find_contract(self.model)
        if not self.contract.stacks[stack].takes_stand_ins:
            raise UserError(f"greedy cannot test the blocks of {stack} one by one; use similarity or window.")
        self.length = self.contract.stacks[stack].length
        self.batches = list(calibration.batches())
        with torch.no_grad():
            self.targets = [batch.predictions(self.model) for batch in self.batches]
        self.costs: list[float] = []
        self.evaluated = 0  # blocks run, to be held beside the naive count

    def order(self) -> Iterator[int]:
        """Blocks in the order in which they are given up; a round of tests for each."""
        gone: set[int] = set()
        while True:
            near = {block + side for block in gone for side in (-1, 1)} if self.forbid_neighbours else set()
            candidates = [block for block in range(self.length) if block not in gone | near]
            if not candidates:
                return
            costs = self._round(gone, candidates)
            best = min(candidates, key=lambda block: (costs[block], block))
            gone.add(best)
            self.costs.append(costs[best])
            yield best

    @torch.no_grad()
    def _round(self, gone: set[int], candidates: list[int]) -> dict[int, float]:
        """Candidate -> mean KL when it is given up as well."""
        sums = dict.fromkeys(candidates, 0.0)
        tokens = 0
        for batch, target in zip(self.batches, self.targets, strict=True):
            states = self._states(batch, gone)
            for block in candidates:
                sums[block] += float(divergence(target, self._resume(batch, gone, block, states[block])).sum())
            tokens += len(target)
        return {block: total / tokens for block, total in sums.items()}

    def _states(self, batch: Batch, gone: set[int]) -> dict[int, Tensor]:
        """Block -> the state (batch, length, width) in front of it, without those that are gone."""
        kept = [block for block in range(self.length) if block not in gone]
        with cutting(self.model, self.contract, Cut({self.stack: frozenset(gone)})):
            reader = StateReader(self.model, self.contract.stacks[self.stack])
            with reader.reading():
                self.model(input_ids=batch.inputs)
                boundaries = reader.take()
        self.evaluated += len(kept)
        return dict(zip(kept, boundaries, strict=False))

    def _resume(self, batch: Batch, gone: set[int], block: int, state: Tensor) -> Tensor:
        """Predictions without `block` and those gone, from the state in front of it on."""
        skipped = gone | set(range(block + 1))
        cut = Cut({self.stack: frozenset(skipped)}, {self.stack: {block: Stored(state)}})
        self.evaluated += self.length - len(skipped)
        with cutting(self.model, self.contract, cut):
            return batch.predictions(self.model)
