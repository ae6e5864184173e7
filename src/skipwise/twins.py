"""A twin of a model, to run instead of it: nothing that runs the twin leaves a trace in the model.

Hooks stay behind: a cache that another library has switched on, an offloading, a profiler do not hear of it. What is
sharded or quantised has the shapes of the plain model.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.quantised import computed_in, hollow, is_quantised, stored_layer
from skipwise.wrapping import class_of, unwrap

# what torch, accelerate and diffusers keep of hooks in a module
_HOOKS = {name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict)}
_LEFT_BEHIND = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl", "_original_forward"}
SMALL = 2**24  # parameters: a forward of so many on a few tokens is quicker than one on shapes
_PRIVATE = ("__composable", "_fsdp", "_is_fsdp")  # attributes of a sharded module begin so


def meta_twin(model: nn.Module, by_shape: bool = True) -> Any:
    """A copy of the model on the meta device, in eval mode, without hooks. The model is neither run nor changed.

    by_shape: quantised layers become plain ones, which run without their library and know what is stored.
    """
    dtype = computed_in(model)
    memo: dict[int, Any] = {id(parameter): hollow(parameter, dtype) for parameter in model.parameters()}
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    if by_shape:
        memo |= {id(module): stored_layer(module, dtype) for module in model.modules() if is_quantised(module)}
    return _copy(model, memo)


def twin(model: nn.Module) -> Any:
    """A twin that can be run at once: of a small model one that shares its weights, which is quicker; else as above."""
    parameters = list(model.parameters())
    plain = all(type(p.data) is Tensor and p.device.type == "cpu" and p.element_size() > 1 for p in parameters)
    if not plain or sum(p.numel() for p in parameters) > SMALL or any(map(is_quantised, model.modules())):
        return meta_twin(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
    memo |= {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    return _copy(model, memo)


def _copy(model: nn.Module, memo: dict[int, Any]) -> Any:
    """The model with what `memo` has instead of its parameters, buffers and some of its modules, by their ids."""
    modules = [module for module in model.modules() if id(module) not in memo]
    inside = [unwrap(module) for module in modules]  # a compiled or checkpointed part is what is inside
    plain = [module for module, inner in zip(modules, inside, strict=True) if inner is module]
    for module in plain:
        cls = class_of(module)
        memo[id(module)] = cls.__new__(cls)
    memo |= {id(module): memo[id(inner)] for module, inner in zip(modules, inside, strict=True)}
    for module in plain:
        _fill(memo[id(module)], module, memo)
    return memo[id(model)].eval()


def _fill(copied: nn.Module, module: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the module's attributes; other modules, parameters and buffers are in `memo` already."""
    for name, value in vars(module).items():
        if name in _LEFT_BEHIND or name.startswith(_PRIVATE):
            continue
        copied.__dict__[name] = OrderedDict() if name in _HOOKS else _copied(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a stream, a lock, a process group: nothing that a forward on shapes changes
        return value
