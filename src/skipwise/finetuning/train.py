"""The training loop of a fine-tuning: LoRA on the blocks that are left, fed with what the skipped ones would give."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from skipwise.checkpoints import Checkpoint
from skipwise.errors import UserError, unknown
from skipwise.files import write_atomically
from skipwise.finetuning.draws import Draw, batch_of
from skipwise.finetuning.family import Family
from skipwise.finetuning.hollow import Record, Shell
from skipwise.finetuning.patches import PatchSchedule, Place, place_in_picture
from skipwise.finetuning.peak import Bytes, PeakMemory
from skipwise.finetuning.precision import computing
from skipwise.finetuning.prepare import Prepared
from skipwise.finetuning.residuals import DrawKey
from skipwise.finetuning.settings import FinetuneSettings, check_number, check_switch
from skipwise.sizes import GIB

Records = Callable[[Sequence[Draw]], Record]  # what is stored of a batch of draws, on any device
PlaceMode = Literal["restart", "keep"]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; what decides the memory is in FinetuneSettings.

    steps: updates of the adapter, each of `accumulate` batches; the learning rate rises over `warmup` of them.
    draws: samples of every picture, which are gone through again and again, so that their residuals are made once; 0
    takes new ones all through the training, and needs the whole base model in memory.
    schedule: of the crops' sides; by default they grow linearly from the training resolution to the whole picture.
    place: "restart" tells the model nothing of where a crop was, "keep" does where its positions allow, at batch 1.
    center_crop: crops are taken from the central square of every picture, otherwise from everywhere; random_flip: half
    of the draws are of the mirrored picture; both as in diffusers' DreamBooth scripts, which have them off.
    guidance: the scale that a distilled model is told, None for the family's own (3.5 for FLUX.1-dev).
    prior_weight: of pictures of the subject's class, against forgetting it (prior preservation, DreamBooth).
    """

    steps: int = 500
    learning_rate: float = 1e-4
    warmup: int = 0
    draws: int = 32
    schedule: PatchSchedule | None = None
    place: PlaceMode = "restart"
    center_crop: bool = False
    random_flip: bool = False
    guidance: float | None = None
    prior_weight: float = 1.0
    accumulate: int = 1
    clip: float = 1.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "accumulate": 1, "checkpoint_every": 1, "draws": 0, "warmup": 0, "seed": 0}
        for name, number in least.items():
            check_number(name, getattr(self, name), number)
        for name in ("learning_rate", "prior_weight", "clip"):
            check_number(name, getattr(self, name), 0, whole=False)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, whole=False)
        for name in ("center_crop", "random_flip"):
            check_switch(name, getattr(self, name))
        if not self.learning_rate > 0:
            raise UserError(f"The learning rate is {self.learning_rate}; give a number above 0, such as 1e-4.")
        if self.place not in get_args(PlaceMode):
            raise unknown("place of crops", self.place, get_args(PlaceMode))

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))

    def crops(self, settings: FinetuneSettings) -> PatchSchedule:
        """The schedule of the crops' sides, as fractions of a picture's short side."""
        return self.schedule or PatchSchedule("linear", settings.pixels / settings.resolution, 1.0)


@dataclass(frozen=True)
class Batch:
    """Draws as the transformer takes them: arguments of one forward, and what its loss needs, each (batch, ...)."""

    inputs: dict[str, Any]
    latents: Tensor
    noise: Tensor
    t: Tensor
    weights: Tensor


@dataclass
class Samples:
    """Makes batches of draws, the same when residuals are made and when they are used."""

    family: Family
    transformer: nn.Module
    prepared: Prepared
    settings: FinetuneSettings
    place: PlaceMode = "restart"
    device: str = "cpu"

    def on(self, device: str) -> "Samples":
        """The same, whose batches are elsewhere."""
        return replace(self, device=device)

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """The batch of these draws. All is worked out on the CPU: a record is of the same bits, wherever it is used."""
        latents = torch.stack([self.prepared.latents[DrawKey.of(draw).digest] for draw in draws])
        noise = torch.stack([draw.noise(latents.shape[1:]) for draw in draws])
        t = torch.tensor([draw.t for draw in draws])
        rows = [self.prepared.texts[draw.example.prompt] for draw in draws]
        text = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        noisy = self.family.noisy(latents, noise, t)
        inputs = self.family.inputs(self.transformer, noisy, t, text, self._place(draws))
        weights = torch.tensor([draw.example.weight for draw in draws])
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), (inputs, latents, noise, t, weights))
        return Batch(*moved)

    def _place(self, draws: Sequence[Draw]) -> Place | None:
        if self.place == "restart":
            return None
        multiple = self.family.multiple(self.transformer)
        tokens, grid = self.settings.pixels // multiple, self.settings.resolution // multiple
        return place_in_picture(draws[0].patch, draws[0].example.picture.size, tokens, grid)


