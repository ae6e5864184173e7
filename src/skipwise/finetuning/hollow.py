"""A model for training that lacks its skipped blocks: what they would add is given to it, as was stored before.

Paper 3's block skipping. Stand-ins keep the blocks' places, so that adapter weights have the names that they have in
the whole model, and whose blocks are on the meta device the shell costs no memory for them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from skipwise.blocks import Contract, Stack, find_contract, module_list
from skipwise.cuts import placing
from skipwise.errors import UserError, unknown
from skipwise.finetuning.late import Blocks, Streamed
from skipwise.finetuning.runs import Run, Train, skipped_runs
from skipwise.kept import PassThrough
from skipwise.plan import Plan

LateMode = Literal["residual", "frozen", "streamed", "none"]
Streams = tuple[Tensor | None, ...]  # one tensor (batch, tokens, width) a stream, None where the model discards it
Record = Mapping[str, Streams]  # run name -> streams, in the order of Stack.streams


@dataclass
class Shell:
    """A hollow model. `feed` it the record of a batch before each forward; `runs` are those that a record holds."""

    model: nn.Module
    runs: tuple[Run, ...]
    given: dict[str, Streams] = field(default_factory=dict)

    def feed(self, record: Record) -> None:
        """What the skipped runs give in the next forwards. Raises UserError for the record of other runs."""
        wanted = {run.name for run in self.runs}
        if set(record) != wanted:
            raise UserError(f"The record holds runs {sorted(record)}, but this model skips {sorted(wanted)}.")
        self.given.clear()  # the stand-ins hold this dictionary
        self.given.update(record)


class Remembered(PassThrough):
    """Stands where a run of skipped blocks begins. Of an early run it gives the stored outputs, of a late one it adds
    the stored residuals to the streams (paper 3).
    """

    def __init__(self, block: nn.Module, stack: Stack, run: Run, given: Mapping[str, Streams]):
        super().__init__(block, stack)
        self.__dict__.update(run=run, given=given)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The streams behind the run, in the places in which a block returns them."""
        run = self.__dict__["run"]
        stored = self.__dict__["given"].get(run.name)
        if stored is None:
            raise UserError(f"Nothing is known of the skipped blocks {run.name}; feed the record of this batch first.")
        args_list = list(args)
        for (name, place), value in zip(self.places, stored, strict=True):
            if value is None:
                continue
            if name in kwargs:
                kwargs[name] = _behind(kwargs[name], value, run)
            else:
                args_list[place] = _behind(args_list[place], value, run)
        return super().forward(*args_list, **kwargs)


def _behind(stream: Tensor, stored: Tensor, run: Run) -> Tensor:
    if stored.shape != stream.shape:
        raise UserError(
            f"The record of {run.name} has shape {tuple(stored.shape)}, the stream here is {tuple(stream.shape)}; "
            "it was made at another resolution, text length or batch."
        )
    stored = stored.to(stream)
    return stored if run.early else stream + stored


@contextmanager
def hollow(model: nn.Module, plan: Plan, late: LateMode = "residual", blocks: Blocks | None = None) -> Iterator[Shell]:
    """The model with the blocks that the plan does not train taken out; it is what it was afterwards.

    late: what becomes of skipped blocks behind the first trained one. "residual", the paper's: their stored residual is
    added, which goes stale, and gradients pass them as if they were the identity. "frozen": they stay and run, exact.
    "streamed": they stay, and `blocks` brings their weights in for the time they run, exact. "none": there are none;
    the last blocks are trained.
    Raises UserError for a plan of another model or without trained blocks, and for late blocks under "none".
    """
    if late not in get_args(LateMode):
        raise unknown("late mode", late, get_args(LateMode))
    contract = find_contract(model)
    plan.check_model(contract.shape)
    behind = [run for run in skipped_runs(contract, plan.train) if not run.early]
    if late == "none" and behind:
        raise UserError(f"Late mode none trains the last blocks, but the plan leaves out {behind[0].name}.")
    shell = Shell(model, stored_runs(contract, plan.train, late))
    modules = _stand_ins(contract, shell)
    if late == "streamed":
        if blocks is None:
            raise UserError("Late mode streamed needs `blocks`, where the weights of the late blocks come from.")
        _stream(contract, shell.model, behind, blocks, modules)
    with placing(model, modules):
        yield shell


def stored_runs(contract: Contract, train: Train, late: LateMode) -> tuple[Run, ...]:
    """The runs of skipped blocks whose outputs or residuals are stored."""
    return tuple(run for run in skipped_runs(contract, train) if run.early or late == "residual")


def _stand_ins(contract: Contract, shell: Shell) -> dict[str, dict[int, nn.Module]]:
    modules: dict[str, dict[int, nn.Module]] = {}
    for run in shell.runs:
        stack, places = contract.stacks[run.stack], module_list(shell.model, run.stack)
        for number in run.blocks:
            block = places[number]
            stands = Remembered(block, stack, run, shell.given) if number == run.start else PassThrough(block, stack)
            modules.setdefault(run.stack, {})[number] = stands
    return modules


def _stream(
    contract: Contract, model: nn.Module, runs: list[Run], blocks: Blocks, modules: dict[str, dict[int, nn.Module]]
) -> None:
    for run in runs:
        for number in run.blocks:
            block = module_list(model, run.stack)[number]
            modules.setdefault(run.stack, {})[number] = Streamed(block, f"{run.stack}.{number}", blocks)
