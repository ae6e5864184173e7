"""Whether a smaller model is the source under its plan: by all that its config decides, module by module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from skipwise.blocks import Contract, find_contract, layer_configs, layer_list_names
from skipwise.cuts import Cut, cutting
from skipwise.errors import UserError
from skipwise.exporting.keeping import Kept, is_share, kept_of, slices
from skipwise.kept import KEPT_STATE, running_modules
from skipwise.plan import Plan
from skipwise.wrapping import class_of

OF_SHAPE = " of shape"
Facts = dict[str, dict[str, Any]]  # name of a module -> its settings and the shapes of its tensors

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
class Difference:
    """Something that a module of the smaller model has otherwise than the source under the plan."""

    module: str
    key: str
    found: Any
    wanted: Any

    def refusal(self, plan: Plan) -> UserError:
        """One line that says it."""
        last = "last block, " if _is_in_last_block(self.module, plan) else ""
        return UserError(
            f"{plan.model.architecture} cannot be exported with this plan: built from a smaller config, its "
            f"{last}{self.module} would have {self.key} {self.found!r} instead of {self.wanted!r}; skip other blocks, "
            "or use the plan with `skip`."
        )


@dataclass(frozen=True)
class Comparison:
    """difference: the first one, None when there is none. certain: whether nothing was let pass that only running the
    two can show.
    """

    difference: Difference | None
    certain: bool


def compare(model: nn.Module, twin: nn.Module, plan: Plan) -> Comparison:
    """What the twin, built from a smaller config, has otherwise than the model under the plan."""
    with cutting(model, _counted_anew(find_contract(model)), _cut_of(plan)):
        wanted = _facts(model, plan)
    found = _facts(twin, plan)
    _forget_gone_kinds(wanted, found)
    _count_what_runs(wanted, found, plan)
    unsure = [_count_in_blocks(wanted, found, plan), _cut_slices(wanted, found, plan)]
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            return Comparison(_difference(name, wanted.get(name, {}), found.get(name, {})), not any(unsure))
    return Comparison(None, not any(unsure))


def _counted_anew(contract: Contract) -> Contract:
    """The contract with no block's place kept, as a checkpoint keeps none."""
    stacks = {name: replace(stack, in_place=False) for name, stack in contract.stacks.items()}
    return replace(contract, stacks=stacks)


def _cut_of(plan: Plan) -> Cut:
    return Cut({kept.stack: frozenset(kept.skipped) for kept in kept_of(plan)})


def _is_in_last_block(name: str, plan: Plan) -> bool:
    return any(f"{name}.".startswith(f"{kept.stack}.{len(kept.blocks) - 1}.") for kept in kept_of(plan))


def _forget_gone_kinds(wanted: Facts, found: Facts) -> None:
    """Drop, in place, a rotary embedding's tables for kinds of layers of which none is left: nothing reads them."""
    for name, facts in wanted.items():
        kinds, left = facts.get("layer_types", []), found.get(name, {}).get("layer_types", [])
        gone = tuple(f"{kind}_" for kind in kinds if kind not in left)
        if "RotaryEmbedding" in facts.get("class", "") and gone and left:
            wanted[name] = {key: value for key, value in facts.items() if not key.startswith(gone)}
            wanted[name]["layer_types"] = left


def _count_what_runs(wanted: Facts, found: Facts, plan: Plan) -> None:
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


def _count_in_blocks(wanted: Facts, found: Facts, plan: Plan) -> bool:
    """Set, in place, the number of all blocks where a block remembers it (MiniMax), and say whether any does."""
    any_does = False
    for kept in kept_of(plan):
        before, after = kept.length, len(kept.blocks)
        for name in (name for name in wanted if name.startswith(f"{kept.stack}.")):
            pairs = [(key, wanted[name].get(key), found.get(name, {}).get(key)) for key in DEPTHS]
            counts = [key for key, old, new in pairs if (old, new) == (before, after)]
            wanted[name] |= dict.fromkeys(counts, after)
            any_does |= bool(counts)
    return any_does


def _cut_slices(wanted: Facts, found: Facts, plan: Plan) -> bool:
    """Take over, in place, modules outside of the blocks whose tensors have a slice for each; say whether any do."""
    kept = kept_of(plan)
    outside = [name for name in wanted if not any(f"{name}.".startswith(f"{one.stack}.") for one in kept)]
    sized = [name for name in outside if _differs_by_slices(wanted[name], found.get(name, {}), kept)]
    holders = [name for name in sized if any(key.endswith(OF_SHAPE) for key in _differing(wanted[name], found[name]))]
    # a module may also note the size of what is inside of it
    cut = [name for name in sized if any(f"{holder}.".startswith(f"{name}.") for holder in holders)]
    wanted |= {name: found[name] for name in cut}
    return bool(cut)


def _differs_by_slices(wanted: Mapping[str, Any], found: Mapping[str, Any], kept: Sequence[Kept]) -> bool:
    """Whether a module differs, and in nothing but sizes that are as much for each block as they were."""
    differing = _differing(wanted, found)
    return bool(differing) and all(_is_slice(wanted.get(key), found.get(key), kept) for key in differing)


def _differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    absent = object()
    return [key for key in {**wanted, **found} if wanted.get(key, absent) != found.get(key, absent)]


def _is_slice(old: Any, new: Any, kept: Sequence[Kept]) -> bool:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return slices(old, new, kept) is not None
    return type(old) is type(new) is int and any(is_share(old, new, one) for one in kept)


def _difference(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Difference:
    key = _differing(wanted, found)[0]
    return Difference(name, key, found.get(key, "missing"), wanted.get(key, "missing"))


def _facts(model: nn.Module, plan: Plan) -> Facts:
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
    shapes = {f"{key}{OF_SHAPE}": tuple(tensor.shape) for key, tensor in tensors.items() if tensor is not None}
    return {"class": kind, **settings, **shapes}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
