"""The block contract: where a model's blocks are, and where each stream sits in a block's arguments and returns.

Nothing here knows a model by name. One call of the model is traced: an output of block k that *is* (the same tensor
object) an argument of block k + 1 is a stream. What cannot be planned is refused with what was seen.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipwise.errors import UserError
from skipwise.examples import example_inputs, on_meta, run_example, shapes_only
from skipwise.numbering import find_numbering
from skipwise.per_layer import computed_lists, layer_list_names, names_layers, names_of_layers
from skipwise.plan import ModelShape
from skipwise.twins import twin
from skipwise.wrapping import block_lists, class_of, unwrap


@dataclass(frozen=True)
class Stream:
    """One residual stream: the block's parameter that takes it, and its place in what the block returns.

    `output` is the index in the returned tuple, or None when the block returns the bare tensor.
    """

    argument: str
    output: int | None


@dataclass(frozen=True)
class Stack:
    """A run of blocks that hand their streams on unchanged.

    name: dotted path of the ModuleList; returns: length of the tuple a block returns, None for a bare tensor;
    in_place: the model minds a block's number, so a skipped block must leave something in its place: the caller hands
    each block what depends on its number (Chroma cuts the modulation by index), or uses a part of a block outside of it
    (DiT embeds the timestep with block 0's norm); numbered_by: optional arguments of the forward that loops over the
    list, by which a caller gives things by block number (a ControlNet's residuals); carried: those of them that it also
    returns, for the next call; counts_config: the loop also looks
    up lists of the config by number; coupled: other lists whose block k shares weights with block k here
    (DiffusionGemma's encoder), or its place in a cache, which lose the same blocks.
    """

    name: str
    length: int
    block_class: str
    streams: tuple[Stream, ...]
    returns: int | None
    in_place: bool = False
    numbered_by: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    counts_config: bool = False
    coupled: tuple[str, ...] = ()

    @property
    def takes_stand_ins(self) -> bool:
        """Whether a module may take a skipped block's place in the stream: one stream through a list of its own."""
        return len(self.streams) == 1 and not self.coupled and not self.in_place


@dataclass(frozen=True)
class Contract:
    """All stacks of a model that can be planned, and for the other lists of modules the reason why not."""

    architecture: str
    hidden_size: int
    stacks: Mapping[str, Stack]
    refused: Mapping[str, str]

    @property
    def shape(self) -> ModelShape:
        """What a plan remembers of this model."""
        lengths = {name: stack.length for name, stack in self.stacks.items()}
        return ModelShape(architecture=self.architecture, stacks=lengths, hidden_size=self.hidden_size)

    @property
    def main_stack(self) -> str:
        """The longest stack, the first of them when several are as long."""
        return max(self.stacks, key=lambda name: self.stacks[name].length)


class UnplannableError(UserError):
    """A model none of whose lists of blocks can be planned."""


@dataclass(frozen=True)
class Call:
    """One traced call of one block: arguments by parameter name, and what came back."""

    index: int
    arguments: dict[str, Any]
    result: Any

    def outputs(self) -> dict[int | None, Any]:
        """What the block returned, by place; None is the place of a bare tensor."""
        return dict(enumerate(self.result)) if isinstance(self.result, tuple | list) else {None: self.result}


@dataclass
class Trace:
    """The calls of one list's blocks, in order, and whether a part of a block ran while no block that has it did."""

    calls: list[Call] = field(default_factory=list)
    running: frozenset[nn.Module] = frozenset()  # the parts of the block that runs; blocks may share an activation
    used_outside: bool = False


_contracts: WeakKeyDictionary[nn.Module, Contract] = WeakKeyDictionary()


def find_contract(model: nn.Module, example: Mapping[str, Any] | None = None) -> Contract:
    """The contract of a model, traced once and remembered.

    What is traced is a twin, so that the model itself, its hooks and its caches do not hear of it. Of a
    wrapped model (torch.compile, DataParallel, peft, ...) it is the contract of what is inside.
    example: keyword arguments of one forward; made by `skipwise.examples` when left out.
    Raises UnplannableError, with the reasons, when no stack can be planned.
    """
    model = unwrap(model)
    if model not in _contracts:
        _contracts[model] = _trace_contract(twin(model), example)
    return _contracts[model]


def _trace_contract(model: nn.Module, example: Mapping[str, Any] | None) -> Contract:
    """The contract of a model that may be run."""
    lists = block_lists(model)
    on_meta_device = next(model.parameters()).is_meta
    if example is None:
        example = example_inputs(model, whole=True)
    elif on_meta_device:
        example = on_meta(model, example)
    traces = trace_calls(model, lists, example)
    refused: dict[str, str] = {}
    stacks: dict[str, Stack] = {}
    for name, blocks in lists.items():
        calls = traces[name].calls
        reason = _refusal(calls, blocks) or _collected(model, name, calls) or _picked(model, name)
        if reason:
            refused[name] = reason
        else:
            stacks[name] = _describe(model, name, traces[name])
    _couple(stacks, refused, lists, traces)
    architecture = type(model).__name__
    if not stacks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it has no list of blocks"
        raise UnplannableError(f"{architecture} cannot be planned: {reasons}.")
    return Contract(architecture, _stream_width(stacks, traces), stacks, refused)


def module_list(model: nn.Module, name: str) -> nn.ModuleList:
    """The list of blocks at a dotted path."""
    return cast(nn.ModuleList, model.get_submodule(name))


def trace_calls(model: nn.Module, lists: Mapping[str, nn.ModuleList], example: Mapping[str, Any]) -> dict[str, Trace]:
    """Run the model once on `example` and note every call of every module in `lists`, in order."""
    traces = {name: Trace() for name in lists}
    on_meta_device = any(parameter.is_meta for parameter in model.parameters())
    with ExitStack() as hooks, shapes_only() if on_meta_device else torch.no_grad():
        for name, blocks in lists.items():
            for index, block in enumerate(blocks):
                for handle in _record(block, index, traces[name]):
                    hooks.callback(handle.remove)
        run_example(model, example)
    return traces


def _record(block: nn.Module, index: int, trace: Trace) -> list[Any]:
    """Hooks that note the block's calls, and calls of its parts outside of it."""
    signature = inspect.signature(class_of(block).forward)
    parts = frozenset(module for module in block.modules() if module is not block)

    def enter(*_: Any) -> None:
        trace.running = parts

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        trace.running = frozenset()
        trace.calls.append(Call(index, bind(signature, module, args, kwargs), result))

    def part(module: nn.Module, *_: Any) -> None:
        trace.used_outside |= module not in trace.running

    return [
        block.register_forward_pre_hook(enter),
        block.register_forward_hook(leave, with_kwargs=True),
        *(module.register_forward_pre_hook(part) for module in parts),
    ]


def bind(signature: inspect.Signature, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, however they were passed; a `**kwargs` parameter is spread out."""
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    arguments.pop(next(iter(signature.parameters)))  # self
    return arguments


def _refusal(calls: Sequence[Call], blocks: nn.ModuleList) -> str | None:
    """Why this list of modules cannot be planned, or None when it can."""
    order = [call.index for call in calls]
    if not order:
        return "none of its modules ran in the example call"
    if order != list(range(len(blocks))):
        return f"its modules ran in the order {order}, not once each from first to last"
    bare = next((i for i, block in enumerate(blocks) if next(block.parameters(), None) is None), None)
    if bare is not None:
        return f"its module {bare} has no parameters: these are parts of a layer, not blocks"
    first = _links(calls[0], calls[1])
    for call, following in pairwise(calls):
        links = _links(call, following)
        if any(stream.argument not in calls[0].arguments for stream in links):
            return f"block {following.index} takes its streams otherwise than block 0"
        if not links:
            return f"no output of block {call.index} reaches block {following.index} unchanged"
        if links != first:
            return f"block {following.index} takes its streams otherwise than block 1"
    return _change_of_shape(calls) or _long_skip(calls)


def _change_of_shape(calls: Sequence[Call]) -> str | None:
    """The reason to refuse when a block makes another shape of a stream than it was given."""
    for stream in _links(calls[0], calls[1]):
        for call in calls:
            given, made = call.arguments.get(stream.argument), call.outputs().get(stream.output)
            if isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape != made.shape:
                return f"block {call.index} changes the shape of `{stream.argument}`"
    return None


def _collected(model: nn.Module, name: str, calls: Sequence[Call]) -> str | None:
    """The reason to refuse when blocks also make something that is no stream, which the model then has for each block.

    transformers' blocks do so with attention weights, which nothing but the output needs.
    """
    streams = {stream.output for stream in _links(calls[0], calls[1])}
    made = [
        place for place, output in calls[0].outputs().items() if isinstance(output, Tensor) and place not in streams
    ]
    if not made or layer_configs(model, name):
        return None
    return f"its blocks also return something that is no stream (at place {made[0]}), which the model collects"


def _picked(model: nn.Module, name: str) -> str | None:
    """The reason to refuse when a module above the list's own picks states by the numbers of blocks (Mllama's)."""
    length, *above = len(module_list(model, name)), *name.split(".")[:-2]
    for depth in range(len(above) + 1):
        path = ".".join(above[:depth])
        for key, value in vars(model.get_submodule(path)).items():
            if "layer" in key and isinstance(value, list | tuple) and names_layers(value, length):
                return f"{path or 'the model'} picks states by the numbers of its blocks (`{key}`)"
    return None


def _links(call: Call, following: Call) -> tuple[Stream, ...]:
    """The streams between two consecutive calls: outputs of the first that are arguments of the second."""
    return tuple(
        Stream(argument, place)
        for place, output in call.outputs().items()
        if isinstance(output, Tensor)
        for argument, value in following.arguments.items()
        if value is output
    )


def _long_skip(calls: Sequence[Call]) -> str | None:
    """The reason to refuse when a block takes, besides its streams, the output of an earlier block."""
    streams = {stream.argument for stream in _links(calls[0], calls[1])}
    earlier: dict[int, int] = {}  # id of an output tensor -> the block that made it
    for call in calls:
        for argument, value in call.arguments.items():
            for tensor in _tensors(value):
                if argument not in streams and id(tensor) in earlier:
                    return f"block {call.index} also takes the output of block {earlier[id(tensor)]} as `{argument}`"
        earlier |= {id(t): call.index for output in call.outputs().values() for t in _tensors(output)}
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _describe(model: nn.Module, name: str, trace: Trace) -> Stack:
    calls, blocks = trace.calls, module_list(model, name)
    result = calls[0].result
    streams = _links(calls[0], calls[1])
    configs = layer_configs(model, name)
    per_layer = [getattr(config, key) for config in configs for key in layer_list_names(config, len(calls))]
    if not per_layer:
        per_layer = [values for config in configs for values in computed_lists(config, len(calls)).values()]
    owner, _, attribute = name.rpartition(".")
    cut = {key for config in configs for key in names_of_layers(config, len(calls))}
    numbering = find_numbering(model.get_submodule(owner), attribute, cut)
    minds = trace.used_outside or _minds_numbers(calls, {stream.argument for stream in streams}, per_layer)
    return Stack(
        name=name,
        length=len(calls),
        block_class=type(blocks[0]).__name__,
        streams=streams,
        returns=len(result) if isinstance(result, tuple | list) else None,
        in_place=minds or numbering.always,
        numbered_by=tuple(sorted(numbering.arguments)),
        carried=tuple(sorted(numbering.carried)),
        counts_config=numbering.counts_config,
    )


def _minds_numbers(calls: Sequence[Call], streams: set[str], per_layer: Sequence[Sequence[Any]]) -> bool:
    """Whether blocks of equal per-layer configuration are handed different things besides their streams."""
    seen: dict[str, dict[str, Any]] = {}
    for call in calls:
        others = {argument: value for argument, value in call.arguments.items() if argument not in streams}
        first = seen.setdefault(repr([values[call.index] for values in per_layer]), others)
        if first.keys() != others.keys() or not all(_same(first[key], others[key]) for key in first):
            return True
    return False


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def layer_configs(model: nn.Module, name: str) -> list[Any]:
    """The transformers configs that describe exactly the blocks of this list (`num_hidden_layers` is their number)."""
    owner, blocks = model.get_submodule(name.rpartition(".")[0]), module_list(model, name)
    holders = [owner, *blocks.modules()]
    found: list[Any] = [module.config for module in holders if hasattr(module, "config")]
    found += [config.get_text_config() for config in found if hasattr(config, "get_text_config")]
    unique = {id(config): config for config in found}.values()
    return [config for config in unique if getattr(config, "num_hidden_layers", None) == len(blocks)]


def _couple(
    stacks: dict[str, Stack],
    refused: dict[str, str],
    lists: Mapping[str, nn.ModuleList],
    traces: Mapping[str, Trace],
) -> None:
    """Merge, in place, stacks whose blocks share weights, or places in a cache (PI0's action expert reads what the
    text's layers leave there), number by number: the last of them leads, others follow.
    """
    names = list(stacks)
    for i, name in enumerate(names):
        for leader in names[i + 1 :]:
            weights = _share_weights(lists[name], lists[leader])
            if weights or _share_cache(traces[name], traces[leader]):
                coupled = (*stacks[leader].coupled, name, *stacks.pop(name).coupled)
                stacks[leader] = replace(stacks[leader], coupled=coupled)
                shared = "their weights" if weights else "a cache"
                refused[name] = f"its blocks share {shared} with {leader} and are skipped with them"
                break


def _share_weights(blocks: nn.ModuleList, others: nn.ModuleList) -> bool:
    if len(blocks) != len(others):
        return False
    return all(
        {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()} for a, b in zip(blocks, others, strict=True)
    )


def _share_cache(trace: Trace, other: Trace) -> bool:
    """Whether the blocks of two lists, as many, were handed one object that keeps something of every layer."""
    ours, theirs = (
        {id(value) for call in each.calls for value in call.arguments.values() if hasattr(value, "get_seq_length")}
        for each in (trace, other)
    )
    return len(trace.calls) == len(other.calls) and bool(ours & theirs)


def _stream_width(stacks: Mapping[str, Stack], traces: Mapping[str, Trace]) -> int:
    """Width of the stream of the longest stack: the last dimension of its first stream."""
    name = max(stacks, key=lambda name: stacks[name].length)
    tensor = traces[name].calls[1].arguments[stacks[name].streams[0].argument]
    return int(tensor.shape[-1])
