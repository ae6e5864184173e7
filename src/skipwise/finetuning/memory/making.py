"""Peak memory of making residuals block by block: what is outside of the blocks, one block, and one sample."""

from collections.abc import Sequence

import torch
from torch import nn

from skipwise.blocks import module_list
from skipwise.cuts import placing
from skipwise.examples import example_inputs
from skipwise.finetuning.memory.emulation import norms_as_on_cuda
from skipwise.finetuning.memory.simulation import Stage, kind_of
from skipwise.finetuning.peak import Bytes, PeakMemory
from skipwise.finetuning.runs import Run
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.kept import PassThrough


def making_peak(stage: Stage, settings: FinetuneSettings, runs: Sequence[Run]) -> Bytes:
    """The highest moment while one sample passes through the blocks up to the last of `runs`; nothing without runs.

    Every kind of block is run once, with nothing in the place of all others.
    """
    settings = settings.but(batch=1)
    peaks = [_peak(stage, settings, stack, number) for stack, number in _one_of_a_kind(stage, runs)]
    return max(peaks, key=lambda peak: peak.total, default=Bytes())


def _one_of_a_kind(stage: Stage, runs: Sequence[Run]) -> list[tuple[str, int]]:
    """(stack, number) of the first block of each kind among those that must run."""
    if not runs:
        return []
    found: dict[int, tuple[str, int]] = {}
    for name, stack in stage.contract.stacks.items():
        is_last = name == runs[-1].stack
        for number in range(runs[-1].stop if is_last else stack.length):
            found.setdefault(kind_of(module_list(stage.model, name)[number]), (name, number))
        if is_last:
            break
    return list(found.values())


def _peak(stage: Stage, settings: FinetuneSettings, stack_name: str, number: int) -> Bytes:
    model, tracker = stage.model, PeakMemory()
    modules: dict[str, dict[int, nn.Module]] = {
        name: {n: PassThrough(block, stack) for n, block in enumerate(module_list(model, name))}
        for name, stack in stage.contract.stacks.items()
    }
    del modules[stack_name][number]
    with norms_as_on_cuda(model, settings), placing(model, modules), stage.tensors(settings):
        inputs = example_inputs(model, stage.size(settings), device="cpu")
        tracker.label((*model.parameters(), *model.buffers()), "weights")
        tracker.label(inputs.values(), "inputs")
        with torch.no_grad(), tracker:
            model(**inputs)
    return tracker.peak
