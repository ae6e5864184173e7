"""A twin of a model, to run instead of it: nothing that runs the twin leaves a trace in the model.

Hooks stay behind: a cache that another library has switched on, an offloading, a profiler do not hear of it. What is
sharded or quantised has the shapes of the plain model.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.wrapping import class_of

# what torch, accelerate and diffusers keep of hooks in a module
_HOOKS = {name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict)}
_LEFT_BEHIND = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl", "_original_forward"}
SMALL = 2**24  # parameters: a forward of so many on a few tokens is quicker than one on shapes
_PRIVATE = ("__composable", "_fsdp", "_is_fsdp")  # attributes of a sharded module begin so


def meta_twin(model: nn.Module) -> Any:
    """A copy of the model on the meta device, in eval mode, without hooks. The model is neither run nor changed."""
    return _twin(model, _without_data, _without_data)


def twin(model: nn.Module) -> Any:
    """A twin that can be run at once: of a small model one that shares its weights, which is quicker; else as above."""
    parameters = list(model.parameters())
    plain = all(type(p.data) is Tensor and p.device.type == "cpu" and _is_plain(p) for p in parameters)
    if not plain or sum(p.numel() for p in parameters) > SMALL:
        return meta_twin(model)
    return _twin(model, Tensor.detach, lambda buffer: buffer.detach().clone())


def _twin(model: nn.Module, of_parameter: Callable[[Tensor], Tensor], of_buffer: Callable[[Tensor], Tensor]) -> Any:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(of_parameter(parameter), parameter.requires_grad)
    memo |= {id(buffer): of_buffer(buffer) for buffer in model.buffers()}
    modules = list(model.modules())
    for module in modules:
        cls = class_of(module)
        memo[id(module)] = cls.__new__(cls)
    for module in modules:
        _fill(memo[id(module)], module, memo)
    copied = memo[id(model)]
    _unquantise(copied)
    return copied.eval()


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


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


def _unquantise(model: nn.Module) -> None:
    """Put ordinary linear layers in the places of quantised ones, whose kernels know no meta tensors."""
    dtype = next((p.dtype for p in model.parameters() if _is_plain(p)), torch.get_default_dtype())
    for name, module in list(model.named_modules()):
        if _is_quantised(module):
            bias: Any = getattr(module, "bias", None)
            has_bias = (bias() if callable(bias) else bias) is not None  # torch.ao's layers have methods
            plain = nn.Linear(module.in_features, module.out_features, has_bias, device="meta", dtype=dtype)
            model.set_submodule(name, plain)


def _is_quantised(module: Any) -> bool:
    """Whether this is a linear layer by its sizes, with its weight packed, or kept under other names."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    parts = {name for name, _ in module.named_children()} - {"_packed_params"}  # torch.ao's own weight and bias
    linear = all(isinstance(size, int) for size in sizes) and not parts
    return linear and not (isinstance(weight, Tensor) and _is_plain(weight))


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() > 1
