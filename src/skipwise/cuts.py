"""What is cut out of a model, done and undone: the only code that changes one.

The model's forward does not see a skipped block in its list any more, nor its entries in the config's per-layer lists
and its place in the KV cache, so that the model is the one with those blocks deleted and pays nothing for them. Where
the model minds a block's number (`Stack.in_place`), the block's place is kept by a module that returns its streams.
Stand-ins, where a plan has them, ride on the kept block before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from skipwise.blocks import Contract, Stack, layer_configs, module_list
from skipwise.errors import UserError
from skipwise.guards import KeptPlaces, watch_calls
from skipwise.holding import claimed
from skipwise.kept import Accompanied, PassThrough, Undo, every_block, keep
from skipwise.per_layer import changed_settings, check_shared_keys, computed_lists, with_lists
from skipwise.stand_ins import Linear
from skipwise.step_caches import cache_back, cache_off, check_caches, check_places, end_cache_dit

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


@contextmanager
def cutting(model: nn.Module, contract: Contract, cut: Cut) -> Iterator[None]:
    """The model with this cut out of it, whatever plan is in force; `skip` is for plans."""
    with claimed(model):
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
    with claimed(model):
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
    with cache_back(model), _undone(undo):
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
    return lambda: _leave(model, undo)


@contextmanager
def _undone(undo: list[Undo]) -> Iterator[None]:
    """Put everything back when the `with` fails."""
    try:
        yield
    except BaseException:
        _put_back(undo)
        raise


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
