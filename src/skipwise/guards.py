"""What a call may bring along while blocks are out of the model, and what is done about it, or refused, at the call.

Block numbers that come from outside of the model always mean the whole model's: for a call that brings things by block
number (a ControlNet's residuals, the layers of a guidance), skipped blocks keep their places.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from skipwise.blocks import Stack
from skipwise.errors import UserError
from skipwise.kept import KEPT_STATE, PassThrough, Undo, every_block, keep
from skipwise.step_caches import check_places, is_cached
from skipwise.wrapping import class_of

Around = Callable[[tuple, Mapping[str, Any]], Undo | None]  # a call's arguments -> what to do after it
Check = Callable[[Mapping[str, Any]], None]  # takes a call's keyword arguments, raises UserError
LAYER_SKIP = "diffusers.hooks.layer_skip"
MARK = "_skipwise_filled_by"  # what a cache remembers


@dataclass(frozen=True)
class KeptPlaces:
    """A stack whose skipped blocks keep their places in the calls that bring an argument of `stack.numbered_by`.

    What a forward has returned itself under the plan is of the blocks that ran, and goes with them again.
    """

    model: nn.Module
    owner: nn.Module
    blocks: nn.ModuleList
    stack: Stack
    skipped: frozenset[int]
    has_stand_ins: bool
    made: "Made" = field(default_factory=lambda: Made())  # what calls returned for later ones

    def watch(self) -> Undo:
        """Look at every call of the owner. Returns what ends it."""
        names = list(inspect.signature(class_of(self.owner).forward).parameters)[1:]
        places = {name: names.index(name) for name in self.stack.numbered_by if name in names}

        def around(args: tuple, kwargs: Mapping[str, Any]) -> Undo | None:
            for name, place in places.items():
                given = args[place] if place < len(args) else kwargs.get(name)
                if given is not None and name in self.stack.carried:
                    self._check_made(name, given)
                elif given is not None:
                    return self._keep(name)
            return None

        return watch(self.owner, around, self._remember if self.stack.carried else None)

    def _check_made(self, argument: str, given: Any) -> None:
        if not self.made.has(given):
            raise UserError(
                f"{argument} was not made by a call under this plan; begin without it inside of the plan, and hand on "
                "what comes back."
            )

    def _remember(self, result: Any) -> None:
        values = result if isinstance(result, tuple) else [getattr(result, name, None) for name in self.stack.carried]
        for value in values:
            self.made.add(value)

    def _keep(self, argument: str) -> Undo:
        """Every block in its own place, the skipped ones passing on what they get."""
        reasons = {
            "the model counts its blocks in its config too, which a plan shortens": self.stack.counts_config,
            "the plan's stand-ins ride on other blocks": self.has_stand_ins,
            "the cache that is on hangs on the blocks that are left": is_cached(self.model),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(
                    f"{argument} names blocks by number, and {reason}; call without it, or leave the plan first."
                )
        whole = every_block(self.blocks)
        instead = {number: PassThrough(whole[number], self.stack, in_cache=False) for number in self.skipped}
        return keep(self.blocks, range(len(whole)), instead)


class Made:
    """States that calls have returned, told again by the memory of their tensors, which slices share, or by what they
    are. None of them is kept alive.
    """

    def __init__(self) -> None:
        self._memory: set[StorageWeakRef] = set()
        self._things: dict[int, ReferenceType[Any]] = {}

    def add(self, state: Any) -> None:
        """Remember a state, and forget those that are gone."""
        self._memory = {memory for memory in self._memory if not memory.expired()}
        self._things = {number: thing for number, thing in self._things.items() if thing() is not None}
        for part in state if isinstance(state, tuple | list) else [state]:
            if isinstance(part, Tensor):
                self._memory.add(StorageWeakRef(part.untyped_storage()))
            elif hasattr(part, "__weakref__"):
                self._things[id(part)] = ref(part)

    def has(self, state: Any) -> bool:
        """Whether all of a state was remembered."""
        return all(map(self._has, state if isinstance(state, tuple | list) else [state]))

    def _has(self, part: Any) -> bool:
        if isinstance(part, Tensor):
            return StorageWeakRef(part.untyped_storage()) in self._memory
        thing = self._things.get(id(part))
        return thing is not None and thing() is part


def watch_calls(model: nn.Module, kept: Mapping[str, nn.ModuleList], in_place: bool) -> Undo:
    """Check every call of the model for what would silently go wrong with blocks out of it. Returns what ends it.

    kept: stack name -> its list, blocks of which are out; in_place: whether some of those keep their places.
    """
    checks = [check for make in (_gradients, _layer_skips) if (check := make(model, kept)) is not None]
    seen = None
    if hasattr(model, "generate") and not getattr(model, "is_masked_diffusion", False):  # our own samplers make theirs
        stores = Stores.of(kept)
        checks.append(stores.check)
        seen = stores.mark_result
    if in_place and hasattr(model, "is_cache_enabled"):
        checks.append(lambda kwargs: check_places(model))
    if not checks:
        return lambda: None

    def around(args: tuple, kwargs: Mapping[str, Any]) -> None:
        for check in checks:
            check(kwargs)

    return watch(model, around, seen)


def watch(module: nn.Module, around: Around, seen: Callable[[Any], None] | None = None) -> Undo:
    """Ask `around` before every call of the module, do what it returns after the call, and show what the call returned
    to `seen`. Returns what ends it.

    The module's class is replaced by one of the same name, because a hook would not hear of a call that it refuses
    before other hooks do, and would stand in the way of who asks whether there are any.
    """
    cls, watching = type(module), [True]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        after = around(args, kwargs) if watching else None
        try:
            result = super(watched, self).__call__(*args, **kwargs)
        finally:
            if after is not None:
                after()
        if seen is not None and watching:
            seen(result)
        return result

    watched: Any = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "mixed_in": KeptPlaces})
    module.__class__ = watched

    def undo() -> None:
        watching.clear()
        if type(module) is watched:  # something else, such as fully_shard, may have changed it since
            module.__class__ = cls

    return undo


def _gradients(model: nn.Module, kept: Mapping[str, nn.ModuleList]) -> Check | None:
    """DistributedDataParallel waits for the gradients of all blocks: at the first step it silently reduces none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None

    def check(kwargs: Mapping[str, Any]) -> None:
        wrapper: Any = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None or not torch.is_grad_enabled() or not wrapper.require_backward_grad_sync:
            return
        if not (wrapper.find_unused_parameters or wrapper.static_graph):
            raise UserError(
                "DistributedDataParallel waits for the gradients of the skipped blocks and would reduce none; wrap the "
                "model with find_unused_parameters=True, or call it under torch.no_grad()."
            )

    return check


