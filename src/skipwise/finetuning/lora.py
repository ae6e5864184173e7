"""LoRA on the trained blocks, by peft, under the names that it has in the whole model."""

from collections.abc import Sequence

import torch
from torch import nn

from skipwise.blocks import module_list
from skipwise.errors import UserError, require
from skipwise.finetuning.runs import Train


def lora_targets(model: nn.Module, train: Train, ends: Sequence[str]) -> list[str]:
    """Paths of the linear layers in trained blocks whose path ends in one of `ends`.

    Raises UserError, with names that there are, when a trained block has none of them.
    """
    return [
        f"{stack}.{number}.{name}"
        for stack, numbers in train.items()
        for number in numbers
        for name in targets_in(module_list(model, stack)[number], ends)
    ]


def targets_in(block: nn.Module, ends: Sequence[str]) -> list[str]:
    """Paths within a block of its linear layers whose path ends in one of `ends`. Raises UserError as `lora_targets`."""
    linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if any(f".{name}".endswith(f".{end}") for end in ends)]
    if not found:
        raise UserError(
            f"No linear layer of a {type(block).__name__} ends in {', '.join(ends)}; there are "
            f"{', '.join(linear) or 'none'}. Choose LoRA targets among them."
        )
    return found


def lora_parameters(block: nn.Module, ends: Sequence[str], rank: int) -> int:
    """How many parameters an adapter of this rank has on a block."""
    layers = [block.get_submodule(name) for name in targets_in(block, ends)]
    return sum(rank * sum(layer.weight.shape) for layer in layers)


def add_lora(model: nn.Module, targets: Sequence[str], rank: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Give the layers at these paths an adapter of this rank (alpha = rank), and return its parameters, in `dtype`.

    Everything else is frozen. Works on the meta device too; inside of a FakeTensorMode peft does not.
    """
    peft = require("peft", "image")
    model.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    peft.inject_adapter_in_model(config, model)
    added = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in added:
        parameter.data = parameter.data.to(dtype)
    return added
