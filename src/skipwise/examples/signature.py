"""Example inputs of a diffusion transformer from its forward's signature and its config.

Names of parameters say what they are (`arguments.py`), the config how wide. What neither says, whether latents are a
grid or tokens and which width is the text's, is found by trying: the first call that runs, on shapes alone.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from skipwise.errors import UserError
from skipwise.examples.arguments import ALWAYS, IF_NEEDED, REQUIRED, TEXT_WIDTHS, Call
from skipwise.examples.layouts import layouts
from skipwise.examples.shapes import shapes_only
from skipwise.examples.size import Size
from skipwise.examples.tensors import Tensors
from skipwise.twins import meta_twin
from skipwise.wrapping import class_of

Parameters = Mapping[str, inspect.Parameter]
# lengths that no two of a call's tensors share, so that only the right call runs
TRIED = Size(image=12, text=7, frames=3)


@dataclass(frozen=True)
class Way:
    """How a model of one class is called.

    layout: the latents' (`layouts.py`); text_width: the config's field; guided: with guidance, if the config speaks of
    it; all_known: with every optional argument that there is a maker for, and not only with what is usual;
    time_a_frame: with a timestep for each frame.
    """

    layout: str
    text_width: str | None
    guided: bool = True
    all_known: bool = False
    time_a_frame: bool = False


class UnknownArgumentError(Exception):
    """A required argument for which there is no maker."""


class NoExampleError(UserError):
    """A model whose inputs cannot be made from its signature and config."""


_known: dict[tuple[type, str], Way] = {}  # by class and config


def from_signature(model: nn.Module, size: Size, new: Tensors) -> dict[str, Any]:
    """Keyword arguments for one forward of a diffusers transformer. Raises NoExampleError, with the reason."""
    config: Any = model.config
    key = type(model), repr(sorted(config.items()))
    if key not in _known:
        _known[key] = _find_way(model)
    return _arguments(model, _known[key], size, new)


def _find_way(model: nn.Module) -> Way:
    """The first way that runs, on shapes alone."""
    twin = meta_twin(model)
    new = Tensors(TRIED.batch, torch.device("meta"), dtype_of(model))
    reason, furthest = "it has none of the latents that are known", -1
    for way in _ways(twin):
        with shapes_only() as shapes:
            try:
                twin(**_arguments(twin, way, TRIED, new))
                return way
            except Exception as error:  # the call does not fit: models complain each in its own way
                if shapes.ops > furthest:
                    reason, furthest = _told(error), shapes.ops
    raise no_example(model, f"of the calls that its signature and config suggest none runs ({reason})")


def _told(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return said if isinstance(error, UnknownArgumentError) else f"{type(error).__name__}: {said}"


def no_example(model: nn.Module, reason: str) -> NoExampleError:
    """The refusal of a model that cannot be called without being told how."""
    return NoExampleError(
        f"{type(model).__name__} cannot be tried out: {reason}. From Python, `sw.skip` and `sw.estimate` take other "
        "inputs as `example`, the keyword arguments of one forward; the command line cannot be given any."
    )


def run_example(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One forward. Raises NoExampleError, with what the model complains of, when it does not run."""
    try:
        model(**inputs)
    except UserError:
        raise
    except Exception as error:
        raise no_example(model, f"it does not run on {', '.join(inputs)} ({_told(error)})") from error


def _ways(model: nn.Module) -> Iterator[Way]:
    parameters = parameters_of(model)
    config: Any = model.config
    found = [layout.name for layout in layouts(config, parameters, TRIED)]
    widths: list[str | None] = [name for name in dict.fromkeys(TEXT_WIDTHS) if type(getattr(config, name, None)) is int]
    widths = widths or [None]
    extras = [{}, {"guided": False}, {"all_known": True}, {"time_a_frame": True}]
    for extra, layout in product(extras, found):
        yield from (Way(layout, width, **extra) for width in widths)


def _arguments(model: nn.Module, way: Way, size: Size, new: Tensors) -> dict[str, Any]:
    parameters = parameters_of(model)
    config: Any = model.config
    layout = next(each for each in layouts(config, parameters, size) if each.name == way.layout)
    call = Call(config, size, new, layout, way.text_width, way.time_a_frame)
    first, *others = parameters  # the latents come first, whatever their name
    kwargs = {first: new.noise(*layout.shape)}
    for name in others:
        value = _value(call, parameters[name], way)
        if value is not None:
            kwargs[name] = value
        elif parameters[name].default is inspect.Parameter.empty:
            raise UnknownArgumentError(f"what its forward's argument `{name}` is cannot be told from its config")
    return kwargs


def _value(call: Call, parameter: inspect.Parameter, way: Way) -> Any:
    name, required = parameter.name, parameter.default is inspect.Parameter.empty
    makers: list[Callable[[Call], Any]] = []
    if name in ALWAYS and (way.guided or name != "guidance"):
        makers.append(ALWAYS[name])
    if name in REQUIRED and required:
        makers.append(REQUIRED[name])
    if name in IF_NEEDED and (required or way.all_known):
        makers.append(IF_NEEDED[name])
    return next((value for make in makers if (value := make(call)) is not None), None)


def parameters_of(model: nn.Module) -> Parameters:
    """The forward's parameters by name, without `self` and those that are spread out."""
    spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(class_of(model).forward).parameters  # others may have replaced the object's own
    return {name: p for name, p in list(parameters.items())[1:] if p.kind not in spread}


def dtype_of(model: nn.Module) -> torch.dtype:
    """What floats are held in; a library's own answer knows of modules that stay in float32 in a bfloat16 model."""
    dtype = getattr(model, "dtype", None)
    return dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
