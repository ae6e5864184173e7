"""LoRA on attention projections, saved as the stock pipelines read it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipwise.errors import UserError, require
from skipwise.files import check_writable, partial_folder

# as diffusers' training scripts: the projections of the image, and, in joint attention, those of the text
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def lora_targets(
    transformer: nn.Module, train: Mapping[str, Sequence[int]] | None = None, ends: Sequence[str] = PROJECTIONS
) -> list[str]:
    """Names of the linear layers that end in one of `ends`, for peft's `target_modules`, in order.

    train: stack name -> numbers of the blocks to look in; without, all blocks. Raises UserError when there are none.
    """
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and _ends(name, ends) and (train is None or _inside(name, train))
    ]
    if not names:
        plain = tuple(ends) == PROJECTIONS
        what = "attention projections" if plain else f"linear layer that ends in {', '.join(ends)}"
        where = "its blocks" if train is None else f"blocks {dict(train)}"
        raise UserError(f"{type(transformer).__name__} has no {what} in {where}; choose other blocks or targets.")
    return names


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)


def _inside(name: str, train: Mapping[str, Sequence[int]]) -> bool:
    return any(name.startswith(f"{stack}.{block}.") for stack, blocks in train.items() for block in blocks)


def lora_sizes(block: nn.Module, ends: Sequence[str], rank: int) -> list[int]:
    """Numbers of elements of the tensors of an adapter of this rank on a block: A and B of every layer."""
    layers: list[Any] = [block.get_submodule(name) for name in lora_targets(block, ends=ends)]
    return [rank * width for layer in layers for width in (layer.in_features, layer.out_features)]


def add_lora(model: nn.Module, targets: Sequence[str], rank: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Give the layers of these names an adapter of this rank (alpha = rank), and return its parameters, in `dtype`.

    Everything else is frozen. Works on the meta device too; inside of a FakeTensorMode peft does not.
    """
    peft = require("peft", "image")
    model.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    add: Any = getattr(model, "add_adapter", None)  # of diffusers' models, which then know that they have one
    if add:
        add(config)
    else:
        peft.inject_adapter_in_model(config, model)
    added = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in added:
        parameter.data = parameter.data.to(dtype)
    return added


def save_lora(pipeline_class: Any, folder: str | Path, transformer: nn.Module, adapter: str = "default") -> Path:
    """Write the transformer's adapter where the stock pipeline finds it; the file, whole or not at all.

    FLUX, SD3 and SANA: `pipeline.load_lora_weights(folder)`, rank and alpha included. The PixArt pipelines have no such
    method; theirs is peft's own format: `peft.PeftModel.from_pretrained(pipeline.transformer, folder)`.
    """
    peft = require("peft", "image")
    config = getattr(transformer, "peft_config", {}).get(adapter)
    if config is None:
        raise UserError(f"This {type(transformer).__name__} has no adapter {adapter!r}; add one before saving.")
    state = peft.get_peft_model_state_dict(transformer, adapter_name=adapter)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    folder = check_writable(folder)
    # in a folder beside the files, so that moving them there is one step each
    with partial_folder(folder) as beside:
        if hasattr(pipeline_class, "save_lora_weights"):
            pipeline_class.save_lora_weights(
                beside,
                transformer_lora_layers=state,
                transformer_lora_adapter_metadata=dict(_plain(config.to_dict())),
            )
        else:
            _save_peft(beside, state, config)
        written = sorted(beside.iterdir(), key=lambda path: path.suffix)  # the weights, .safetensors, go last
        for path in written:
            os.replace(path, folder / path.name)
    return folder / written[-1].name


def load_lora(pipeline: Any, folder: str | Path) -> None:
    """Put a saved adapter on a stock pipeline, in the way of its family."""
    if not any((Path(folder) / name).exists() for name in (WEIGHTS, PEFT_WEIGHTS)):
        raise UserError(f"{folder} holds no adapter ({WEIGHTS} or {PEFT_WEIGHTS}).")
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(folder))
    else:
        peft = require("peft", "image")
        pipeline.transformer = peft.PeftModel.from_pretrained(pipeline.transformer, str(folder))


def _save_peft(folder: Path, state: Mapping[str, Any], config: Any) -> None:
    from safetensors.torch import save_file

    save_file({PEFT_PREFIX + name: tensor for name, tensor in state.items()}, folder / PEFT_WEIGHTS, {"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(dict(_plain(config.to_dict())), indent=2, sort_keys=True))


def _plain(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A config that JSON can hold, its sets sorted: the same adapter gives the same file."""
    for name, value in config.items():
        yield name, sorted(value) if isinstance(value, set) else value
