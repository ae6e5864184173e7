"""Which tensor of a checkpoint belongs to which block, and what its key is in the smaller checkpoint.

A checkpoint's keys need not be the loaded module's names: official layouts have their own, older ones lack the outer
prefix, and transformers fuses experts while it loads. transformers' own renaming says what a key becomes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from skipwise.errors import UserError
from skipwise.exporting.checkpoint import Checkpoint, Move
from skipwise.exporting.keeping import Kept, slices


@dataclass(frozen=True)
class Loaded:
    """What a key becomes when the model loads it: a parameter's name, and whether its tensor is converted."""

    name: str
    converted: bool = False


Reader = Callable[[str], Loaded]


def key_reader(model: nn.Module, mapping: Mapping[str, str] | None) -> Reader:
    """How `from_pretrained` reads a key. mapping: that of a native module (regular expression -> replacement)."""
    if not isinstance(model, PreTrainedModel):
        return Loaded  # diffusers: keys are names
    transforms = get_model_conversion_mapping(model, dict(mapping) if mapping else None)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix, names = model.base_model_prefix, model.state_dict()

    def read(key: str) -> Loaded:
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            return Loaded(key)
        return Loaded(name, pattern is not None)

    return read


def plan_moves(
    checkpoint: Checkpoint, model: nn.Module, twin: nn.Module, kept: Sequence[Kept], mapping: Mapping[str, str] | None
) -> dict[str, Move]:
    """Old key -> move for every tensor that is kept.

    model: the source's skeleton; twin: the smaller model's. What neither has a place for (buffers that old checkpoints
    carry along) is left out. Raises UserError unless the moved keys are exactly those of the smaller model.
    """
    read, read_twin = key_reader(model, mapping), key_reader(twin, mapping)
    names, twin_names = model.state_dict(), twin.state_dict()
    moves: dict[str, Move] = {}
    for key, entry in checkpoint.entries.items():
        loaded = read(key)
        if loaded.name not in names:
            continue
        name = _renumber(loaded.name, kept)
        if name is None:
            continue
        shape = tuple(twin_names[name].shape) if name in twin_names else ()
        whole = name == loaded.name and not loaded.converted and entry.shape == tuple(names[name].shape)
        left = slices(entry.shape, shape, kept) if whole else None
        moves[key] = Move(_new_key(key, name, loaded.name, kept, read_twin), loaded.name, left)
        if name not in twin_names or not (loaded.converted or left or entry.shape == shape):
            raise UserError(f"{key} of the checkpoint does not fit its config.json; is that of another model?")
    _check_complete(twin, [read_twin(move.key) for move in moves.values()])
    return moves


def _renumber(name: str, kept: Iterable[Kept]) -> str | None:
    """A module's name in the smaller model; None for a part of a skipped block."""
    for one in kept:
        found = re.match(rf"{re.escape(one.stack)}\.(\d+)(\..*)", name)
        if found:
            old = int(found[1])
            return f"{one.stack}.{one.blocks.index(old)}{found[2]}" if old in one.blocks else None
    return name


def _new_key(key: str, name: str, old_name: str, kept: Sequence[Kept], read_twin: Reader) -> str:
    """The key that loads as `name`: with the block's number changed, wherever in the key that is."""
    if name == old_name:
        return key
    (old, new), *_ = [(a, b) for a, b in zip(old_name.split("."), name.split("."), strict=True) if a != b]
    parts = key.split(".")
    for place, part in enumerate(parts):
        candidate = ".".join([*parts[:place], new, *parts[place + 1 :]])
        if part == old and read_twin(candidate).name == name:
            return candidate
    raise UserError(f"{key} of the checkpoint cannot be renumbered: no key in its manner loads as {name}.")


def _check_complete(twin: nn.Module, loaded: Iterable[Loaded]) -> None:
    """Every parameter must be filled, by a tensor of its own or by one that it is tied to."""
    loaded = list(loaded)
    if any(each.converted for each in loaded):  # one key may fill several parameters
        return
    tensors, found = twin.state_dict(keep_vars=True), {each.name for each in loaded}
    filled = {id(tensors[name]) for name in found}
    computed = getattr(twin, "_keys_to_ignore_on_save", None) or ()  # tables that no checkpoint has (Marian)
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled and name not in computed]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"The checkpoint lacks {missing[0]}{more}; is its config.json that of another model?")
