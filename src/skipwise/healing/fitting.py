"""Stand-ins fitted in closed form: what a skipped block adds to the stream, as a constant or as a map of its input.

Blocks are fitted from the first to the last, each on the stream as it comes to it through the stand-ins before, and
towards the state that the whole model has behind it, so that a stand-in also makes good what those before it missed.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipwise.analysis.states import StateReader
from skipwise.blocks import bind, find_contract, module_list
from skipwise.calibration import Batch, Calibration
from skipwise.cuts import Cut, check_stand_ins, cutting
from skipwise.errors import UserError, unknown
from skipwise.plan import Phase, Plan
from skipwise.stand_ins import Linear, Moments, StandInKind, build, key


@torch.no_grad()
def fit_stand_ins(
    plan: Plan,
    calibration: Calibration,
    kind: StandInKind = "linear",
    *,
    ridge: float = 1e-3,
    epochs: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan with a stand-in for every skipped block, fitted for each phase on that part of the trajectory.

    kind: "constant", the mean residual, or "linear", a ridge regression of it on the normed input. ridge: in units of
    the mean variance of an input. epochs: passes over the calibration data, of a diffusion model with masks drawn anew.
    on_progress(done, total) is called after every block.
    Raises UserError for a plan of another model, one without skipped blocks, and stacks whose blocks cannot leave
    anything behind.
    """
    contract = find_contract(calibration.model)
    plan.check_model(contract.shape)
    work = [(number, stack, block) for number, phase in enumerate(plan.phases) for stack, block in _blocks(phase)]
    if not work:
        raise UserError("The plan skips no block, so there is nothing to leave behind; make one with `skipwise plan`.")
    if kind not in get_args(StandInKind):
        raise unknown("kind of stand-in", kind, get_args(StandInKind))
    for _, stack, _ in work:
        check_stand_ins(contract.stacks[stack])
    tensors: dict[str, Tensor] = {}
    for done, (number, stack, block) in enumerate(work):
        fitter = _Fitter(calibration, plan, number, stack, tensors)
        moments = fitter.moments(block, epochs)
        if kind == "linear":
            weight, bias = moments.linear(ridge)
            tensors[key(number, stack, block, "weight")] = weight
        else:
            bias = moments.constant()
        tensors[key(number, stack, block, "bias")] = bias
        if on_progress:
            on_progress(done + 1, len(work))
    return plan.with_stand_ins(kind, tensors)


@torch.no_grad()
def fit_alone(
    calibration: Calibration, stack: str, begin: float = 0.0, end: float = 1.0, *, ridge: float = 1e-3, epochs: int = 1
) -> dict[int, nn.Module]:
    """Block -> the linear map that would stand in for it if it alone were skipped at progress `begin` to `end`.

    To choose blocks by, before `fit_stand_ins` fits those that are chosen one upon the other; a single pass for all
    blocks. Empty where no forward falls. Raises UserError for stacks whose blocks cannot leave anything behind.
    """
    contract = find_contract(calibration.model)
    check_stand_ins(contract.stacks[stack])
    reader = StateReader(calibration.model, contract.stacks[stack])
    moments: dict[int, Moments] = {}
    with reader.reading():
        for epoch in range(epochs):
            for batch in calibration.batches(begin, end, epoch):
                calibration.model(input_ids=batch.inputs)
                for block, (before, behind) in enumerate(pairwise(reader.take())):
                    known = moments.setdefault(block, Moments(before.shape[-1]))
                    known.add(before.flatten(0, 1), (behind - before).flatten(0, 1))
    like = next(p for p in calibration.model.parameters() if p.is_floating_point())
    return {block: Linear(*(tensor.to(like) for tensor in known.linear(ridge))) for block, known in moments.items()}


def _blocks(phase: Phase) -> list[tuple[str, int]]:
    return [(stack, block) for stack, numbers in phase.skip.items() for block in numbers]


class _Reached(Exception):  # noqa: N818 (no error)
    """Ends a forward at the block that it was run for."""


class _Fitter:
    """The whole model and the one with stand-ins so far, on the same data."""

    def __init__(self, calibration: Calibration, plan: Plan, number: int, stack: str, tensors: dict[str, Tensor]):
        self.calibration, self.model = calibration, calibration.model
        self.contract = find_contract(self.model)
        self.stack = self.contract.stacks[stack]
        self.blocks = list(module_list(self.model, stack))
        self.begin, self.end = plan.phases[number - 1].until if number else 0.0, plan.phases[number].until
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        self.known = {
            block: build(tensors, number, stack, block, like)
            for block in plan.phases[number].skip[stack]
            if key(number, stack, block, "bias") in tensors
        }

    def moments(self, block: int, epochs: int) -> Moments:
        """Sums over all tokens of the stream in front of `block`, and of what is missing behind it."""
        moments: Moments | None = None
        for epoch in range(epochs):
            for batch in self.calibration.batches(self.begin, self.end, epoch):
                found, wanted = self._run(batch, block, {})
                if self.known:
                    found, _ = self._run(batch, block, self.known)
                moments = moments or Moments(found.shape[-1])
                moments.add(found.flatten(0, 1), (wanted - found).flatten(0, 1))
        assert moments is not None
        return moments

    def _run(self, batch: Batch, block: int, known: dict[int, nn.Module]) -> tuple[Tensor, Tensor]:
        """The stream in front of and behind `block`, which runs, with stand-ins for those that are known."""
        (stream,), seen = self.stack.streams, []
        signature = inspect.signature(type(self.blocks[block]).forward)

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
            seen.append(bind(signature, module, args, kwargs)[stream.argument])
            seen.append(result if stream.output is None else result[stream.output])
            raise _Reached  # what comes behind is not needed

        cut = Cut({self.stack.name: frozenset(known)}, {self.stack.name: known})
        handle = self.blocks[block].register_forward_hook(note, with_kwargs=True)
        try:
            with cutting(self.model, self.contract, cut), suppress(_Reached):
                self.model(input_ids=batch.inputs)
        finally:
            handle.remove()
        return seen[0], seen[1]