def _layer_skips(model: nn.Module, kept: Mapping[str, nn.ModuleList]) -> Check | None:
    """diffusers' layer skips (`apply_layer_skip`, guiders) count the blocks that they find in the list."""
    if not hasattr(model, "config_name"):  # not a diffusers model
        return None
    modules = [part for blocks in kept.values() for block in every_block(blocks) for part in block.modules()]
    known = {id(hook) for hook in _layer_skip_hooks(modules)}

    def check(kwargs: Mapping[str, Any]) -> None:
        if any(id(hook) not in known for hook in _layer_skip_hooks(modules)):
            raise UserError(
                "Layers were skipped by number with diffusers' hooks while a plan was in force, which counts the "
                "blocks that are left; apply them before the plan, or name all blocks in the plan."
            )

    return check


def _layer_skip_hooks(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        registry: Any = module.__dict__.get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            if type(hook).__module__ == LAYER_SKIP:
                yield hook


@dataclass(frozen=True)
class Stores:
    """KV caches of a model under a plan: each is marked with the blocks that fill it, and is refused by others, which
    would take the keys in its places for their own.

    ran: what fills a cache now, in words: the numbers of the blocks that run, and of those that have something instead.
    """

    ran: str

    @classmethod
    def of(cls, kept: Mapping[str, nn.ModuleList]) -> "Stores":
        """kept: stack name -> its list, blocks of which are out."""
        states = {name: [blocks.__dict__.get(state) for state in KEPT_STATE] for name, blocks in kept.items()}
        return cls(str({name: (running, sorted(instead or ())) for name, (running, instead) in states.items()}))

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse the cache of a call that is filled without this mark; an empty one gets it."""
        for store in _parts(kwargs.get("past_key_values")):
            if getattr(store, MARK, None) == self.ran:
                continue
            if any(map(_is_filled, store.layers)):
                raise UserError(
                    f"past_key_values holds {len(store.layers)} layers that were filled without this plan; begin with "
                    "an empty cache inside of the plan."
                )
            setattr(store, MARK, self.ran)

    def mark_result(self, result: Any) -> None:
        """Mark the cache that a call has made itself."""
        found = result if isinstance(result, tuple) else [getattr(result, "past_key_values", None)]
        for store in (part for value in found for part in _parts(value)):
            if getattr(store, MARK, None) != self.ran:
                setattr(store, MARK, self.ran)


def _parts(cache: Any) -> list[Any]:
    """The caches with layers that a cache is, or that it is made of: a decoder's that also attends to an encoder."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [part for part in (cache, *parts) if isinstance(getattr(part, "layers", None), list)]


def _is_filled(layer: Any) -> bool:
    """Whether a layer of a cache holds the keys of any token, or a state."""
    states = getattr(layer, "has_previous_state", None)
    if isinstance(states, dict) and any(states.values()):
        return True
    return bool(getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length") and layer.get_seq_length())
