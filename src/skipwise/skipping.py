"""`with skip(model, plan):` the only code that changes a model. It puts back everything, also on an exception.

The model's forward does not see a skipped block in its list any more, nor its entries in the config's per-layer lists
and its place in the KV cache, so that the model is the one with those blocks deleted and pays nothing for them. Where
the model minds a block's number (`Stack.in_place`), the block's place is kept by a module that returns its streams.
Stand-ins, where a plan has them, ride on the kept block before them. A model that other libraries have wrapped
(torch.compile, DataParallel, peft, ...) is planned as what is inside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from skipwise.adapters import merged
from skipwise.blocks import Contract, Stack, find_contract, layer_configs, module_list
from skipwise.errors import UserError
from skipwise.guards import KeptPlaces, watch_calls
from skipwise.kept import Accompanied, PassThrough, Undo, every_block, keep
from skipwise.per_layer import changed_settings, check_shared_keys, computed_lists, with_lists
from skipwise.plan import Plan
from skipwise.stand_ins import Linear, build
from skipwise.step_caches import cache_off, check_caches, check_places, end_cache_dit
from skipwise.wrapping import unwrap

Skipped = dict[str, frozenset[int]]  # stack name -> block numbers


@dataclass(frozen=True)
class Cut:
    """What is cut out of a model: the skipped blocks of each stack, and what some of them leave behind."""

    skipped: Skipped = field(default_factory=dict)
    stand_ins: Mapping[str, Mapping[int, nn.Module]] = field(default_factory=dict)

    @property
    def linear(self) -> Skipped:
        """The skipped blocks that leave a linear map behind, which costs FLOPs."""
        return {
            name: frozenset(number for number, module in modules.items() if isinstance(module, Linear))
            for name, modules in self.stand_ins.items()
        }

    def __or__(self, inner: "Cut") -> "Cut":
        names = [*self.skipped, *(name for name in inner.skipped if name not in self.skipped)]
        skipped = {name: self.skipped.get(name, frozenset()) | inner.skipped.get(name, frozenset()) for name in names}
        # a block that is skipped already is not there for an inner plan to replace
        new = {
            name: {n: m for n, m in modules.items() if n not in self.skipped.get(name, ())}
            for name, modules in inner.stand_ins.items()
        }
        stand_ins = {name: {**new.get(name, {}), **self.stand_ins.get(name, {})} for name in {*new, *self.stand_ins}}
        return Cut(skipped, stand_ins)


class Skipping:
    """A model under a plan. `at(progress)` moves it to another phase; outside of phases nothing needs to be called."""

    def __init__(self, model: nn.Module, contract: Contract, plan: Plan, outer: Cut):
        self.plan = plan
        self._model, self._contract, self._outer = model, contract, outer
        self._undo: Undo | None = None
        tensors = plan.stand_in_tensors()
        self._cuts = [self._of_phase(number, tensors) for number in range(len(plan.phases))]
        self.cut = Cut()

    def at(self, progress: float) -> None:
        """Skip what the plan skips at `progress` through the trajectory (0 = all noise, 1 = done)."""
        wanted = self._cuts[self.plan.phase_number(progress)]
        if self._undo is None or wanted != self.cut:
            check_caches(self._model, self.plan.is_static)
            self._restore()
            self._undo = apply(self._model, self._contract, wanted)
            self.cut = wanted

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

    def _resume(self) -> None:
        self._undo = apply(self._model, self._contract, self.cut)


_active: WeakKeyDictionary[nn.Module, list[Skipping]] = WeakKeyDictionary()


@contextmanager
def skip(
    model: nn.Module,
    plan: Plan | Sequence[int] | Mapping[str, Sequence[int]],
    example: Mapping[str, Any] | None = None,
) -> Iterator[Skipping]:
    """Run the model under a plan inside the `with`; the model is what it was afterwards, also on an exception.

    plan: a Plan; or the numbers of blocks, [3, 4], of a model with one stack of blocks; or {"stack": [3, 4]}.
    Block numbers always mean the whole model's, also in arguments that name blocks by number (a ControlNet's
    residuals). Nested plans add up: a block is skipped when any of them skips it.
    A plan's stand-ins take the skipped blocks' places in the stream, its adapter is merged into the weights.
    A cache of diffusers that is on (`enable_cache`) begins anew, for the blocks that are left, and again on leaving.
    example: keyword arguments of one forward, for a model that `skipwise.examples` has no inputs for.
    Raises UserError when the plan was made for another model, and at calls that a plan does not go with.
    """
    model = unwrap(model)
    contract = find_contract(model, example)
    plan = Plan.of(contract.shape, plan)
    plan.check_model(contract.shape)
    named = next((phase.model for phase in plan.phases if phase.model), None)
    if named:
        raise UserError(
            f"The plan hands steps to another model, {named!r}, which `skip` cannot run; `skipwise.generate` can."
        )
    stack = _active.setdefault(model, [])
    outer = stack[-1] if stack and stack[-1].is_on else None  # one that `whole` has put aside stays aside
    if outer:
        outer._restore()
    try:
        with merged(model, plan.adapter_folder()):
            skipping = Skipping(model, contract, plan, outer.cut if outer else Cut())
            stack.append(skipping)
            try:
                skipping.at(0.0)
                yield skipping
            finally:
                stack.pop()
                skipping._restore()
    finally:
        if outer:
            outer._resume()


def cut_now(model: nn.Module) -> Cut:
    """What the plans in force cut out at this moment."""
    stack = _active.get(unwrap(model), [])
    return stack[-1].cut if stack else Cut()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The model without the plans that are in force around this; they are back afterwards."""
    stack = _active.get(unwrap(model), [])
    inner = stack[-1] if stack and stack[-1].is_on else None  # inside of another `whole` there is nothing to put aside
    if inner:
        inner._restore()
    try:
        yield
    finally:
        if inner:
            inner._resume()


