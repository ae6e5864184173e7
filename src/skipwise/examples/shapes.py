"""Running a model for its shapes alone, on the meta device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

_GROUPED_MM = torch.ops.aten._grouped_mm.default
_HISTC = torch.ops.aten.histc.default
_CONSTANTS = {getattr(torch.ops.aten, name).default for name in ("ones", "zeros", "full", "arange", "linspace")} | {
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
}
_SMALL = 1 << 16  # numbers in a mask or a table of positions that is made for real
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_COMPARING = {"take_along_dim", "meshgrid"}
_MOVED = torch.ops.aten._to_copy.default


def _top_k(result: Any, scores: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    rows = result[1].movedim(dim, -1).shape
    return result[0], _in_turn(rows, scores.shape[dim]).movedim(-1, dim)


def _argmax(result: Tensor, scores: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return _in_turn(result.shape, scores.numel() if dim is None else scores.shape[dim])


def _in_turn(shape: torch.Size, choices: int) -> Tensor:
    """Real indices: 0, 1, 2, ... along all rows, and after the last choice the first again."""
    return torch.arange(shape.numel()).remainder(choices).view(shape)


_CHOOSING: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.topk.default: _top_k,
    torch.ops.aten.argmax.default: _argmax,
}


class Shapes(TorchDispatchMode):
    """Runs an op for real where all its tensors are real, and for its shapes alone as soon as one is on meta.

    torch refuses to mix the two; models do it when they compute rotary tables on the CPU or read lengths off a mask.
    Small masks and positions that a forward makes, or moves to where its weights are, stay real: it may look at them.
    So is what it chooses (`topk`, `argmax`), as models loop over the experts that were chosen: of scores that nobody
    knows it is made in turn. Every token meets as many experts as it would, and every expert as many tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0  # how many were run, which says how far a forward got

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.ops += 1
        if tree_any(_is_meta, (args, kwargs)):
            if func in _INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            if "device" in kwargs:  # what has no data cannot be moved off meta either
                kwargs["device"] = torch.device("meta")
            if func is _GROUPED_MM:  # mixtures of experts: its own meta kernel refuses float32
                return args[0] @ args[1][0]  # the same shape and FLOPs: each row meets one expert
            if func in _CHOOSING:
                return _CHOOSING[func](func(*args, **kwargs), *args, **kwargs)
        elif (func in _CONSTANTS or func is _MOVED) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            made = func(*args, **kwargs)
            return func(*args, **kwargs | {"device": "cpu"}) if made.numel() <= _SMALL else made
        elif func is _HISTC:  # mixtures of experts: models give the CPU floats, and others the numbers of the experts
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


class _OneDevice(TorchFunctionMode):
    """Has all of an op's tensors on meta, where torch itself compares their devices before the op is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _COMPARING and tree_any(_is_meta, (args, kwargs)):
            args, kwargs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, kwargs))
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    """Models switch it off where they count in float32, on the device that a tensor is on; of meta it knows nothing."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks as the places that they keep: all, where nobody knows what the mask says."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool:
            places.append(index)
        else:
            known = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
            places += known.nonzero(as_tuple=True)
    return places


@contextmanager
def shapes_only() -> Iterator[Shapes]:
    """Within this, a model on the meta device can be run: `model(**example_inputs(model))` allocates no weights.

    Enter it after a FLOP counter, so that the counter sees the ops that are really run.
    """
    autocast, torch.autocast = torch.autocast, _Autocast  # type: ignore[misc]
    try:
        with torch.no_grad(), _OneDevice(), Shapes() as shapes:
            yield shapes
    finally:
        torch.autocast = autocast  # type: ignore[misc]
