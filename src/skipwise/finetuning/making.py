"""Records for a training: a pool that is made beforehand and stored, or each batch's as it comes."""

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipwise.errors import UserError
from skipwise.finetuning.dataflow import Shapes
from skipwise.finetuning.hollow import Record
from skipwise.finetuning.residuals import DrawKey, ResidualStore, joined, rounded
from skipwise.finetuning.runs import Run
from skipwise.finetuning.shards import Device, Weights
from skipwise.finetuning.streaming import Sample, make_records, shapes_of

HOST = 4 << 30  # bytes
HEAD = 4096, 256  # bytes of a file that a record takes at most besides its tensors, and each of its tensors
SampleOf = Callable[[DrawKey], Sample]  # keyword arguments of one forward with a batch of 1, on the host


@dataclass(frozen=True)
class StoreSize:
    """How large a store becomes. record_bytes: of all tensors of one record, exactly; tensors: their number."""

    draws: int
    record_bytes: int
    tensors: int

    @property
    def bytes(self) -> int:
        """Of the tensors of all records."""
        return self.draws * self.record_bytes

    def __str__(self) -> str:
        return f"{self.draws} draws of {self.record_bytes / 2**20:.2f} MiB, {self.bytes / 2**30:.2f} GiB in all"

    def check(self, folder: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> None:
        """Raise UserError when the folder's disk has less space than that."""
        free = usage(folder).free
        if self.bytes + self.draws * (HEAD[0] + HEAD[1] * self.tensors) > free:
            raise UserError(
                f"The residuals ({self}) do not fit: {folder} has {free / 2**30:.2f} GiB free. Free some space, choose "
                "another folder, fewer draws or smaller patches, or make the records on the fly."
            )


def size_of(shapes: Shapes, draws: int, dtype: torch.dtype) -> StoreSize:
    """The size of a store whose records have these shapes, as `shapes_of` gives them for a batch of 1."""
    kept = [shape for row in shapes.values() for shape in row if shape is not None]
    if any(shape[0] != 1 for shape in kept):
        raise UserError(f"A record is of one draw, but the sample is a batch of {kept[0][0]}; give one draw at a time.")
    return StoreSize(draws, sum(shape.numel() for shape in kept) * dtype.itemsize, len(kept))


def fill_store(
    store: ResidualStore,
    keys: Iterable[DrawKey],
    sample_of: SampleOf,
    model: nn.Module,
    runs: Sequence[Run],
    blocks: Weights,
    *,
    device: Device = None,
    host_bytes: int = HOST,
    spill: str | Path | None = None,
    announce: Callable[[StoreSize], None] = lambda size: None,
    on_block: Callable[[str], None] | None = None,
    usage: Callable[[Path], Any] = shutil.disk_usage,
) -> None:
    """Make the records that the store lacks. What was made before, also by a process that was killed, is kept.

    announce: is told the size before anything is made. host_bytes: about what the states of the draws that pass through
    the blocks together may take; every such pass reads all blocks once. device, spill, on_block: as in `make_records`.
    Raises UserError, before anything is made, when the disk is too small.
    """
    todo = store.missing(keys)
    if not todo:
        return
    shapes = shapes_of(model, sample_of(todo[0]), runs, blocks, device)
    size = size_of(shapes, len(todo), store.dtype)
    announce(size)
    size.check(store.folder, usage)
    many = _draws_per_pass(store, size, host_bytes)
    for part in (todo[at : at + many] for at in range(0, len(todo), many)):
        records = make_records(model, [sample_of(key) for key in part], runs, blocks, device, on_block, spill)
        store.add(dict(zip(part, records, strict=True)))


def _draws_per_pass(store: ResidualStore, size: StoreSize, host_bytes: int) -> int:
    """Whole files of records, so that a making that was interrupted goes on at a file's border."""
    # the records, and the states before and behind a block, which are about as large
    draws = max(1, host_bytes // max(1, 3 * size.record_bytes))
    in_file = store.shard_records(size.record_bytes)
    return max(draws // in_file * in_file, min(draws, in_file))


class OnTheFly:
    """The plain twin of a store, for those who have memory and no disk: records are made when they are asked for.

    model: the base model, on its device, before an adapter is added or a block taken out. A twin that shares its
    weights is kept, so that they take no memory twice. dtype: what records are rounded to, by default not at all.
    """

    def __init__(
        self,
        model: nn.Module,
        sample_of: SampleOf,
        runs: Sequence[Run],
        blocks: Weights,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.sample_of, self.runs, self.blocks = shared_twin(model), sample_of, tuple(runs), blocks
        self.device, self.dtype = device, dtype

    def missing(self, keys: Iterable[DrawKey]) -> list[DrawKey]:
        """None: whatever is asked for is made."""
        return []

    def read(self, keys: Sequence[DrawKey]) -> Record:
        """The record of a batch: its rows are the draws of `keys`, each made by itself, as a store's are."""
        samples = [self.sample_of(key) for key in keys]
        record = joined(make_records(self.model, samples, self.runs, self.blocks, self.device))
        return record if self.dtype is None else rounded(record, self.dtype)


def shared_twin(model: nn.Module) -> nn.Module:
    """Another model of the same parameters and buffers: what is put in place of its modules is not put in the first."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
