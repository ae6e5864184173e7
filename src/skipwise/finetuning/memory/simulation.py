"""One training step of LoRA under a memory tracker: on fake tensors, which hold no memory, or on real ones.

Memory changes by the same amount with each of several equal blocks that follow each other, in the forward pass as in
the backward pass. So a step is run with a few of them, and the part of the course that belongs to one is repeated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from skipwise.blocks import Contract, find_contract, module_list
from skipwise.cuts import placing
from skipwise.examples import Size, example_inputs
from skipwise.finetuning.dataflow import Shapes, record_shapes
from skipwise.finetuning.hollow import LateMode, Shell, hollow, stored_runs
from skipwise.finetuning.lora import add_lora, lora_targets
from skipwise.finetuning.memory.emulation import norms_as_on_cuda
from skipwise.finetuning.memory.resident import Weights, materialised
from skipwise.finetuning.peak import Bytes, PeakMemory, Segment
from skipwise.finetuning.precision import computing, lora_dtype, plain_norms
from skipwise.finetuning.runs import Run, Train
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.kept import PassThrough
from skipwise.loading import DTYPES
from skipwise.plan import Plan

KEPT = 3  # of equal blocks that follow each other: the first, one that stands for many, the last


@dataclass(frozen=True)
class Group:
    """Equal blocks of one stack that follow each other and are treated alike: "trained", "frozen" or "streamed"."""

    stack: str
    role: str
    kind: int
    numbers: tuple[int, ...]

    @property
    def shortened(self) -> tuple[int, ...]:
        """Those that are run."""
        return self.numbers if len(self.numbers) <= KEPT else (*self.numbers[:2], self.numbers[-1])


UNCACHE = "uncache"  # label of the segment in which autocast lets go of its copies of LoRA's weights


@dataclass(frozen=True)
class Course:
    """How memory went in a step: before it, and in its segments.

    Those of a block are labelled `forward` and `backward`, the number of its group, and its place among those that ran.
    """

    start: Bytes
    segments: list[Segment]


def repeats_of(groups: tuple[Group, ...]) -> dict[str, int]:
    """Label of a segment in a shortened course -> how many blocks it stands for."""
    return {
        f"{way} {number}.1": len(group.numbers) - KEPT + 1
        for number, group in enumerate(groups)
        if len(group.numbers) > KEPT
        for way in ("forward", "backward")
    }


def groups_of(model: nn.Module, contract: Contract, train: Train, late: LateMode) -> tuple[Group, ...]:
    """The blocks that run in a training step, in order. Raises UserError for blocks that cannot be trained."""
    gone = {(run.stack, number) for run in stored_runs(contract, train, late) for number in run.blocks}
    found = []
    for name, stack in contract.stacks.items():
        trained, blocks = set(train.get(name, ())), module_list(model, name)
        kinds = [
            (("gone" if (name, n) in gone else "trained" if n in trained else late), kind_of(blocks[n]), n)
            for n in range(stack.length)
        ]
        for (role, kind), members in groupby(kinds, key=lambda entry: entry[:2]):
            if role != "gone":
                found.append(Group(name, role, kind, tuple(n for *_, n in members)))
    return tuple(found)


def kind_of(block: nn.Module) -> int:
    """Equal for blocks of the same class whose parameters have the same names and shapes."""
    return hash((type(block), tuple((name, p.shape) for name, p in block.named_parameters())))


@dataclass(frozen=True)
class Scene:
    """A model set up for steps: its inputs, LoRA's parameters, their optimiser, and the blocks that run, by label."""

    model: nn.Module
    shell: Shell
    inputs: Mapping[str, Any]
    lora: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    blocks: Mapping[str, nn.Module]

    def label(self, tracker: PeakMemory) -> None:
        """Tell the tracker what is what."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        tracker.label((tensor for tensor in tensors if not tensor.requires_grad), "weights")
        tracker.label(self.lora, "lora")
        tracker.label(self.optimiser.state.values(), "optimiser")
        tracker.label(self.inputs.values(), "inputs")
        tracker.label(self.shell.given.values(), "residuals")
        for parameter in self.lora:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.label([p.grad], "gradients"))


class Stage:
    """A model on the meta device, on which steps of different settings are played. It is frozen, else not changed.

    size: from settings to the size of one forward; fake: False runs on real random tensors, which is a measurement;
    device: of real tensors, "cpu" or "cuda".
    """

    def __init__(
        self,
        model: nn.Module,
        size: Callable[[FinetuneSettings], Size],
        fake: bool = True,
        device: str = "cpu",
    ):
        self.model, self.size, self.fake, self.device = model.requires_grad_(False), size, fake, device
        self.contract = find_contract(model)

    def play(self, settings: FinetuneSettings, train: Train, shorten: bool = True) -> Course:
        """One step: forward, loss, backward, and unless blocks are left out, AdamW's step."""
        tracker = PeakMemory()
        with self.scene(settings, train, tracker, shorten) as scene, _marks(scene.blocks, tracker):
            if not shorten:
                _make_state(scene.optimiser, scene.lora)
            scene.label(tracker)
            start = tracker.now
            tracker.mark("begin")
            with tracker:
                self._forward_and_backward(scene, settings, tracker.mark)
                tracker.mark("end")
                if not shorten:
                    scene.optimiser.step()
            tracker.mark("done")
        return Course(start, tracker.segments[1:])

    def run(self, settings: FinetuneSettings, train: Train, steps: int) -> Iterator[None]:
        """Whole steps without a tracker, for whoever measures by other means; yields before the first and after each.

        What is yielded before the first is a model with its weights, but without gradients or optimiser state.
        """
        with self.scene(settings, train, PeakMemory(), shorten=False) as scene:
            yield
            for _ in range(steps):
                self._forward_and_backward(scene, settings, lambda label: None)
                scene.optimiser.step()
                scene.optimiser.zero_grad(set_to_none=True)
                yield

    @contextmanager
    def scene(self, settings: FinetuneSettings, train: Train, tracker: PeakMemory, shorten: bool) -> Iterator[Scene]:
        """The model set up; tracker: that weights of streamed blocks are told to."""
        groups = groups_of(self.model, self.contract, train, settings.late)
        shapes = self.record_shapes(settings, stored_runs(self.contract, train, settings.late))
        blocks = {name: list(module_list(self.model, name)) for name in self.contract.stacks}
        norms = norms_as_on_cuda(self.model, settings) if self.fake else plain_norms(self.model, settings, self.device)
        with ExitStack() as stack:
            stack.enter_context(norms)  # before blocks are copied or hidden
            shell = stack.enter_context(self._hollowed(settings, train, tracker))
            modules = self._cast(groups, blocks, settings, shorten)
            stack.enter_context(placing(self.model, modules))
            stack.enter_context(_gradient_checkpointing(self.model, settings.checkpointing))
            stack.enter_context(self.tensors(settings))
            shell.feed({name: self._zeros(row, DTYPES[settings.dtype]) for name, row in shapes.items()})
            lora = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            yield Scene(
                model=self.model,
                shell=shell,
                inputs=example_inputs(self.model, self.size(settings), device=self.device),
                lora=lora,
                optimiser=torch.optim.AdamW(lora, foreach=True),  # as it is on CUDA by default
                blocks={
                    f"{number}.{place}": modules[group.stack].get(n, blocks[group.stack][n])
                    for number, group in enumerate(groups)
                    for place, n in enumerate(group.shortened if shorten else group.numbers)
                },
            )

    def record_shapes(self, settings: FinetuneSettings, runs: tuple[Run, ...]) -> Shapes:
        """The shapes of what is stored of one batch."""
        return record_shapes(self.model, runs, example_inputs(self.model, self.size(settings))) if runs else {}

    @contextmanager
    def tensors(self, settings: FinetuneSettings) -> Iterator[None]:
        """The model with fake or real tensors in the place of those on meta."""
        mode: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True) if self.fake else nullcontext()
        with mode, materialised(self.model, DTYPES[settings.dtype], self.fake, self.device):
            yield

    def _zeros(self, row: Sequence[torch.Size | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        return tuple(None if s is None else torch.zeros(s, dtype=dtype, device=self.device) for s in row)

    def _hollowed(self, settings: FinetuneSettings, train: Train, tracker: PeakMemory) -> AbstractContextManager[Shell]:
        plan = Plan(model=self.contract.shape, train={name: tuple(numbers) for name, numbers in train.items()})
        weights = Weights(tracker, DTYPES[settings.dtype], self.fake, self.device)
        return hollow(self.model, plan, settings.late, blocks=weights)

    def _cast(
        self, groups: tuple[Group, ...], blocks: Mapping[str, list], settings: FinetuneSettings, shorten: bool
    ) -> dict[str, dict[int, nn.Module]]:
        """Copies with adapters in the place of trained blocks, nothing in that of blocks that others stand for."""
        modules: dict[str, dict[int, nn.Module]] = {name: {} for name in blocks}
        for group in groups:
            acting = group.shortened if shorten else group.numbers
            for number in group.numbers:
                block = blocks[group.stack][number]
                if number not in acting:
                    modules[group.stack][number] = PassThrough(block, self.contract.stacks[group.stack])
                elif group.role == "trained":
                    modules[group.stack][number] = adapted = deepcopy(block)
                    add_lora(adapted, lora_targets(block, ends=settings.targets), settings.rank, lora_dtype(settings))
        return modules

    def _forward_and_backward(self, scene: Scene, settings: FinetuneSettings, mark: Callable[[str], None]) -> None:
        with computing(settings, self.device):
            out = scene.model(**scene.inputs, return_dict=False)[0]
            mark(UNCACHE)
        mark("loss")
        loss = F.mse_loss(out.float(), torch.empty_like(out, dtype=torch.float32))
        del out
        loss.backward()


def _make_state(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """The state that an optimiser makes in its first step; the measured step is a later one."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


@contextmanager
def _gradient_checkpointing(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            model.disable_gradient_checkpointing()


@contextmanager
def _marks(blocks: Mapping[str, nn.Module], tracker: PeakMemory) -> Iterator[None]:
    """Mark where each block's forward and backward begin; that a checkpointed block is run again is none of these."""
    seen: set[str] = set()

    def mark(label: str) -> None:
        if label not in seen:
            seen.add(label)
            tracker.mark(label)

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: mark(f"forward {name}")

    def leave(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, result: Any) -> None:
            if f"watched {name}" not in seen:
                seen.add(f"watched {name}")
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        # the first of a block's outputs whose gradient is known
                        tensor.register_hook(lambda _: mark(f"backward {name}"))

        return watch

    handles = [block.register_forward_pre_hook(enter(name)) for name, block in blocks.items()]
    handles += [block.register_forward_hook(leave(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
