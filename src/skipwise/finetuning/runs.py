"""Which blocks a fine-tuning leaves out: the runs of skipped blocks before, between and behind the trained ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from skipwise.blocks import Contract
from skipwise.errors import UserError, unknown

Train = Mapping[str, Sequence[int]]  # stack name -> numbers of the blocks that are trained


@dataclass(frozen=True)
class Run:
    """Consecutive skipped blocks of one stack, `start` to `stop` - 1. A run does not cross the border of a stack.

    early: no trained block runs before it. What it puts out is then the same all through the training, and is stored
    as it is. Of the other runs, the late ones, the residual is stored, and goes stale as the blocks before them learn.
    """

    stack: str
    start: int
    stop: int
    early: bool

    @property
    def name(self) -> str:
        """Such as `transformer_blocks.0-5`, the last number included."""
        return f"{self.stack}.{self.start}-{self.stop - 1}"

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.start, self.stop)


def everything(contract: Contract) -> dict[str, tuple[int, ...]]:
    """All blocks: ordinary LoRA."""
    return {name: tuple(range(stack.length)) for name, stack in contract.stacks.items()}


def skipped_runs(contract: Contract, train: Train) -> tuple[Run, ...]:
    """The runs of blocks that are not in `train`, in the order in which a forward comes to them.

    Raises UserError for an unknown stack, a block out of range, and when nothing is trained.
    """
    _check(contract, train)
    runs: list[Run] = []
    early = True
    for stack in contract.stacks.values():
        trained = set(train.get(stack.name, ()))
        for is_trained, numbers in groupby(range(stack.length), key=lambda number: number in trained):
            block = list(numbers)
            if is_trained:
                early = False
            else:
                runs.append(Run(stack.name, block[0], block[-1] + 1, early))
    return tuple(runs)


def _check(contract: Contract, train: Train) -> None:
    for name, numbers in train.items():
        if name not in contract.stacks:
            raise unknown("stack", name, contract.stacks)
        length = contract.stacks[name].length
        outside = [number for number in numbers if not 0 <= number < length]
        if outside:
            raise UserError(f"Block {outside[0]} is not in {name}, which has blocks 0 to {length - 1}.")
    if not any(len(numbers) for numbers in train.values()):
        raise UserError("No block is to be trained; name at least one in the plan's `train`.")
