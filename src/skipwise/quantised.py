"""Layers whose weights are quantised: as many FLOPs as the plain layer, as many bytes as are stored.

Of a loaded model the bytes are those of its tensors: packed weights, scales, zero points. Of a skeleton, which has only
the config of a quantised checkpoint, they follow from the method's own layout (`LAYOUTS`).
"""

from collections.abc import Callable, Iterable, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from skipwise.errors import UserError


class Stored(nn.Linear):
    """A linear layer by its shape, on the meta device, that says what its quantised weight takes.

    stored: bytes, without the bias. Takes inputs of every dtype, and returns theirs.
    """

    stored: int

    def forward(self, input: Tensor) -> Tensor:
        """Of shape (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


def bytes_of(tensor: Tensor) -> int:
    """Of a tensor, which may be made of several, or be a twin's."""
    if hasattr(tensor, "stored"):
        return tensor.stored
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer holds weights of its own that are packed or scaled, by whichever library."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    packed = any(t.element_size() == 1 or t.dtype == torch.int32 for t in own if t.ndim > 1)
    plain = (nn.Parameter, DTensor)  # a sharded parameter is a plain one in parts
    odd = any(type(p) not in plain for p in module._parameters.values() if p is not None)
    return packed or odd or callable(getattr(module, "weight", None))  # torch.ao's layers have methods


def stored_layer(module: Any, dtype: torch.dtype) -> Stored:
    """What stands for a quantised layer in a twin."""
    bias: Any = getattr(module, "bias", None)
    bias = bias() if callable(bias) else bias
    twin = Stored(int(module.in_features), int(module.out_features), bias is not None, device="meta", dtype=dtype)
    if bias is not None:
        twin.bias = hollow(nn.Parameter(bias, False), dtype)
    # not by its state_dict: that of bitsandbytes' layers on a CPU changes their scales
    twin.stored = sum(bytes_of(tensor) for tensor in _held(module) if tensor is not bias)
    return twin


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors that a layer holds, also those in objects of its own library, such as the scales of its weight."""
    weight: Any = getattr(module, "weight", None)
    if callable(weight):  # torch.ao's layers have methods
        return [weight()]
    found: dict[Any, Tensor] = {}
    library = type(module).__module__.partition(".")[0]

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and _place(value) not in found:
            found[_place(value)] = value
        elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] != library or library == "torch":
            return
        for part in getattr(value, "__dict__", {}).values():
            look(part)

    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        look(value)
    return list(found.values())


def _place(tensor: Tensor) -> Any:
    """The same for tensors that are the same memory."""
    whole = hasattr(tensor, "__tensor_flatten__") or tensor.is_meta
    return id(tensor) if whole else (tensor.device, tensor.data_ptr())


def hollow(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device; one that is stored in a byte an element takes part in the dtype of the others."""
    small = parameter.is_floating_point() and parameter.element_size() == 1
    empty = torch.empty(parameter.shape, dtype=dtype if small else parameter.dtype, device="meta")
    twin = nn.Parameter(empty, parameter.requires_grad)
    twin.stored = bytes_of(parameter)  # type: ignore[attr-defined]
    return twin


def computed_in(model: Any) -> torch.dtype:
    """The dtype that a model's products are made in."""
    said = getattr(model, "dtype", None)
    usable = [said, *(p.dtype for p in model.parameters())]
    return next((d for d in usable if d is not None and d.is_floating_point and d.itemsize > 1), torch.float32)


# (outputs, inputs, the checkpoint's quantization_config) -> bytes of a layer's weight
Layout = Callable[[int, int, Mapping[str, Any]], int]


def _bitsandbytes(outputs: int, inputs: int, config: Mapping[str, Any]) -> int:
    count = outputs * inputs
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        return count + 4 * outputs  # a float32 scale a row
    blocks = ceil(count / 64)
    scales = blocks + 4 * ceil(blocks / 256) + 4 * 256 + 4 if config.get("bnb_4bit_use_double_quant") else 4 * blocks
    return ceil(count / 2) + scales + 4 * 16  # the table of the 16 values


