"""A checkpoint on disk: its shards, the names of its tensors, and how it is rewritten, one shard at a time."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipwise.errors import UserError
from skipwise.exporting.keeping import Slices
from skipwise.files import read_json, write_atomically

# what transformers and diffusers call the weights: NAME.safetensors, or shards listed in NAME.safetensors.index.json
STEMS = ("model", "diffusion_pytorch_model")

# (name of the parameter in the loaded source model, its tensor) -> the tensor to write, of the same shape and dtype.
# Where loading fuses tensors (experts), several come under the name of the one that they become.
Transform = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor as a shard's header describes it."""

    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors of a folder: shard file -> key -> entry, in order. Weights are not read."""

    folder: Path
    stem: str
    shards: Mapping[str, Mapping[str, Entry]]
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by key."""
        return {key: entry for shard in self.shards.values() for key, entry in shard.items()}

    def file_of(self, key: str) -> str:
        """The shard that holds the tensor of this key."""
        return next(file for file, shard in self.shards.items() if key in shard)


@dataclass(frozen=True)
class Move:
    """Where one tensor goes: its key in the smaller checkpoint, its name in the whole source model, and what is left of
    it, where that is less than all.
    """

    key: str
    name: str
    slices: Slices | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What is written of the tensor."""
        return tensor if self.slices is None else self.slices.of(tensor)

    def size(self, entry: Entry) -> int:
        """Bytes that are written of it."""
        return entry.size if self.slices is None else self.slices.kept.share(entry.size)


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Find the shards of a folder and read their headers.

    Raises UserError when there are none, when one is missing, or when one lacks what the index says it has.
    """
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.exists():
            return Checkpoint(folder, stem, {single.name: _read_header(single)})
        if index.exists():
            return _read_shards(folder, stem, _read_index(index), name)
    names = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise UserError(f"{name} has neither {names} nor their index; rename its weights, or save the model again.")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path)
        return {"weight_map": dict(index["weight_map"]), "metadata": dict(index.get("metadata") or {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an index of shards: {error!r}; download it again.") from error


def _read_shards(folder: Path, stem: str, index: dict[str, Any], name: str) -> Checkpoint:
    files = list(dict.fromkeys(index["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of the {len(files)} shards that its index lists, such as {missing[0]}; "
            "download them first."
        )
    checkpoint = Checkpoint(folder, stem, {file: _read_header(folder / file) for file in files}, index)
    for key, file in index["weight_map"].items():
        if key not in checkpoint.shards[file]:
            raise UserError(f"{name}: {file} lacks {key}, which the index says it has; download both again.")
    return checkpoint


def _read_header(path: Path) -> dict[str, Entry]:
    with safe_open(path, "pt") as shard:  # checks the whole header against the file, or raises
        keys = list(shard.keys())
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {key: header[key]["data_offsets"] for key in keys}
    return {key: Entry(tuple(header[key]["shape"]), spans[key][1] - spans[key][0]) for key in keys}


def rewrite(checkpoint: Checkpoint, moves: Mapping[str, Move], target: Path, transform: Transform) -> None:
    """Write the tensors that have a move to the target folder, each shard of them from one shard of the source.

    At any time at most one shard is held in memory. Shards of which nothing is left are left out.
    """
    kept = {file: [key for key in shard if key in moves] for file, shard in checkpoint.shards.items()}
    kept = {file: keys for file, keys in kept.items() if keys}
    weight_map: dict[str, str] = {}
    totals = {"total_size": 0, "total_parameters": 0}
    for number, (file, keys) in enumerate(kept.items(), start=1):
        name = _shard_name(checkpoint.stem, number, len(kept))
        tensors, metadata = _read_shard(checkpoint.folder / file, {key: moves[key] for key in keys}, transform)
        _write_shard(tensors, target / name, metadata)
        weight_map |= dict.fromkeys(tensors, name)
        totals["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        totals["total_parameters"] += sum(tensor.numel() for tensor in tensors.values())
        del tensors  # before the next shard is read
    if len(kept) > 1:
        known = checkpoint.index["metadata"] | {"total_size": 0}
        content = {"metadata": known | {k: v for k, v in totals.items() if k in known}, "weight_map": weight_map}
        write_atomically(target / f"{checkpoint.stem}.safetensors.index.json", json.dumps(content, indent=2) + "\n")


def _shard_name(stem: str, number: int, total: int) -> str:
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def _read_shard(
    path: Path, moves: Mapping[str, Move], transform: Transform
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    with safe_open(path, "pt") as shard:
        tensors = {move.key: move.of(transform(move.name, shard.get_tensor(key))) for key, move in moves.items()}
        return tensors, shard.metadata()


def _write_shard(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    partial = path.with_suffix(".partial")
    try:
        save_file(dict(tensors), partial, metadata)
        partial.chmod(0o644)  # safetensors are written private, a checkpoint may be shared
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write {path.name}: {error}. Choose a folder with enough space.") from error
