"""`with skip(model, plan):` plans in force on a model, one inside of the other. What they leave out is cut in `cuts`.

The model is what it was afterwards, also on an exception. A model that other libraries have wrapped (torch.compile,
DataParallel, peft, ...) is planned as what is inside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from skipwise.adapters import merged
from skipwise.blocks import Contract, find_contract, module_list
from skipwise.cuts import Cut, apply
from skipwise.errors import UserError
from skipwise.holding import claimed
from skipwise.kept import Undo
from skipwise.plan import Plan
from skipwise.stand_ins import build
from skipwise.step_caches import check_caches
from skipwise.wrapping import unwrap


class Skipping:
    """A model under a plan. `at(progress)` moves it to another phase; outside of phases nothing needs to be called."""

    def __init__(self, model: nn.Module, contract: Contract, plan: Plan, outer: Cut):
        self.plan = plan
        self._model, self._contract, self._outer = model, contract, outer
        self._undo: Undo | None = None
        self._is_aside = False
        self._adapter = ExitStack()
        tensors = plan.stand_in_tensors()
        self._cuts = [self._of_phase(number, tensors) for number in range(len(plan.phases))]
        self.cut = Cut()

    def at(self, progress: float) -> None:
        """Skip what the plan skips at `progress` through the trajectory (0 = all noise, 1 = done).

        Inside of `whole` that is remembered for later. Raises UserError while a plan inside of this one is in force.
        """
        wanted = self._cuts[self.plan.phase_number(progress)]
        if _active[self._model][-1] is not self:
            raise UserError("A plan inside of this one is in force on the model; leave it before the next phase.")
        if self._is_aside:
            self.cut = wanted
        elif self._undo is None or wanted != self.cut:
            check_caches(self._model, self.plan.is_static)
            self._restore()
            self._undo = apply(self._model, self._contract, wanted)
            self.cut = wanted

    def begin(self) -> None:
        """Put the plan in force."""
        self._adapter.enter_context(merged(self._model, self.plan.adapter_folder()))
        _active[self._model].append(self)
        self.at(0.0)

    def end(self) -> None:
        """Put back what the model was."""
        with self._adapter:
            self._restore()

    def _of_phase(self, number: int, tensors: Mapping[str, Tensor]) -> Cut:
        phase = self.plan.phases[number]
        skipped = {name: frozenset(numbers) for name, numbers in phase.skip.items()}
        if phase.stand_in is None:
            return self._outer | Cut(skipped)
        stand_ins = {}
        for name, numbers in skipped.items():
            like = next(p for p in module_list(self._model, name).parameters() if p.is_floating_point())
            stand_ins[name] = {block: build(tensors, number, name, block, like) for block in sorted(numbers)}
        return self._outer | Cut(skipped, stand_ins)

    @property
    def is_on(self) -> bool:
        """Whether its blocks are out now."""
        return self._undo is not None

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _put_aside(self) -> None:
        self._restore()
        self._is_aside = True

    def _resume(self) -> None:
        self._is_aside = False
        self._undo = apply(self._model, self._contract, self.cut)


_active: WeakKeyDictionary[nn.Module, list[Skipping]] = WeakKeyDictionary()  # the outermost first


@contextmanager
def skip(
    model: nn.Module,
    plan: Plan | Sequence[int] | Mapping[str, Sequence[int]],
    example: Mapping[str, Any] | None = None,
) -> Iterator[Skipping]:
    """Run the model under a plan inside the `with`; the model is what it was afterwards, also on an exception.

    plan: a Plan; or the numbers of blocks, [3, 4], of a model with one stack of blocks; or {"stack": [3, 4]}.
    Block numbers always mean the whole model's, also in arguments that name blocks by number (a ControlNet's
    residuals). Nested plans add up: a block is skipped when any of them skips it. A model is under one thread's (or
    asyncio task's) plans at a time, for all who call it; another one that enters a plan meanwhile is refused.
    A plan's stand-ins take the skipped blocks' places in the stream, its adapter is merged into the weights.
    A cache of diffusers that is on (`enable_cache`) begins anew, for the blocks that are left, and again on leaving.
    example: keyword arguments of one forward, for a model that `skipwise.examples` has no inputs for.
    Raises UserError when the plan was made for another model, and at calls that a plan does not go with.
    """
    model = unwrap(model)
    with claimed(model):
        contract = find_contract(model, example)
        plan = Plan.of(contract.shape, plan)
        plan.check_model(contract.shape)
        named = next((phase.model for phase in plan.phases if phase.model), None)
        if named:
            raise UserError(
                f"The plan hands steps to another model, {named!r}, which `skip` cannot run; `skipwise.generate` can."
            )
        with _within(model) as outer:
            skipping = Skipping(model, contract, plan, outer.cut if outer else Cut())
            try:
                skipping.begin()
                yield skipping
            except BaseException:
                _end(skipping)
                raise
            if not _end(skipping):
                raise UserError(
                    "Plans of one model were left in another order than they were entered, and all of them have ended; "
                    "leave the inner `with` first."
                )


@contextmanager
def _within(model: nn.Module) -> Iterator[Skipping | None]:
    """The plan that is in force around a new one, without its effect meanwhile: the new one brings that along."""
    stack = _active.setdefault(model, [])
    outer = stack[-1] if stack and stack[-1].is_on else None  # one that `whole` has put aside stays aside
    if outer:
        outer._put_aside()
    try:
        yield outer
    finally:
        if outer and outer in stack:
            outer._resume()


def _end(skipping: Skipping) -> bool:
    """End a plan and those that were entered after it, the last first; False if others had to, or this one had."""
    stack, ended = _active[skipping._model], []
    while skipping in stack:
        ended.append(stack.pop())
        ended[-1].end()
    return ended == [skipping]


def cut_now(model: nn.Module) -> Cut:
    """What the plans in force cut out at this moment."""
    stack = _active.get(unwrap(model), [])
    return stack[-1].cut if stack else Cut()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The model without the plans that are in force around this; they are back afterwards."""
    model = unwrap(model)
    with claimed(model):
        stack = _active.get(model, [])
        inner = stack[-1] if stack and stack[-1].is_on else None  # inside of another `whole` there is none
        if inner:
            inner._put_aside()
        try:
            yield
        finally:
            if inner and inner in stack:
                inner._resume()