@dataclass
class Trainer:
    """A run over hollow `shell`. groups: lists of draws of which each batch takes `settings.batch` (subject, prior).

    folder: where train.jsonl and the checkpoint are kept. of: what the run is of, see Checkpoint.
    """

    shell: Shell
    samples: Samples
    records: Records
    groups: Sequence[Sequence[Draw]]
    settings: FinetuneSettings
    training: TrainingSettings
    folder: Path
    of: dict[str, Any]
    parameters: list[nn.Parameter]
    accelerator: Any
    lines: list[dict[str, Any]] = field(default_factory=list)
    peak: Bytes = field(default_factory=Bytes)  # by part, of the one step that was measured

    def __post_init__(self) -> None:
        self.optimizer = optimizer_class(self.settings)(self.parameters, lr=self.training.learning_rate)
        self.checkpoint = Checkpoint(self.folder / "state.pt", self.of)

    def train(self, on_progress: Callable[[int, int, str], None] | None = None, stop_after: int | None = None) -> int:
        """All steps that are left; returns how many are done. on_progress(step, steps, "loss ..., GiB ...").

        stop_after: end early, as if killed after that step. Raises UserError when the loss is not finite.
        """
        first = self.checkpoint.resume(self.parameters, self.optimizer)
        measured = min(first + 1, self.training.steps - 1)  # by then the optimiser has its state
        self.lines = [line for line in read_log(self.folder / "train.jsonl") if line["step"] <= first]
        last = min(self.training.steps, stop_after or self.training.steps)
        losses, began = [], time.monotonic()
        for step in range(first, last):
            losses.append(self._measured(step) if step == measured and not self._on_gpu else self._step(step))
            if on_progress:
                seconds = (time.monotonic() - began) / (step + 1 - first)
                on_progress(step + 1, self.training.steps, self._told(losses[-1], seconds))
            if (step + 1) % self.training.checkpoint_every == 0 or step + 1 == self.training.steps:
                self._keep(step + 1, losses, time.monotonic() - began)
                losses, began, first = [], time.monotonic(), step + 1
        return last

    def _told(self, loss: float, seconds: float) -> str:
        return f"loss {loss:.4f}, {self.peak_bytes / GIB:.3g} GiB, {seconds:.2g} s a step"

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.samples.device).type == "cuda"

    @property
    def peak_bytes(self) -> int:
        """The most memory of a step so far: what a GPU's allocator says, else that of the tensors that were counted."""
        return torch.cuda.max_memory_allocated(self.samples.device) if self._on_gpu else self.peak.total

    def _measured(self, step: int) -> float:
        """A step whose tensors are counted."""
        tracker, trained = PeakMemory(), {id(parameter) for parameter in self.parameters}
        held = [*self.shell.model.parameters(), *self.shell.model.buffers()]
        tracker.label((tensor for tensor in held if id(tensor) not in trained and not tensor.is_meta), "weights")
        tracker.label(self.parameters, "lora")
        tracker.label(self.optimizer.state.values(), "optimiser")
        with tracker:
            loss = self._step(step)
        self.peak = tracker.peak
        return loss

    def _step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(step)
        total = 0.0
        for part in range(self.training.accumulate):
            loss = self._loss(step * self.training.accumulate + part) / self.training.accumulate
            self._check(loss, step)
            self.accelerator.backward(loss)
            total += float(loss.detach())
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, number: int) -> Tensor:
        """Of batch `number` of the run: the mean over its draws, weighted."""
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        draws = [
            draw for group in self.groups for draw in batch_of(group, number, self.settings.batch, self.training.seed)
        ]
        batch = self.samples(draws)
        self.shell.feed({name: tuple(t if t is None else t.to(self.samples.device) for t in streams)
                         for name, streams in self.records(draws).items()})  # fmt: skip
        with computing(self.settings, torch.device(self.samples.device).type):
            output = self.shell.model(**batch.inputs, return_dict=False)
        family = self.samples.family
        losses = family.loss(family.prediction(output, batch.latents), batch.latents, batch.noise, batch.t)
        return (losses * batch.weights).mean()

    def _check(self, loss: Tensor, step: int) -> None:
        if not math.isfinite(float(loss.detach())):
            kept = self.checkpoint.path if self.checkpoint.path.exists() else "none yet"
            raise UserError(
                f"The loss is {float(loss.detach())} at step {step + 1}. Lower the learning rate "
                f"({self.training.learning_rate:g}) or choose dtype float32; the last checkpoint is {kept}."
            )

    def _keep(self, step: int, losses: Sequence[float], seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        line = {
            "step": step,
            "loss": sum(losses) / len(losses),
            "seconds_a_step": seconds / len(losses),
            "peak_bytes": self.peak_bytes,
            "peak_by_part": self.peak.as_dict(),
        }
        self.lines.append(line)
        write_atomically(self.folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self.checkpoint.save(step, self.parameters, self.optimizer)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a train.jsonl; none without the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def optimizer_class(settings: FinetuneSettings) -> Any:
    """AdamW, or the one of bitsandbytes with its state in 8 bits. Raises UserError where that is not installed."""
    if settings.optimiser == "adamw":
        return torch.optim.AdamW
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "Optimiser adamw8bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or take adamw."
        ) from error
    return bitsandbytes.optim.AdamW8bit
