"""The config.json of the smaller model, found by trial and proved by building it.

Nothing here knows a config by name. Whichever number sets a stack's length is the one to lower. The result is held
against the only definition of what a plan means, the source model under `skip`: the model that the new config builds
must have the same modules, with the same settings and the same shapes, block by block.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from skipwise.blocks import Contract, find_contract, layer_configs, layer_list_names, module_list
from skipwise.errors import UserError
from skipwise.kept import KEPT_STATE, running_modules
from skipwise.per_layer import cut_setting
from skipwise.plan import Plan
from skipwise.skipping import Cut, cutting
from skipwise.wrapping import class_of

Config = dict[str, Any]
Build = Callable[[Config], nn.Module]
Place = tuple[tuple[str, ...], str]  # the path to a section of a config, and a key in it

# some configs of language models give the number of layers twice, by two of these names
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# what nothing reads, or what a forward sets: a block's number, the source of a module's own setting, a recurrent state,
# the first layer that shares keys and values where none does (with shared ones an export is refused before)
NEVER_READ = {
    ("ZImageTransformerBlock", "layer_id"),
    ("GPTNeoXJapaneseLayer", "layer_number"),
    ("GPTNeoAttention", "attention_layers"),
    ("RecurrentGemmaRglru", "recurrent_states"),
    ("RecurrentGemmaRecurrentBlock", "conv1d_state"),
    ("RwkvModel", "layers_are_rescaled"),
    ("XLNetModel", "n_layer"),
    ("Gemma4TextModel", "first_kv_shared_layer_idx"),
    ("Gemma4UnifiedTextModel", "first_kv_shared_layer_idx"),
}


@dataclass(frozen=True)
class Kept:
    """The blocks of one stack that are kept, by their old numbers."""

    stack: str
    length: int
    blocks: tuple[int, ...]

    @property
    def skipped(self) -> list[int]:
        """The numbers of the others."""
        return [number for number in range(self.length) if number not in self.blocks]

    @property
    def is_first(self) -> bool:
        """Whether these are the first blocks, each of which keeps its number."""
        return self.blocks == tuple(range(len(self.blocks)))

    def of(self, key: str, value: Any) -> Any:
        """What a setting of the config is after the cut: unchanged unless it is about single blocks."""
        return cut_setting(key, value, self.length, self.blocks)


def kept_of(plan: Plan) -> list[Kept]:
    """What a static plan keeps of each stack that it takes blocks from."""
    skipped = {stack: numbers for stack, numbers in plan.phases[0].skip.items() if numbers}
    lengths = plan.model.stacks
    return [
        Kept(stack, lengths[stack], tuple(i for i in range(lengths[stack]) if i not in numbers))
        for stack, numbers in skipped.items()
    ]


def cut_config(config: Config, model: nn.Module, plan: Plan, build: Build) -> tuple[Config, nn.Module]:
    """(config.json of the smaller model, that model on the meta device).

    config: of the source; model: its skeleton. Raises UserError when no config describes the kept blocks exactly: the
    architecture then makes a block by its number, in a way that its config cannot undo.
    """
    # nothing may point to the repository's own code, which is not carried over
    smaller = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        return _cut(smaller, {}, model, plan, build)
    except UserError:  # the config may leave per-layer lists to its class, which makes them from the number of layers
        return _cut(smaller, resolved_config(model), model, plan, build)


def _cut(config: Config, defaults: Config, model: nn.Module, plan: Plan, build: Build) -> tuple[Config, nn.Module]:
    for kept in kept_of(plan):
        config = _shorten(config, defaults, model, kept, plan, build)
    twin = build(config)
    _check_twin(model, twin, plan)
    return config, twin


def resolved_config(model: nn.Module) -> Config:
    """The model's config with all that its file leaves out."""
    config: Any = model.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _shorten(config: Config, defaults: Config, model: nn.Module, kept: Kept, plan: Plan, build: Build) -> Config:
    """The config with one stack cut: by the first number that makes this stack shorter and no other too short."""
    before, final = _lengths(build(config), plan), dict(plan.model.stacks)
    final |= {each.stack: len(each.blocks) for each in kept_of(plan)}
    if before[kept.stack] == final[kept.stack]:  # shortened with another one: a number may set the length of two
        return config
    for path, key in dict.fromkeys([*_depths(config, kept.length), *_depths(resolved_config(model), kept.length)]):
        candidate = _lowered(config, defaults, kept, path, key)
        try:
            found = _lengths(build(candidate), plan)
        except Exception:  # configs check themselves, each in its own way: this number is another one
            continue
        if found[kept.stack] == final[kept.stack] and all(found[name] in (before[name], final[name]) for name in found):
            return _without_old_depth(candidate, kept, path)
    raise UserError(
        f"{plan.model.architecture} cannot be exported: no number in its config.json sets the length of {kept.stack} "
        f"to {len(kept.blocks)} and no other; use the plan with `skip` instead."
    )


def _lengths(model: nn.Module, plan: Plan) -> dict[str, int]:
    return {name: len(module_list(model, name)) for name in plan.model.stacks}