def _grouped(outputs: int, inputs: int, config: Mapping[str, Any]) -> int:
    """GPTQ and AWQ: weights and zero points packed into int32, a half-precision scale for each group."""
    bits, size = int(config.get("bits", 4)), int(config.get("group_size", 128))
    groups = ceil(inputs / size) if size > 0 else 1
    order = 4 * inputs if config.get("quant_method") == "gptq" else 0
    return ceil((inputs + groups) * outputs * bits / 8) + 2 * groups * outputs + order


def _torchao(outputs: int, inputs: int, config: Mapping[str, Any]) -> int:
    said = config.get("quant_type")
    kind = str(said.get("default", said).get("_type") if isinstance(said, Mapping) else said).lower().replace("_", "")
    if kind.startswith(("int8weightonly", "int8dynamicactivationint8weight")):
        return outputs * inputs + 5 * outputs  # a float32 scale and an int8 zero point a row
    if kind.startswith(("float8weightonly", "float8dynamicactivationfloat8weight")):
        return outputs * inputs + 4 * outputs
    raise _unknown(f"torchao, {said}")


def _quanto(outputs: int, inputs: int, config: Mapping[str, Any]) -> int:
    kind = str(config.get("weights") or config.get("weights_dtype"))
    if kind in ("int8", "float8"):
        return outputs * inputs + 2 * outputs + 4  # half-precision scales
    if kind in ("int4", "int2"):
        return outputs * inputs * int(kind[-1]) // 8 + 4 * ceil(outputs * inputs / 128) + 4
    raise _unknown(f"quanto, {kind}")


def _fp8(outputs: int, inputs: int, config: Mapping[str, Any]) -> int:
    rows, columns = config.get("weight_block_size") or (outputs, inputs)
    return outputs * inputs + 4 * ceil(outputs / rows) * ceil(inputs / columns)


LAYOUTS: dict[str, Layout] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _grouped,
    "awq": _grouped,
    "torchao": _torchao,
    "quanto": _quanto,
    "fp8": _fp8,
}


def as_stored(skeleton: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """The skeleton, its linear layers priced as the checkpoint's quantization_config says that they are stored.

    Which layers are left as they are is transformers' and diffusers' own rule: those that the config names; of a
    language model whose config names none, the head and what is tied. Raises UserError for an unknown method.
    """
    method = str(config.get("quant_method", "bitsandbytes"))
    if method not in LAYOUTS:
        raise _unknown(method)
    kept = _kept(skeleton, config)
    for name, module in skeleton.named_modules():
        if type(module) is nn.Linear and not kept(name):
            _store(module, LAYOUTS[method](module.out_features, module.in_features, config))
    return skeleton


def packed(skeleton: nn.Module, bytes_an_element: float) -> nn.Module:
    """The skeleton with all its linear layers stored in so many bytes an element, as one packed file holds them."""
    for module in skeleton.modules():
        if type(module) is nn.Linear:
            _store(module, round(module.weight.numel() * bytes_an_element))
    return skeleton


def _store(module: Any, amount: int) -> None:
    module.__class__ = Stored
    module.stored = amount


def _kept(skeleton: Any, config: Mapping[str, Any]) -> Callable[[str], bool]:
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    named: Iterable[str] | None = config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert")
    if isinstance(skeleton, PreTrainedModel):
        names = HfQuantizer.get_modules_to_not_convert(skeleton, list(named) if named else None)
        return lambda name: not should_convert_module(name, names)
    return lambda name: any(f".{part}." in f".{name}." for part in named or ())


def _unknown(method: str) -> UserError:
    return UserError(
        f"How many bytes a checkpoint quantised by {method} holds is not known without its weights; known are "
        f"{', '.join(LAYOUTS)}. Load the model and price that, or give the config of the original."
    )
