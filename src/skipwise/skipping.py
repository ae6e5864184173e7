"""`with skip(model, plan):` the only code that changes a model. It puts back everything, also on an exception.

A skipped block is removed from its list, with its entries in the config's per-layer lists and its place in the KV
cache, so that the model is the one with those blocks deleted and pays nothing for them. Where the model minds a block's
number (`Stack.in_place`), the block's place is kept by a module that returns its streams.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from skipwise.blocks import Contract, Stack, find_contract, layer_configs, layer_list_names, module_list
from skipwise.errors import UserError
from skipwise.plan import Plan

Undo = Callable[[], None]
Skipped = dict[str, frozenset[int]]  # stack name -> block numbers


class PassThrough(nn.Module):
    """Stands where a block stood and returns its streams as they came in. Has no parameters and no hook.

    Whoever asks it for a part of the block (DiT takes the timestep embedding from block 0) gets that part.
    """

    def __init__(self, block: nn.Module, stack: Stack):
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: its parameters are not this one's
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.places = [(stream.argument, names.index(stream.argument)) for stream in stack.streams]
        self.outputs = [stream.output for stream in stack.streams]
        self.returns = stack.returns

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The streams, in the places in which the block returns them; other places hold None."""
        streams = [kwargs[name] if name in kwargs else args[place] for name, place in self.places]
        if self.returns is None:
            return streams[0]
        by_place = dict(zip(self.outputs, streams, strict=True))
        return tuple(by_place.get(place) for place in range(self.returns))


class Skipping:
    """A model under a plan. `at(progress)` moves it to another phase; outside of phases nothing needs to be called."""

    def __init__(self, model: nn.Module, contract: Contract, plan: Plan, outer: Skipped):
        self.plan = plan
        self._model, self._contract, self._outer = model, contract, outer
        self._undo: Undo | None = None
        self.skipped: Skipped = {}

    def at(self, progress: float) -> None:
        """Skip what the plan skips at `progress` through the trajectory (0 = all noise, 1 = done)."""
        phase = self.plan.phase_at(progress)
        wanted = merge(self._outer, phase.skip)
        if self._undo is None or wanted != self.skipped:
            self._restore()
            self._undo = apply(self._model, self._contract, wanted)
            self.skipped = wanted

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _resume(self) -> None:
        self._undo = apply(self._model, self._contract, self.skipped)


_active: WeakKeyDictionary[nn.Module, list[Skipping]] = WeakKeyDictionary()


@contextmanager
def skip(model: nn.Module, plan: Plan, example: Mapping[str, Any] | None = None) -> Iterator[Skipping]:
    """Run the model under a plan inside the `with`; the model is what it was afterwards, also on an exception.

    Block numbers always mean the whole model's. Nested plans add up: a block is skipped when any of them skips it.
    example: keyword arguments of one forward, for a model that `skipwise.examples` has no inputs for.
    Raises UserError when the plan was made for another model.
    """
    contract = find_contract(model, example)
    plan.check_model(contract.shape)
    named = next((phase.model for phase in plan.phases if phase.model), None)
    if named:
        raise UserError(
            f"The plan hands steps to another model, {named!r}, which `skip` cannot run; use a static plan."
        )
    stack = _active.setdefault(model, [])
    outer = stack[-1] if stack else None
    skipping = Skipping(model, contract, plan, outer.skipped if outer else {})
    if outer:
        outer._restore()
    stack.append(skipping)
    try:
        skipping.at(0.0)
        yield skipping
    finally:
        stack.pop()
        skipping._restore()
        if outer:
            outer._resume()


def skipped_now(model: nn.Module) -> Skipped:
    """The blocks that the plans in force skip at this moment."""
    stack = _active.get(model, [])
    return stack[-1].skipped if stack else {}


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The model without the plans that are in force around this; they are back afterwards."""
    stack = _active.get(model, [])
    if stack:
        stack[-1]._restore()
    try:
        yield
    finally:
        if stack:
            stack[-1]._resume()


def merge(outer: Skipped, inner: Mapping[str, Iterable[int]]) -> Skipped:
    """The union of two skip sets, stack by stack."""
    names = [*outer, *(name for name in inner if name not in outer)]
    return {name: frozenset(outer.get(name, ())) | frozenset(inner.get(name, ())) for name in names}


def apply(model: nn.Module, contract: Contract, skipped: Skipped) -> Undo:
    """Take the skipped blocks out of the model and return the function that puts everything back."""
    undo: list[Undo] = []

    def put_back() -> None:
        while undo:
            undo.pop()()

    try:
        for name, numbers in skipped.items():
            if numbers:
                edit = _stand_in if contract.stacks[name].in_place else _remove
                edit(model, contract.stacks[name], numbers, undo)
    except BaseException:
        put_back()
        raise
    return put_back


def _set(owner: Any, name: str, value: Any, undo: list[Undo]) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, before))


def _lists(model: nn.Module, stack: Stack) -> Iterator[tuple[str, nn.Module, str, nn.ModuleList]]:
    """(path, owner, attribute, list) of a stack and of those coupled with it."""
    for path in (stack.name, *stack.coupled):
        owner, _, attribute = path.rpartition(".")
        yield path, model.get_submodule(owner), attribute, module_list(model, path)


def _stand_in(model: nn.Module, stack: Stack, numbers: frozenset[int], undo: list[Undo]) -> None:
    for _, owner, attribute, blocks in _lists(model, stack):
        replaced = [PassThrough(block, stack) if i in numbers else block for i, block in enumerate(blocks)]
        _set(owner, attribute, nn.ModuleList(replaced), undo)


def _remove(model: nn.Module, stack: Stack, numbers: frozenset[int], undo: list[Undo]) -> None:
    kept = [i for i in range(stack.length) if i not in numbers]
    configs: dict[int, Any] = {}
    for path, owner, attribute, blocks in _lists(model, stack):
        configs |= {id(config): config for config in layer_configs(model, path)}
        for new, old in enumerate(kept):
            _renumber(blocks[old], old, new, undo)
        _set(owner, attribute, nn.ModuleList(blocks[i] for i in kept), undo)
    for config in configs.values():
        _shorten(config, stack.length, kept, undo)


def _renumber(block: nn.Module, old: int, new: int, undo: list[Undo]) -> None:
    """Give the block its new place in the KV cache: caches count layers without gaps, beginning at 0."""
    for module in block.modules():
        if old != new and getattr(module, "layer_idx", None) == old:
            _set(module, "layer_idx", new, undo)


def _shorten(config: Any, length: int, kept: list[int], undo: list[Undo]) -> None:
    """Leave only the kept blocks' entries in the config's per-layer lists, from which caches and masks are made."""
    for key in layer_list_names(config, length):
        values = getattr(config, key)
        _set(config, key, type(values)(values[i] for i in kept), undo)
    spec = getattr(config, "_heterogeneity_spec", None)  # transformers' overrides by layer number (DiffusionGemma)
    if spec is not None:
        overrides = {
            new: spec.per_layer_overrides[old] for new, old in enumerate(kept) if old in spec.per_layer_overrides
        }
        _set(config, "_heterogeneity_spec", replace(spec, per_layer_overrides=overrides), undo)
    _set(config, "num_hidden_layers", len(kept), undo)
