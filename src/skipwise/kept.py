"""A list of blocks of which some do not run. Every block stays in it, under its own number.

Whoever asks for modules, parameters, weights or names sees the whole model, with the whole model's numbers: `to`,
`eval`, `state_dict`, an adapter that is loaded, an attention processor that is set reach the right blocks. The model's
own forward, which iterates over the list, sees the blocks that run.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor, nn

from skipwise.blocks import Stack
from skipwise.errors import UserError
from skipwise.wrapping import class_of, unwrap

Undo = Callable[[], None]
KEPT_STATE = ("_running", "_instead")  # what a list remembers for as long as it keeps blocks out


class KeptBlocks:
    """What a ModuleList becomes for as long as some of its blocks are kept out; mixed in before the list's own class.

    _running: the numbers of the blocks that run, in order, as the list's keys; _instead: key -> what runs there instead
    of the block itself.
    """

    _running: tuple[str, ...]
    _instead: Mapping[str, nn.Module]
    _modules: dict[str, nn.Module]

    def _blocks(self) -> list[nn.Module]:
        instead, modules = self._instead, self._modules
        return [instead[key] if key in instead else modules[key] for key in self._running]

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._blocks())

    def __getitem__(self, index: int | slice) -> nn.Module:
        found = self._blocks()[index]
        return nn.ModuleList(found) if isinstance(found, list) else found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts reach the stand-ins, too."""
        for module in self._instead.values():
            if isinstance(module, Accompanied):
                module.before._apply(fn)
                module.behind._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "A plan is in force: its list of blocks can be neither changed, copied nor pickled; leave the `with` first."
        )

    __setitem__ = __delitem__ = __iadd__ = append = insert = extend = pop = _refuse
    __deepcopy__ = __reduce_ex__ = _refuse  # a copy would stay as it is when the plan is left


@cache
def _kept_class(cls: type) -> type:
    return type(f"Kept{cls.__name__}", (KeptBlocks, cls), {"mixed_in": KeptBlocks})


def keep(blocks: nn.ModuleList, running: Sequence[int], instead: Mapping[int, nn.Module]) -> Undo:
    """Let only the blocks `running` of the list run, in that order; some of them replaced. Returns what undoes it."""
    before = type(blocks), {name: blocks.__dict__.get(name) for name in KEPT_STATE}
    if not isinstance(blocks, KeptBlocks):
        blocks.__class__ = _kept_class(type(blocks))  # type: ignore[arg-type]
    blocks.__dict__["_running"] = tuple(map(str, running))
    blocks.__dict__["_instead"] = {str(number): module for number, module in instead.items()}

    def undo() -> None:
        blocks.__class__ = before[0]
        for name, value in before[1].items():
            if value is None:
                blocks.__dict__.pop(name, None)
            else:
                blocks.__dict__[name] = value

    return undo


def every_block(blocks: nn.ModuleList) -> list[nn.Module]:
    """All blocks of a list by their own numbers, also of one that keeps some out."""
    return list(blocks._modules.values())


def running_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(dotted path, module) of all that runs, blocks numbered as they run; each once, as `named_modules` gives them."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for key, child in _children(module):
            yield from visit(child, f"{name}.{key}" if name else key)

    return visit(module, name)


def _children(module: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, KeptBlocks):
        return ((str(number), block) for number, block in enumerate(module))
    return module.named_children()


class PassThrough(nn.Module):
    """Stands where a block stood and returns its streams as they came in. Has no parameters and no hook.

    Whoever asks it for a part of the block (DiT takes the timestep embedding from block 0) gets that part.
    """

    def __init__(self, block: nn.Module, stack: Stack, in_cache: bool = True):
        """in_cache: whether the block's place in a KV cache is kept, too."""
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: its parameters are not this one's
        self.in_cache = in_cache
        self.places = places(block, stack)
        self.outputs = [stream.output for stream in stack.streams]
        self.returns = stack.returns

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The streams, in the places in which the block returns them; other places hold None."""
        streams = [kwargs[name] if name in kwargs else args[place] for name, place in self.places]
        if self.in_cache:
            _count_positions(kwargs.get("past_key_values"), self.__dict__["block"], streams[0])
        if self.returns is None:
            return streams[0]
        by_place = dict(zip(self.outputs, streams, strict=True))
        return tuple(by_place.get(place) for place in range(self.returns))


def _count_positions(cache: Any, block: nn.Module, stream: Tensor) -> None:
    """Let the KV cache know how many tokens passed a skipped block's place; models ask the first layer's length.

    Keys without width count and hold nothing. Layers that keep a state, or use another's keys, are not asked.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # a decoder's that also attends to an encoder
    layers = getattr(cache, "layers", None)
    if layers is None:
        return
    number: Any = next((module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")), None)
    if number is None:
        return
    if number >= len(layers) or hasattr(layers[number], "get_seq_length"):
        batch, length = stream.shape[-3:-1]  # Gemma3n's stream has a dimension before these
        nothing = stream.new_empty(batch, 1, length, 0)
        cache.update(nothing, nothing, number)


class Accompanied(nn.Module):
    """A block with the stand-ins of skipped blocks before and behind it, so that these take no place in the list.

    Whoever asks it for what it lacks gets it from the block.
    """

    def __init__(self, block: nn.Module, stack: Stack, before: Sequence[nn.Module], behind: Sequence[nn.Module]):
        super().__init__()
        self.block = block
        self.before, self.behind = nn.Sequential(*before), nn.Sequential(*behind)
        ((self.argument, self.place),) = places(block, stack)
        self.output = stack.streams[0].output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns, with the stream changed before it goes in and when it comes out."""
        if self.argument in kwargs:
            kwargs[self.argument] = self.before(kwargs[self.argument])
        else:
            args = (*args[: self.place], self.before(args[self.place]), *args[self.place + 1 :])
        result = self.block(*args, **kwargs)
        if self.output is None:
            return self.behind(result)
        return (*result[: self.output], self.behind(result[self.output]), *result[self.output + 1 :])


def places(block: nn.Module, stack: Stack) -> list[tuple[str, int]]:
    """(name, position) of each stream's argument."""
    if isinstance(block, PassThrough):
        return block.places
    names = list(inspect.signature(class_of(unwrap(block)).forward).parameters)[1:]
    return [(stream.argument, names.index(stream.argument)) for stream in stack.streams]
