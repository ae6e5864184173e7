"""A LoRA adapter, as peft writes it, merged into a model's weights for a while.

Merged weights cost nothing in a forward, and because the originals are put back as they were, leaving changes nothing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from skipwise.errors import UserError

_PREFIX = "base_model.model."
# what would make an adapter more than W + scale * B A
_PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


def deltas(folder: Path) -> dict[str, Tensor]:
    """Module path -> what the adapter adds to that module's weight, float32, in the weight's shape.

    Raises UserError for an adapter that is not plain LoRA (Hu et al., arXiv 2106.09685).
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name, only in _PLAIN.items():
        if config.get(name, only) != only:
            raise UserError(f"{folder} has {name}={config[name]!r}; only plain LoRA adapters can be merged.")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name.removeprefix(_PREFIX): _delta(tensors, name, config) for name in names}


def _delta(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    a, b = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
    rank = a.shape[0]
    return (b @ a) * (config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))


def added(weight: Tensor, delta: Tensor) -> Tensor:
    """The weight with what an adapter adds, in the weight's dtype."""
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)


@contextmanager
def merged(model: nn.Module, folder: Path | None) -> Iterator[None]:
    """The model with the adapter in `folder` merged into its weights; None changes nothing.

    Raises UserError when a module that the adapter changes is not in the model or has another shape.
    """
    before: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, delta in deltas(folder).items() if folder else ():
            module = _target(model, name, delta)
            weight = module.weight
            before.append((module, weight))
            with torch.no_grad():
                module.weight = nn.Parameter(added(weight, delta), False)
        yield
    finally:
        for module, weight in before:
            module.weight = weight


def _target(model: nn.Module, name: str, delta: Tensor) -> Any:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"The plan's adapter changes {name}, which the model does not have.") from error
    if module.weight.shape != delta.shape:
        raise UserError(
            f"The plan's adapter changes {name} by {tuple(delta.shape)}, which is {tuple(module.weight.shape)} here."
        )
    return module
