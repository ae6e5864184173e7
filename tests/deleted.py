"""Oracle for the laws: models from which blocks are really deleted, made without skipwise's skipping.

A transformers model is built anew from a config with fewer layers, and given the remaining blocks' weights under their
new numbers. Other models are copied and the list entries are deleted. Chroma cuts its modulation by block number and
DiT embeds the timestep with block 0, so that deleting entries would hand blocks what belongs to others; there the
branches' last projections are zeroed instead, which makes a block add exactly nothing.
"""

import copy
import re
from typing import Any

import torch
from torch import nn

PER_LAYER = {"layer_types", "no_rope_layers"}


def deleted(model: nn.Module, stack: str, numbers: set[int]) -> nn.Module:
    """A model of the same class and weights without these blocks of the stack."""
    name = type(model).__name__
    if name in ("ChromaTransformer2DModel", "DiTTransformer2DModel"):
        return _silenced(model, stack, numbers)
    # ModernBERT's first layer lacks a norm, so that no config describes the model without it; MDLM keeps no cache
    if hasattr(model, "base_model") and name not in ("ModernBertForMaskedLM", "MDLM"):
        return _rebuilt(model, numbers)
    return _cut(model, stack, numbers)


def _cut(model: nn.Module, stack: str, numbers: set[int]) -> nn.Module:
    other = copy.deepcopy(model)
    blocks = other.get_submodule(stack)
    for number in sorted(numbers, reverse=True):
        del blocks[number]
    return other


def _silenced(model: nn.Module, stack: str, numbers: set[int]) -> nn.Module:
    other = copy.deepcopy(model)
    ends = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2", "proj_out", "attn1.to_out.0")
    with torch.no_grad():
        for number in numbers:
            for name, module in other.get_submodule(f"{stack}.{number}").named_modules():
                if name in ends:
                    module.weight.zero_()
                    module.bias.zero_()
    return other


def _rebuilt(model: nn.Module, numbers: set[int]) -> nn.Module:
    settings = model.config.to_dict()
    text = settings.get("text_config", settings)
    depth = "n_layer" if "n_layer" in text else "num_hidden_layers"
    kept = [i for i in range(text[depth]) if i not in numbers]
    for key in PER_LAYER & text.keys():
        text[key] = text[key] and [text[key][i] for i in kept]
    if "per_layer_config" in text:
        overrides = text["per_layer_config"]
        text["per_layer_config"] = {str(n): overrides[str(i)] for n, i in enumerate(kept) if str(i) in overrides}
    text[depth] = len(kept)
    config = type(model.config).from_dict(settings)
    other = type(model)(config).eval()
    new = {old: i for i, old in enumerate(kept)}
    weights: dict[str, Any] = {}
    for key, tensor in model.state_dict().items():
        found = re.match(r"(.*\.(?:layers|h|layer)\.)(\d+)(\..*)", key)
        vision = "vision" in key
        if not found or vision:
            weights[key] = tensor
        elif int(found[2]) in new:
            weights[f"{found[1]}{new[int(found[2])]}{found[3]}"] = tensor
    other.load_state_dict(weights, strict=True)
    return other