@contextmanager
def cutting(model: nn.Module, contract: Contract, cut: Cut) -> Iterator[None]:
    """The model with this cut out of it, whatever plan is in force; `skip` is for plans."""
    undo = apply(model, contract, cut)
    try:
        yield
    finally:
        undo()


@contextmanager
def placing(model: nn.Module, modules: Mapping[str, Mapping[int, nn.Module]]) -> Iterator[None]:
    """The model with modules in the places of some blocks: stack name -> block number -> module.

    No block moves, so that the names of the others' parameters are what they were.
    """
    undo: list[Undo] = []
    try:
        for path, by_number in modules.items():
            _put(model, path, by_number, undo)
        yield
    finally:
        _put_back(undo)


def apply(model: nn.Module, contract: Contract, cut: Cut) -> Undo:
    """Cut blocks out of the model and return the function that puts everything back."""
    undo: list[Undo] = []
    lists: dict[str, nn.ModuleList] = {}
    check_caches(model, static=True)
    try:
        with cache_off(model):
            for name, numbers in cut.skipped.items():
                if numbers:
                    lists[name] = module_list(model, name)
                    _cut(model, contract.stacks[name], numbers, cut.stand_ins.get(name, {}), undo)
        if lists:
            undo.append(_unsaveable(model))
            in_place = any(contract.stacks[name].in_place for name in lists)
            undo.append(watch_calls(model, lists, in_place))
            if in_place:
                check_places(model)
    except BaseException:
        _put_back(undo)
        raise
    return lambda: _leave(model, undo)


def _unsaveable(model: nn.Module) -> Undo:
    """Refuse `save_pretrained` meanwhile: the config is cut and the weights are whole, which go not together."""

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError(
            "A plan is in force: a saved config would not fit the saved weights; leave the `with` first, or write the "
            "smaller model with skipwise.export."
        )

    model.__dict__["save_pretrained"] = refuse
    return lambda: model.__dict__.pop("save_pretrained", None)


def _leave(model: nn.Module, undo: list[Undo]) -> None:
    try:
        with cache_off(model):
            _put_back(undo)
    finally:  # whatever other libraries say on leaving, the blocks are back
        _put_back(undo)
        end_cache_dit(model)


def _put_back(undo: list[Undo]) -> None:
    """Undo all, the last first; what goes wrong is told when all else is undone."""
    try:
        while undo:
            undo.pop()()
    finally:
        if undo:
            _put_back(undo)


def _cut(
    model: nn.Module, stack: Stack, numbers: frozenset[int], stand_ins: Mapping[int, nn.Module], undo: list[Undo]
) -> None:
    if stand_ins:
        check_stand_ins(stack)
    check_shared_keys(stack.name, every_block(module_list(model, stack.name)), numbers)
    if stack.in_place:
        _pass_through(model, stack, numbers, undo)
        return
    _remove(model, stack, numbers, stand_ins, undo)
    for _, owner, blocks in _lists(model, stack) if stack.numbered_by else ():
        undo.append(KeptPlaces(model, owner, blocks, stack, numbers, bool(stand_ins)).watch())


