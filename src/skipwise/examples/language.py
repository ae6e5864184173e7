"""What a language model takes: token ids. A vision-language model is given the text alone."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from skipwise.examples.size import Size
from skipwise.examples.tensors import Tensors
from skipwise.wrapping import class_of

FEW = 8  # words, where a config does not say how many there are


def language_inputs(model: nn.Module, size: Size, new: Tensors) -> dict[str, Any]:
    """Keyword arguments for one forward of a model that takes `input_ids`."""
    accepted = inspect.signature(class_of(model).forward).parameters
    config: Any = model.config
    vocabulary = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", FEW)
    kwargs: dict[str, Any] = {"input_ids": new.tokens(size.tokens, vocabulary)}
    if "decoder_input_ids" in accepted:  # encoder-decoder: a prompt and, of another length, the canvas
        kwargs = {"input_ids": new.tokens(size.text, vocabulary), "decoder_input_ids": kwargs["input_ids"]}
    kwargs |= {"use_cache": False} if "use_cache" in accepted else {}
    return on_meta(model, kwargs) if new.device.type == "meta" else kwargs


def on_meta(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """A real example for the model on the meta device: states on meta, what a forward may read is kept."""
    moved = tree_map_only(
        Tensor,
        lambda tensor: tensor.to("meta") if tensor.is_floating_point() and tensor.ndim > 2 else tensor,
        dict(example),
    )
    ids = moved.get("input_ids")
    if ids is not None and "position_ids" in inspect.signature(class_of(model).forward).parameters:
        # transformers reads the positions, to see whether sequences are packed
        moved.setdefault("position_ids", torch.arange(ids.shape[1])[None])
    return moved
