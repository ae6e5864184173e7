"""Models without some of their blocks, made by hand: nothing here comes from skipwise but the name of the list.

There are two ways, and for a model that does not mind a block's number they are the same. `removed` deletes the blocks
from a copy's list, gives the others their new places in the cache and cuts the config's per-layer lists. `bypassed`
leaves every block where it is and lets those hand on what they were given.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")  # what blocks call their number
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def removed(model: nn.Module, stack: str, numbers: set[int], *coupled: str) -> nn.Module:
    """A copy of the model whose list `stack`, and those coupled with it, lack the blocks of these numbers."""
    other = copy.deepcopy(model)
    configs = {id(config): config for name in (stack, *coupled) for config in _configs(other, name)}
    for name in (stack, *coupled):
        length, kept = _delete(other.get_submodule(name), numbers)
    for config in configs.values():
        _cut_lists(config, length, kept)
    return other


def _delete(blocks: Any, numbers: set[int]) -> tuple[int, list[int]]:
    """(How many blocks there were, the numbers of those that are left)."""
    length = len(blocks)
    kept = [number for number in range(length) if number not in numbers]
    for number in sorted(numbers, reverse=True):
        del blocks[number]
    for new, old in enumerate(kept):
        for module in blocks[new].modules():
            for name in PLACES:
                if getattr(module, name, None) == old:
                    setattr(module, name, new)
    return length, kept


def _configs(model: nn.Module, stack: str) -> list[Any]:
    """The configs of the list's owner and of its blocks, and the text's part of each."""
    modules = [model.get_submodule(stack.rpartition(".")[0]), *model.get_submodule(stack).modules()]
    found = [module.config for module in modules if hasattr(module, "config")]
    found += [config.get_text_config() for config in found if hasattr(config, "get_text_config")]
    return list({id(config): config for config in found}.values())


def _cut_lists(config: Any, length: int, kept: list[int]) -> None:
    if getattr(config, "num_hidden_layers", None) != length:
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == length and not name.startswith("_"):
            setattr(config, name, type(value)(value[number] for number in kept))
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        spec = copy.copy(spec)
        overrides = {
            new: spec.per_layer_overrides[old] for new, old in enumerate(kept) if old in spec.per_layer_overrides
        }
        object.__setattr__(spec, "per_layer_overrides", overrides)
        config._heterogeneity_spec = spec
    for name in DEPTHS:
        if vars(config).get(name) == length:
            setattr(config, name, len(kept))


@contextmanager
def bypassed(model: nn.Module, stack: str, numbers: set[int], *coupled: str) -> Iterator[nn.Module]:
    """The model itself, with these blocks in their places handing on what they were given."""
    blocks = [model.get_submodule(name)[number] for name in (stack, *coupled) for number in sorted(numbers)]
    try:
        for block in blocks:
            block.forward = _handing_on(block)
        yield model
    finally:
        for block in blocks:
            del block.forward


def _handing_on(block: nn.Module) -> Any:
    """A forward that returns, in the place of each tensor, the first argument of the same shape."""
    forward, signature = type(block).forward.__get__(block), inspect.signature(type(block).forward)

    def handed(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(block, *args, **kwargs).arguments)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        result = forward(*args, **kwargs)
        if isinstance(result, Tensor):
            return _like(result, tensors)
        streams = [_like(value, tensors) if isinstance(value, Tensor) else value for value in result]
        handed_on = [id(stream) for stream in streams if isinstance(stream, Tensor)]
        if len(set(handed_on)) < len(handed_on):
            raise LookupError("two results have the shape of one argument")
        return type(result)(streams)

    return handed


def _like(result: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    for value in tensors.values():
        if value.shape == result.shape and value.dtype == result.dtype:
            return value
    raise LookupError(f"no argument has the shape {tuple(result.shape)} of what the block returns")


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What one forward gives, as one flat tensor: the logits, the last hidden state or the sample."""
    return _flat(_main(model(**inputs)))


def _main(result: Any) -> Any:
    for name in ("logits", "prediction_logits", "last_hidden_state", "sample"):
        if not isinstance(result, tuple) and getattr(result, name, None) is not None:
            return getattr(result, name)
    return result if isinstance(result, Tensor) else result[0]


def _flat(value: Any) -> Tensor:
    return value.float().flatten() if isinstance(value, Tensor) else torch.cat([_flat(item) for item in value])