def check_stand_ins(stack: Stack) -> None:
    """Raise UserError when blocks of this stack cannot leave stand-ins behind."""
    if not stack.takes_stand_ins:
        raise UserError(
            f"Blocks of {stack.name} cannot leave stand-ins behind: {stack.block_class} has several streams, minds its "
            "number or shares its weights; use a plan without stand-ins."
        )


def _set(owner: Any, name: str, value: Any, undo: list[Undo]) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, before))


def _lists(model: nn.Module, stack: Stack) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """(path, owner, list) of a stack and of those coupled with it."""
    for path in (stack.name, *stack.coupled):
        yield path, model.get_submodule(path.rpartition(".")[0]), module_list(model, path)


def _pass_through(model: nn.Module, stack: Stack, numbers: frozenset[int], undo: list[Undo]) -> None:
    for _, _, blocks in _lists(model, stack):
        whole = every_block(blocks)
        undo.append(
            keep(blocks, range(stack.length), {number: PassThrough(whole[number], stack) for number in numbers})
        )


def _put(model: nn.Module, path: str, modules: Mapping[int, nn.Module], undo: list[Undo]) -> None:
    """Put modules in the places of blocks of the list at `path`; the other blocks keep their numbers."""
    owner, _, attribute = path.rpartition(".")
    blocks = module_list(model, path)
    _set(model.get_submodule(owner), attribute, nn.ModuleList(modules.get(i, b) for i, b in enumerate(blocks)), undo)


def _remove(
    model: nn.Module, stack: Stack, numbers: frozenset[int], stand_ins: Mapping[int, nn.Module], undo: list[Undo]
) -> None:
    kept = [i for i in range(stack.length) if i not in numbers]
    if not kept and stand_ins:
        kept = [0]  # a pass-through, because stand-ins need a place in the list
    configs: dict[int, Any] = {}
    for path, _, blocks in _lists(model, stack):
        configs |= {id(config): config for config in layer_configs(model, path)}
        whole = every_block(blocks)
        for new, old in enumerate(kept):
            _renumber(whole[old], old, new, undo)
        left = [PassThrough(whole[i], stack) if i in numbers else whole[i] for i in kept]
        if stand_ins:
            left = _accompany(left, stack, kept, stand_ins)
        undo.append(
            keep(blocks, kept, {i: block for i, block in zip(kept, left, strict=True) if block is not whole[i]})
        )
    for config in configs.values():
        _shorten(config, stack.length, kept, undo)


def _accompany(
    blocks: Sequence[nn.Module], stack: Stack, kept: Sequence[int], stand_ins: Mapping[int, nn.Module]
) -> list[nn.Module]:
    """Give stand-ins, in their order, to the kept block before them; those before the first kept block, to it."""
    borders = [*kept[1:], stack.length]
    accompanied = []
    for block, number, border in zip(blocks, kept, borders, strict=True):
        before = [stand_ins[i] for i in range(number) if i in stand_ins] if number == kept[0] else []
        behind = [stand_ins[i] for i in range(number, border) if i in stand_ins]
        accompanied.append(Accompanied(block, stack, before, behind) if before or behind else block)
    return accompanied


def _renumber(block: nn.Module, old: int, new: int, undo: list[Undo]) -> None:
    """Give the block its new place in the KV cache: caches count layers without gaps, beginning at 0."""
    for module in block.modules():
        if old != new and getattr(module, "layer_idx", None) == old:
            _set(module, "layer_idx", new, undo)
        if old != new and getattr(module, "layer_id", None) == old:  # GPT-Neo's name
            _set(module, "layer_id", new, undo)


def _shorten(config: Any, length: int, kept: list[int], undo: list[Undo]) -> None:
    """Leave only what is said of the kept blocks in the config, from which caches and masks are made."""
    computed = computed_lists(config, length)
    for name, value in changed_settings(config, length, kept).items():
        _set(config, name, value, undo)
    lists = {name: [values[old] for old in kept] for name, values in computed.items()}
    wrong = {name: values for name, values in lists.items() if getattr(config, name) != values}
    if wrong:  # what is left of a period need not be one
        _set(config, "__class__", with_lists(type(config), wrong), undo)
