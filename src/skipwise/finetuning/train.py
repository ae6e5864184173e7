"""The training loop of a fine-tuning: LoRA on the blocks that are left, fed with what the skipped ones would give."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from skipwise.checkpoints import Checkpoint
from skipwise.errors import UserError, unknown
from skipwise.files import write_atomically
from skipwise.finetuning.draws import Draw, batch_of
from skipwise.finetuning.families import Family
from skipwise.finetuning.hollow import Record, Shell
from skipwise.finetuning.patches import PatchSchedule, Place, place_in_picture
from skipwise.finetuning.precision import computing
from skipwise.finetuning.prepare import Prepared
from skipwise.finetuning.residuals import DrawKey
from skipwise.finetuning.settings import FinetuneSettings

Records = Callable[[Sequence[Draw]], Record]  # what is stored of a batch of draws, on any device
PlaceMode = Literal["restart", "keep"]
GIB = 2**30


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; what decides the memory is in FinetuneSettings.

    steps: updates of the adapter, each of `accumulate` batches; the learning rate rises over `warmup` of them.
    draws: samples of every picture, which are gone through again and again, so that their residuals are made once; 0
    takes new ones all through the training, and needs the whole base model in memory.
    schedule: of the crops' sides; by default they grow linearly from the training resolution to the whole picture.
    place: "restart" tells the model nothing of where a crop was, "keep" does where its positions allow, at batch 1.
    prior_weight: of pictures of the subject's class, against forgetting it (prior preservation, DreamBooth).
    """

    steps: int = 500
    learning_rate: float = 1e-4
    warmup: int = 0
    draws: int = 32
    schedule: PatchSchedule | None = None
    place: PlaceMode = "restart"
    prior_weight: float = 1.0
    accumulate: int = 1
    clip: float = 1.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"A fine-tuning's {name} is {getattr(self, name)}; give a whole number above 0.")
        for name in ("draws", "warmup", "prior_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"A fine-tuning's {name} is {getattr(self, name)}; give 0 or more.")
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
        """The batch of these draws."""
        latents = torch.stack([self.prepared.latents[DrawKey.of(draw).digest] for draw in draws]).to(self.device)
        noise = torch.stack([draw.noise(latents.shape[1:]) for draw in draws]).to(self.device)
        t = torch.tensor([draw.t for draw in draws], device=self.device)
        rows = [self.prepared.texts[draw.example.prompt] for draw in draws]
        text = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}
        noisy = self.family.noisy(latents, noise, t)
        inputs = self.family.inputs(self.transformer, noisy, t, text, self._place(draws))
        weights = torch.tensor([draw.example.weight for draw in draws], device=self.device)
        return Batch(inputs, latents, noise, t, weights)

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

    def __post_init__(self) -> None:
        self.optimizer = optimizer_class(self.settings)(self.parameters, lr=self.training.learning_rate)
        self.checkpoint = Checkpoint(self.folder / "state.pt", self.of)

    def train(self, on_progress: Callable[[int, int, str], None] | None = None, stop_after: int | None = None) -> int:
        """All steps that are left; returns how many are done. on_progress(step, steps, "loss ..., GiB ...").

        stop_after: end early, as if killed after that step. Raises UserError when the loss is not finite.
        """
        first = self.checkpoint.resume(self.parameters, self.optimizer)
        self.lines = [line for line in read_log(self.folder / "train.jsonl") if line["step"] <= first]
        last = min(self.training.steps, stop_after or self.training.steps)
        losses, began = [], time.monotonic()
        for step in range(first, last):
            losses.append(self._step(step))
            if on_progress:
                seconds = (time.monotonic() - began) / (step + 1 - first)
                on_progress(
                    step + 1, self.training.steps, f"loss {losses[-1]:.4f}, {peak_gib():.2f} GiB, {seconds:.2g} s"
                )
            if (step + 1) % self.training.checkpoint_every == 0 or step + 1 == self.training.steps:
                self._keep(step + 1, losses, time.monotonic() - began)
                losses, began, first = [], time.monotonic(), step + 1
        return last

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
            "peak_gib": peak_gib(),
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


def peak_gib() -> float:
    """The most memory so far: of the GPU, as torch's allocator counts it, or else of this process (resident set)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
