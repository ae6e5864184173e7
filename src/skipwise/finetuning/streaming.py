"""Records of many samples, made block by block: each block is loaded once, and all samples pass through it.

The whole model is never on the device. There are what is outside of the blocks, one block and one sample; the states of
all samples wait on the host. For every stack, in the order in which the model comes to them,

1. each sample runs through the model up to this stack, whose blocks only note what they are called with, while those
   of earlier stacks answer with what they put out;
2. the blocks are loaded one after the other, and the samples pass through each of them.

What a model does between its stacks (FLUX.2 joins two streams to one) is thus done by the model itself.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from skipwise.blocks import Contract, Stack, bind, find_contract, module_list
from skipwise.cuts import placing
from skipwise.errors import UserError
from skipwise.finetuning.dataflow import Shapes, record_shapes
from skipwise.finetuning.hollow import Streams
from skipwise.finetuning.host import Host
from skipwise.finetuning.runs import Run
from skipwise.finetuning.shards import Device, Weights
from skipwise.kept import PassThrough

Sample = Mapping[str, Any]  # keyword arguments of one forward


def make_records(
    model: nn.Module,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    blocks: Weights,
    device: Device = None,
    on_block: Callable[[str], None] | None = None,
    spill: str | Path | None = None,
) -> list[dict[str, Streams]]:
    """For each sample what the runs put out (early ones) or add to the streams (late ones), in host memory.

    samples: keyword arguments of one forward each, on the host. A record is bit for bit that of a whole forward of the
    same sample; samples that are batched together may differ from single ones in the last bits, as all kernels may.
    A stream that the model discards, or that a later run's outputs replace, is None, as in `record_shapes`.
    blocks: where the weights come from; each block up to the last run is asked for once, later ones never.
    device: by default where the model's own parameters are. on_block: called with the name of each block that is done.
    spill: a folder; the states and records are in temporary files there, mapped into memory.
    Raises UserError for a model that changes the streams between blocks, and for a full disk.
    """
    if not samples:
        return []
    wanted = shapes_of(model, samples[0], runs, blocks, device)
    there = torch.device(device or _device_of(model))
    making = Making(model, find_contract(model), blocks, there, Host(spill), samples)
    with torch.no_grad():
        return making.run(runs, wanted, on_block or (lambda name: None))


def shapes_of(model: nn.Module, sample: Sample, runs: Sequence[Run], blocks: Weights, device: Device = None) -> Shapes:
    """`record_shapes`, before any block is loaded: of each stream of each run its shape, or None when it is not kept.

    Brings what is outside of the blocks to the device, where it stays.
    """
    there = torch.device(device or _device_of(model))
    blocks.fill_outside(model, device=there)  # before anything runs: see Shards.fill_outside
    return record_shapes(model, runs, _to(sample, there))


class _ReachedError(BaseException):
    """Ends a forward as soon as a stack's last block is called; no `except Exception` of a model stops it."""


@dataclass
class Note:
    """What the blocks of one stack are called with for one sample: arguments by block, and the streams that come in."""

    stack: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    streams: tuple[Any, ...] = ()
    handed: tuple[Any, ...] = ()


