"""What a model's config says of single layers, and what is left of it when layers are taken out.

A config speaks of layers by a list or a string with an entry for each (`layer_types`), by a list or dictionary of layer
numbers (Bamba's `attn_layer_indices`), by a count of the first ones (`first_k_dense_replace`), by runs (GPT-Neo's
`attention_types`), and by a rule from which a property computes a list (Jamba's `attn_layer_period`).
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from skipwise.errors import UserError

# how many of the first layers are of one kind: those that are left of them are the first again
FIRST_LAYERS = (
    "max_window_layers",
    "first_k_dense_replace",
    "num_dense_layers",
    "num_first_full_attention_layers",
    "moe_layer_start_index",
)
# the number of the last layer of a kind
LAST_LAYER = ("moe_layer_end_index",)
# [[kinds, times], ...]: the kinds of layers, repeated
RUNS = ("attention_types",)
# the kinds of the first layers, repeated
CYCLES = ("block_types",)
# a letter for each layer
LETTERS = ("hybrid_override_pattern",)


def cut_setting(key: str, value: Any, length: int, kept: Sequence[int]) -> Any:
    """What a setting of a config is when only `kept` of `length` layers are left: itself unless it is about layers."""
    if key in FIRST_LAYERS and type(value) is int:
        return sum(number < value for number in kept)
    if key in LAST_LAYER and type(value) is int and value >= 0:  # -1 is the last one of any length
        return sum(number <= value for number in kept) - 1
    if key in RUNS and _expanded(value, length):
        kinds = _expanded(value, length)
        return [[[kinds[old] for old in kept], 1]]
    if key in CYCLES and isinstance(value, list | tuple) and value:
        return type(value)(value[old % len(value)] for old in kept)
    if key in LETTERS and isinstance(value, str) and len(value) == length:
        return "".join(value[old] for old in kept)
    if "layer" not in key:
        return value
    new = {old: number for number, old in enumerate(kept)}
    if isinstance(value, dict) and value and all(str(number).isdigit() for number in value):
        return {type(old)(new[int(old)]): entry for old, entry in value.items() if int(old) in new}
    if not isinstance(value, list | tuple):
        return value
    if names_layers(value, length):
        return type(value)(new[old] for old in value if old in new)
    return type(value)(value[old] for old in kept) if len(value) == length else value


def names_layers(values: Sequence[Any], length: int) -> bool:
    """Whether a list gives the numbers of some layers (SD3's `dual_attention_layers`) and not an entry for each."""
    if not all(type(value) is int and 0 <= value < length for value in values):
        return False
    if len(values) == length:  # all numbers in order; [0, 1] is rather a flag for each of two layers
        return length > 2 and list(values) == list(range(length))
    return len(set(values)) == len(values)


def _expanded(value: Any, length: int) -> list[Any]:
    """The kinds of all layers of [[kinds, times], ...]; nothing when these are not the kinds of `length` layers."""
    try:
        kinds = [kind for names, times in value for kind in list(names) * times]
    except (TypeError, ValueError):
        return []
    return kinds if len(kinds) == length else []


def layer_list_names(config: Any, length: int) -> list[str]:
    """The config's attributes that hold one entry a layer, such as `layer_types` or `no_rope_layers`."""
    return [
        key
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, list | tuple) and len(value) == length
    ]


def computed_lists(config: Any, length: int) -> Mapping[str, list[Any]]:
    """The lists with an entry for each layer that properties of this config compute (Jamba's `layers_block_type`)."""
    found = {}
    for name in dir(type(config)):
        if isinstance(getattr(type(config), name, None), property):
            value = getattr(config, name, None)
            if isinstance(value, list) and len(value) == length and all(_is_plain(entry) for entry in value):
                found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def with_lists(config_class: type, lists: Mapping[str, list[Any]]) -> type:
    """A subclass whose properties of these names give these lists.

    For layers that the rule of the config itself cannot describe, such as those left of a period.
    """
    properties = {name: _constant(values) for name, values in lists.items()}
    return type(config_class.__name__, (config_class,), {"__module__": config_class.__module__, **properties})


def _constant(values: list[Any]) -> property:
    return property(lambda _: list(values))


def changed_settings(config: Any, length: int, kept: Sequence[int]) -> dict[str, Any]:
    """The attributes of a transformers config that change when only `kept` of its `length` layers are left.

    Raises UserError for a config that does not let layers be left out.
    """
    if getattr(config, "rescale_every", 0) and list(kept) != list(range(len(kept))):
        raise UserError(
            f"{type(config).__name__} scales every block's weights by its number (rescale_every is "
            f"{config.rescale_every}), so that only the last can be left out; set rescale_every to 0 in config.json."
        )
    given = vars(config)
    changed = {name: cut_setting(name, value, length, kept) for name, value in given.items()}
    changed = {name: value for name, value in changed.items() if value is not given[name]}
    spec = getattr(config, "_heterogeneity_spec", None)  # transformers' overrides by layer number (DiffusionGemma)
    if spec is not None:
        overrides = {
            new: spec.per_layer_overrides[old] for new, old in enumerate(kept) if old in spec.per_layer_overrides
        }
        changed["_heterogeneity_spec"] = replace(spec, per_layer_overrides=overrides)
    return changed | {_depth(config, length): len(kept)}


def _depth(config: Any, length: int) -> str:
    """The setting that says how many layers there are, or, where that refuses to be set (ProphetNet), its source."""
    for name in ("num_hidden_layers", *(name for name, value in vars(config).items() if value == length)):
        other = copy.copy(config)
        try:
            setattr(other, name, length - 1)
        except NotImplementedError:
            continue
        if name == "num_hidden_layers" or other.num_hidden_layers == length - 1:
            return name
    raise UserError(f"{type(config).__name__} takes no other number of layers, so that no block can be left out.")


def names_of_layers(config: Any, length: int) -> set[str]:
    """The attributes of a config that speak of single layers, which change when one of `length` layers is left out."""
    try:
        changed = changed_settings(config, length, range(length - 1))
    except UserError:  # said when blocks are left out
        changed = {}
    names = {*changed, *computed_lists(config, length)}
    aliases = getattr(config, "attribute_map", {})
    return names | {alias for alias, name in aliases.items() if name in names}


def check_shared_keys(stack: str, blocks: Iterable[nn.Module], numbers: Collection[int]) -> None:
    """Raise UserError when a skipped block makes the keys and values that kept blocks take from it (Gemma3n)."""
    makers: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    for number, block in enumerate(blocks):
        module: Any
        for module in block.modules():
            if number in numbers and getattr(module, "store_full_length_kv", False):
                makers[module.layer_type] = number
            elif number not in numbers and getattr(module, "is_kv_shared_layer", False):
                users.setdefault(module.layer_type, []).append(number)
    for kind in makers.keys() & users.keys():
        raise UserError(
            f"Later blocks ({', '.join(map(str, users[kind]))}) use the keys and values of block {makers[kind]} of "
            f"{stack}; skip those too, or keep it."
        )
