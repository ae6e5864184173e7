"""Skip, one after the other, the block whose removal moves the model's predictions least.

Ours, in the spirit of greedy layer pruning; training-free. What "least" means is the KL divergence from the whole
model's distribution of the next (or masked) token to that of the model without the block and without those given up
before, on calibration data of any kind. A block is tested by running only the blocks behind it, on the state in front
of it, which all tests of a round share: half of the block evaluations that testing each on its own would take.
"""

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.record import Analysis
from skipwise.blocks import Contract, bind, find_contract, module_list
from skipwise.calibration import Batch, Calibration, Harm, by_divergence
from skipwise.cuts import Cut, cutting
from skipwise.errors import UserError
from skipwise.finite import not_finite
from skipwise.planners.base import Allowance, Choice, planner
from skipwise.stand_ins import Stored


class _EnoughError(Exception):
    """Ends a forward whose states are known as far as they are needed."""


@planner("greedy")
def greedily(
    analysis: Analysis,
    stack: str,
    allowance: Allowance,
    calibration: Calibration,
    forbid_neighbours: bool = False,
) -> Choice:
    """Least harmful block first. Scores: their order, and the mean KL in nats a token after each."""
    search = Search(calibration, stack, forbid_neighbours)
    blocks = allowance.take(search.order())
    return Choice(blocks, {"order": [float(block) for block in blocks], "kl": search.costs[: len(blocks)]})


class Search:
    """Blocks in the order in which they are given up, on one part of the trajectory.

    begin, end: which part. harm: what skipping does to the predictions; divergence by default. left: what a skipped
    block leaves behind, for each block; nothing by default. at_once: test so many blocks, the most promising first, and
    go on only while one that is left did less harm in an earlier round than the best of this one: skipping more seldom
    does less harm (lazy greedy, Minoux 1978). All of them by default.
    """

    def __init__(
        self,
        calibration: Calibration,
        stack: str,
        forbid_neighbours: bool = False,
        begin: float = 0.0,
        end: float = 1.0,
        harm: Harm = by_divergence,
        left: Mapping[int, nn.Module] | None = None,
        at_once: int | None = None,
    ):
        self.model, self.stack, self.forbid_neighbours = calibration.model, stack, forbid_neighbours
        self.contract: Contract = find_contract(self.model)
        if not self.contract.stacks[stack].takes_stand_ins:
            raise UserError(f"greedy cannot test the blocks of {stack} one by one; use similarity or window.")
        self.length = self.contract.stacks[stack].length
        self.harm, self.left, self.at_once = harm, left or {}, at_once or self.length
        self.known = dict.fromkeys(range(self.length), 0.0)  # block -> harm when it was tested last
        self.batches = list(calibration.batches(begin, end))
        with torch.no_grad():
            self.targets = [batch.predictions(self.model) for batch in self.batches]
        for batch, target in zip(self.batches, self.targets, strict=True):
            if target.isnan().any():
                raise not_finite(self.model, partial(self.model, input_ids=batch.inputs))
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
            best = min(costs, key=lambda block: (costs[block], block))
            gone.add(best)
            self.costs.append(costs[best])
            yield best

    def first(self, count: int) -> Iterator[int]:
        """The first `count` blocks of the order; what lies behind them is not tested."""
        return islice(self.order(), count)

    def _round(self, gone: set[int], candidates: list[int]) -> dict[int, float]:
        queue, tested = sorted(candidates, key=lambda block: (self.known[block], block)), dict[int, float]()
        while queue and (not tested or self.known[queue[0]] < min(tested.values())):
            tested |= self.test(gone, queue[: self.at_once])
            queue = queue[self.at_once :]
        self.known |= tested
        return tested

    @torch.no_grad()
    def test(self, gone: Collection[int], candidates: Sequence[int]) -> dict[int, float]:
        """Candidate -> mean harm when it is given up as well."""
        gone = set(gone)
        sums, count = dict.fromkeys(candidates, 0.0), 0
        for batch, target in zip(self.batches, self.targets, strict=True):
            fronts = self._fronts(batch, gone, max(candidates))
            for block in candidates:
                harms = self.harm(batch, target, self._resume(batch, gone, block, fronts[block]))
                sums[block] += float(harms.sum())
            count += len(harms)
        # without some block a model may overflow: that block is the last to be given up
        return {block: math.inf if math.isnan(total) else total / count for block, total in sums.items()}

    def harm_without(self, gone: Collection[int]) -> float:
        """Mean harm when these blocks are given up."""
        with cutting(self.model, self.contract, self._cut(gone)):
            return self.harm_of(self.model)

    @torch.no_grad()
    def harm_of(self, other: nn.Module) -> float:
        """Mean harm when another model takes over, which speaks the same tokens."""
        pairs = zip(self.batches, self.targets, strict=True)
        harms = torch.cat([self.harm(batch, target, batch.predictions(other)) for batch, target in pairs])
        return float(harms.mean())

    def _fronts(self, batch: Batch, gone: set[int], last: int) -> dict[int, Tensor]:
        """Block -> the state (batch, length, width) in front of it, without those that are gone, up to block `last`."""
        (stream,) = self.contract.stacks[self.stack].streams
        fronts: dict[int, Tensor] = {}

        def note(number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            signature = inspect.signature(type(module).forward)
            fronts[number] = bind(signature, module, args, kwargs)[stream.argument]
            if number == last:
                raise _EnoughError

        blocks = module_list(self.model, self.stack)
        handles = [
            block.register_forward_pre_hook(partial(note, number), with_kwargs=True)
            for number, block in enumerate(blocks)
        ]
        try:
            with cutting(self.model, self.contract, self._cut(gone)), suppress(_EnoughError):
                self.model(input_ids=batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.evaluated += len(fronts) - 1  # the last one did not run
        return fronts

    def _cut(self, gone: Collection[int]) -> Cut:
        left = {block: self.left[block] for block in gone if block in self.left}
        return Cut({self.stack: frozenset(gone)}, {self.stack: left})

    def _resume(self, batch: Batch, gone: set[int], block: int, front: Tensor) -> Tensor:
        """Predictions without `block` and those gone, from the state in front of it on."""
        behind = self.left[block](front) if block in self.left else front
        later = self._cut([number for number in gone if number > block])
        skipped = gone | set(range(block + 1))
        stand_ins = {block: Stored(behind), **later.stand_ins[self.stack]}
        self.evaluated += self.length - len(skipped)
        with cutting(self.model, self.contract, Cut({self.stack: frozenset(skipped)}, {self.stack: stand_ins})):
            return batch.predictions(self.model)
