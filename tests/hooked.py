"""The plain twin of all ways to make records: one whole forward, watched block by block."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from skipwise.blocks import find_contract, module_list, trace_calls
from skipwise.finetuning.runs import Run

Record = dict[str, tuple[Tensor | None, ...]]


def hooked_record(model: nn.Module, runs: Sequence[Run], inputs: Mapping[str, Any]) -> Record:
    """What the runs put out (early ones) or add (late ones) in a whole forward, without gradients."""
    contract = find_contract(model)
    traces = trace_calls(model, {run.stack: module_list(model, run.stack) for run in runs}, inputs)
    record: Record = {}
    for run in runs:
        calls = traces[run.stack].calls
        first, last = calls[run.start], calls[run.stop - 1]
        record[run.name] = tuple(
            _stored(first.arguments[stream.argument], last.outputs()[stream.output], run.early)
            for stream in contract.stacks[run.stack].streams
        )
    return record


def _stored(before: Tensor, behind: Tensor | None, early: bool) -> Tensor | None:
    if behind is None:
        return None
    return behind.clone() if early else behind - before
