"""Which streams behind skipped blocks a model makes any use of. What it discards need not be stored.

The last block of a model hands on its text stream, too, and nobody takes it; outputs of early blocks do not matter
where the outputs of later early blocks, stored as well, take their place. Neither is read off a table: one forward
without blocks is traced, on shapes alone, and every tensor that is computed from a stream is marked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipwise.blocks import Stack, find_contract, module_list
from skipwise.cuts import placing
from skipwise.examples import shapes_only
from skipwise.finetuning.runs import Run
from skipwise.kept import PassThrough

Mark = tuple[str, int]  # run name, number of the stream
Shapes = dict[str, tuple[torch.Size | None, ...]]  # run name -> shape of each stream, None of one that is discarded


class Marks(TorchDispatchMode):
    """Hands the marks of what an op takes on to what it gives. Marks sit on storages, so that views share them.

    Seen are all ops, those without gradients too; an op that takes no more than the shape of a tensor passes its marks
    on as well, and a number read off a tensor counts as used. So a mark may say too much, never too little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[Mark] = set()
        self._marks: dict[int, tuple[Any, frozenset[Mark]]] = {}  # storages are kept, lest their numbers come again

    def of(self, tree: Any) -> frozenset[Mark]:
        """The marks of all tensors in a tree."""
        found = [self._marks.get(_number(leaf)) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return frozenset().union(*(entry[1] for entry in found if entry))

    def put(self, tree: Any, marks: frozenset[Mark]) -> None:
        """Add marks to all tensors in a tree."""
        for leaf in tree_leaves(tree):
            if marks and isinstance(leaf, Tensor):
                self._marks[_number(leaf)] = leaf.untyped_storage(), marks | self.of(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and hand the marks on."""
        marks = self.of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.put(result, marks)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.used |= marks
        if marks and func._schema.is_mutable:
            self.put(args, marks)
        return result


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class RunEnd(PassThrough):
    """Stands for a run's last block: what it returns is marked as the run's. Of an early run it is that alone, because
    stored outputs take the place of what came in; stored residuals of a late one are added.
    """

    def __init__(self, block: nn.Module, stack: Stack, run: Run, marks: Marks, shapes: dict[Mark, torch.Size]):
        super().__init__(block, stack)
        self.__dict__.update(run=run, marks=marks, shapes=shapes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The streams, as new tensors."""
        run, marks = self.__dict__["run"], self.__dict__["marks"]
        result: Any = super().forward(*args, **kwargs)
        streams = [result if place is None else result[place] for place in self.outputs]
        behind: list[Tensor] = []
        for number, stream in enumerate(streams):
            mark = (run.name, number)
            self.__dict__["shapes"][mark] = stream.shape
            behind.append(torch.empty(stream.shape, dtype=stream.dtype, device=stream.device))
            if not run.early:
                behind[-1].copy_(stream)
            marks.put(behind[-1], frozenset([mark]))
        if self.returns is None:
            return behind[0]
        by_place = dict(zip(self.outputs, behind, strict=True))
        return tuple(by_place.get(place) for place in range(self.returns))


class Watched(PassThrough):
    """Stands for a block that is not skipped: whatever reaches it is used."""

    def __init__(self, block: nn.Module, stack: Stack, marks: Marks):
        super().__init__(block, stack)
        self.__dict__["marks"] = marks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The streams as they came in."""
        marks = self.__dict__["marks"]
        marks.used |= marks.of((args, kwargs))
        return super().forward(*args, **kwargs)


def record_shapes(model: nn.Module, runs: Sequence[Run], sample: Mapping[str, Any]) -> Shapes:
    """What a record of these runs holds for this sample: of each stream its shape, or None when the model discards it.

    sample: keyword arguments of one forward, on the device of what is outside of the blocks; blocks may be on meta.
    """
    contract = find_contract(model)
    marks, shapes = Marks(), dict[Mark, torch.Size]()
    by_block = {(run.stack, number): run for run in runs for number in run.blocks}
    modules: dict[str, dict[int, nn.Module]] = {}
    for name, stack in contract.stacks.items():
        for number, block in enumerate(module_list(model, name)):
            run = by_block.get((name, number))
            stands: nn.Module = PassThrough(block, stack)
            if run is None:
                stands = Watched(block, stack, marks)
            elif number == run.stop - 1:
                stands = RunEnd(block, stack, run, marks, shapes)
            modules.setdefault(name, {})[number] = stands
    with placing(model, modules), shapes_only(), marks:
        marks.used |= marks.of(_plain(model(**sample)))
    return {
        run.name: tuple(
            shapes[run.name, number] if (run.name, number) in marks.used else None
            for number in range(len(contract.stacks[run.stack].streams))
        )
        for run in runs
    }


def _plain(output: Any) -> Any:
    """diffusers' and transformers' output classes as a tuple, which they also are."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output