class Noting(PassThrough):
    """Stands for a block that has yet to run: notes its call and hands the streams on."""

    def __init__(self, block: nn.Module, stack: Stack, number: int, making: "Making"):
        super().__init__(block, stack)
        self.__dict__.update(stack=stack, number=number, making=making)
        self.__dict__["signature"] = inspect.signature(type(block).forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The streams as they came in. Raises _ReachedError in the place of a stack's last block."""
        here = self.__dict__
        arguments = bind(here["signature"], here["block"], args, kwargs)
        here["making"].note_call(here["stack"], here["number"], arguments)
        return super().forward(*args, **kwargs)


class Answering(PassThrough):
    """Stands for the last block of a stack that all samples have passed, and gives what that block gave."""

    def __init__(self, block: nn.Module, stack: Stack, making: "Making"):
        super().__init__(block, stack)
        self.__dict__.update(stack=stack, making=making)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stack puts out for the sample in flight."""
        return self.__dict__["making"].answer(self.__dict__["stack"])


@dataclass
class Making:
    """The making of records: which stacks are done, and with what result for each sample."""

    model: nn.Module
    contract: Contract
    blocks: Weights
    device: torch.device
    host: Host
    samples: Sequence[Sample]
    done: dict[str, list[Any]] = field(default_factory=dict)  # stack -> what its last block gave, by sample
    sample: int = 0  # the one in flight
    note: Note = field(default_factory=Note)
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # arguments of the sample in flight

    def run(self, runs: Sequence[Run], wanted: Shapes, on_block: Callable[[str], None]) -> list[dict[str, Streams]]:
        """The records, in the order of the samples."""
        records: list[dict[str, Streams]] = [
            {run.name: (None,) * len(wanted[run.name]) for run in runs} for _ in self.samples
        ]
        todo = [run for run in runs if any(shape is not None for shape in wanted[run.name])]
        while todo:
            notes = self._note_stack()
            stack = self.contract.stacks[notes[0].stack]
            own = [run for run in todo if run.stack == stack.name]
            todo = [run for run in todo if run.stack != stack.name]
            stop = stack.length if todo else own[-1].stop
            self._pass(stack, stop, notes, _Recorder(own, wanted, records, self.host), on_block)
        return records

    def _note_stack(self) -> list[Note]:
        """The notes of the next stack, by sample."""
        modules = {
            name: {number: self._stand_in(stack, number) for number in range(stack.length)}
            for name, stack in self.contract.stacks.items()
        }
        notes = []
        with placing(self.model, modules):
            for number, sample in enumerate(self.samples):
                self.sample, self.note, self.kept = number, Note(), {}
                try:
                    self.model(**_to(sample, self.device))
                except _ReachedError:
                    notes.append(self.note)
        self.note, self.kept = Note(), {}
        if len(notes) < len(self.samples) or len({note.stack for note in notes}) > 1:
            raise UserError("Samples take different ways through the model; make records of those alike together.")
        return notes

    def _stand_in(self, stack: Stack, number: int) -> nn.Module:
        block = module_list(self.model, stack.name)[number]
        if stack.name not in self.done:
            return Noting(block, stack, number, self)
        last = number == stack.length - 1
        return Answering(block, stack, self) if last else PassThrough(block, stack)

    def note_call(self, stack: Stack, number: int, arguments: dict[str, Any]) -> None:
        """A block of the next stack is called."""
        streams = tuple(arguments.pop(stream.argument) for stream in stack.streams)
        if number == 0:
            self.note.stack, self.note.handed = stack.name, streams
            self.note.streams = tree_map_only(Tensor, self.host.keep, streams)
        elif any(a is not b for a, b in zip(streams, self.note.handed, strict=True)):
            raise UserError(
                f"The streams change between blocks {number - 1} and {number} of {stack.name}, as with a ControlNet; "
                "leave out of the samples what is added there."
            )
        self.note.calls.append(tree_map_only(Tensor, self._keep_argument, arguments))
        if number == stack.length - 1:
            raise _ReachedError

    def _keep_argument(self, tensor: Tensor) -> Tensor:
        """Most arguments are the same for all blocks, and many for all samples."""
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor, self.host.share(tensor)
        return self.kept[id(tensor)][1]

    def answer(self, stack: Stack) -> Any:
        """What a stack that is done put out for the sample in flight."""
        return _to(self.done[stack.name][self.sample], self.device)

    def _pass(
        self, stack: Stack, stop: int, notes: Sequence[Note], recorder: "_Recorder", on_block: Callable[[str], None]
    ) -> None:
        """All samples through the stack's blocks up to `stop`."""
        results: list[Any] = [None] * len(notes)
        for number in range(stop):
            name = f"{stack.name}.{number}"
            with self.blocks.block(self.model, name, self.device) as block:
                for sample, note in enumerate(notes):
                    before = note.streams
                    named = zip((stream.argument for stream in stack.streams), before, strict=True)
                    result = block(**_to(note.calls[number] | dict(named), self.device))
                    results[sample] = tree_map_only(Tensor, self.host.keep, result)
                    note.streams = _streams(results[sample], stack)
                    recorder.see(sample, number, before, note.streams, _streams(result, stack))
            on_block(name)
        self.done[stack.name] = results


@dataclass
class _Recorder:
    """Writes the records of one stack's runs."""

    runs: Sequence[Run]
    wanted: Shapes
    records: list[dict[str, Streams]]
    host: Host
    entered: dict[int, Streams] = field(default_factory=dict)  # sample -> the streams before the run

    def see(self, sample: int, number: int, before: Streams, behind: Streams, fresh: Streams) -> None:
        """A block has run: streams before and behind it on the host, and the latter on the device as well."""
        run = next((run for run in self.runs if number in run.blocks), None)
        if run is None:
            return
        if number == run.start:
            self.entered[sample] = before
        if number == run.stop - 1:
            entered = self.entered.pop(sample)
            record = behind if run.early else [self._residual(*pair) for pair in zip(entered, fresh, strict=True)]
            pairs = zip(record, self.wanted[run.name], strict=True)
            self.records[sample][run.name] = tuple(stream if shape else None for stream, shape in pairs)

    def _residual(self, before: Tensor | None, behind: Tensor | None) -> Tensor | None:
        if before is None or behind is None:
            return None
        return self.host.keep(behind - before.to(behind.device))


def _streams(result: Any, stack: Stack) -> Streams:
    return tuple(result if stream.output is None else result[stream.output] for stream in stack.streams)


def _to(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(tree) if isinstance(tree, Mapping) else tree)


def _device_of(model: nn.Module) -> torch.device:
    there = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(there, torch.device("cpu"))