def _depths(config: Mapping[str, Any], length: int, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """The places of all numbers that may be this stack's length, and of lists whose lengths may be it (Nemotron-H)."""
    for key, value in config.items():
        named = any(word in str(key) for word in ("layer", "block", "depth"))
        if isinstance(value, dict):
            yield from _depths(value, length, (*path, key))
        elif named and ((type(value) is int and value == length) or (isinstance(value, list) and len(value) == length)):
            yield path, key


def _lowered(config: Config, defaults: Config, kept: Kept, path: tuple[str, ...], key: str) -> Config:
    """The config with this number lowered, and with all in its section that is about single blocks cut."""
    candidate = copy.deepcopy(config)
    section = _section(candidate, path)
    made = {name: value for name, value in _section(defaults, path).items() if isinstance(value, list | tuple)}
    made = {name: value for name, value in made.items() if "layer" in name and not name.startswith("_")}
    section |= {name: kept.of(name, value) for name, value in (made | section).items()}
    if not isinstance(section.get(key), list):  # a list is cut already
        section[key] = len(kept.blocks)
    return candidate


def _without_old_depth(config: Config, kept: Kept, path: tuple[str, ...]) -> Config:
    """The config with the stack's length right under every name; diffusers' names are those of different stacks."""
    section = _section(config, path)
    if "_class_name" not in config:
        section |= {name: len(kept.blocks) for name in DEPTHS if section.get(name) == kept.length}
    return config


def _section(config: Config, path: tuple[str, ...]) -> Config:
    for key in path:
        config = config.setdefault(key, {})
    return config


def _check_twin(model: nn.Module, twin: nn.Module, plan: Plan) -> None:
    """Raise UserError, with the first difference, unless the twin is the model under the plan."""
    with cutting(model, _counted_anew(find_contract(model)), _cut_of(plan)):
        wanted = _facts(model, plan)
    found = _facts(twin, plan)
    _forget_gone_kinds(wanted, found)
    _count_what_runs(wanted, found, plan)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            what = _difference(wanted.get(name, {}), found.get(name, {}))
            last = "last block, " if _is_in_last_block(name, plan) else ""
            raise UserError(
                f"{plan.model.architecture} cannot be exported with this plan: built from a smaller config, its "
                f"{last}{name} would have {what}; skip other blocks, or use the plan with `skip`."
            )


def _counted_anew(contract: Contract) -> Contract:
    """The contract with no block's place kept, as a checkpoint keeps none."""
    stacks = {name: replace(stack, in_place=False) for name, stack in contract.stacks.items()}
    return replace(contract, stacks=stacks)


def _cut_of(plan: Plan) -> Cut:
    return Cut({kept.stack: frozenset(kept.skipped) for kept in kept_of(plan)})


def _is_in_last_block(name: str, plan: Plan) -> bool:
    return any(f"{name}.".startswith(f"{kept.stack}.{len(kept.blocks) - 1}.") for kept in kept_of(plan))


def _forget_gone_kinds(wanted: dict[str, dict[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Drop, in place, a rotary embedding's tables for kinds of layers of which none is left: nothing reads them."""
    for name, facts in wanted.items():
        kinds, left = facts.get("layer_types", []), found.get(name, {}).get("layer_types", [])
        gone = tuple(f"{kind}_" for kind in kinds if kind not in left)
        if "RotaryEmbedding" in facts.get("class", "") and gone and left:
            wanted[name] = {key: value for key, value in facts.items() if not key.startswith(gone)}
            wanted[name]["layer_types"] = left


def _count_what_runs(wanted: dict[str, dict[str, Any]], found: Mapping[str, Mapping[str, Any]], plan: Plan) -> None:
    """Set, in place, what the owner of a list keeps beside it of the number of blocks (CTRL, DistilBERT, XLNet), and
    lists of one entry a block (LongCat-Image, Zamba2): where a forward looks those up by number, blocks depend on it.
    """
    for kept in kept_of(plan):
        name = kept.stack.rpartition(".")[0] or "model"
        owner, cut = wanted[name], found.get(name, {})
        owner |= {key: len(kept.blocks) for key in DEPTHS if owner.get(key) == kept.length}
        for key, value in owner.items():
            listed = isinstance(value, list | tuple) and len(value) == kept.length
            if listed and cut.get(key) == type(value)(value[number] for number in kept.blocks):
                owner[key] = cut[key]


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    absent = object()
    key = next(key for key in [*wanted, *found] if wanted.get(key, absent) != found.get(key, absent))
    return f"{key} {found.get(key, 'missing')!r} instead of {wanted.get(key, 'missing')!r}"


def _facts(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """All that a config decides about a model: class, settings and shapes of every module, per-layer lists."""
    facts = {name or "model": _facts_of(module) for name, module in running_modules(model)}
    for kept in kept_of(plan):
        for number, config in enumerate(layer_configs(model, kept.stack)):
            lists = {key: list(getattr(config, key)) for key in layer_list_names(config, len(kept.blocks))}
            overrides = getattr(config, "_heterogeneity_spec", None)
            if lists or overrides is not None:  # whether a config without either counts these blocks says nothing
                facts[f"config {number} of {kept.stack}"] = lists | {"per-layer overrides": overrides}
    return facts


def _facts_of(module: nn.Module) -> dict[str, Any]:
    kind = class_of(module).__name__
    ignored = {"training", *KEPT_STATE, *(name for owner, name in NEVER_READ if owner == kind)}
    settings = {key: value for key, value in vars(module).items() if key not in ignored and _is_plain(value)}
    tensors = {**module._parameters, **module._buffers}
    shapes = {f"{key} of shape": tuple(tensor.shape) for key, tensor in tensors.items() if tensor is not None}
    return {"class": kind, **settings, **shapes}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
