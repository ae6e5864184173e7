"""`heal`: a LoRA on the blocks that are left, trained so that the skipped model predicts what the whole one does.

Self-distillation: the model without the plan is its own teacher, on any text, so that no labels are needed. LoRA by
peft (Hu et al., arXiv 2106.09685); the adapter is a folder as peft writes it, and travels with the plan.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from skipwise.adapters import check_mergeable
from skipwise.blocks import find_contract, module_list
from skipwise.calibration import Batch, Calibration, divergence
from skipwise.checkpoints import Checkpoint
from skipwise.errors import UserError, require
from skipwise.files import partial_folder
from skipwise.finite import is_finite, not_finite
from skipwise.identity import identity
from skipwise.plan import Plan
from skipwise.skipping import Skipping, skip, whole
from skipwise.typed import check_types


@dataclass(frozen=True)
class HealSettings:
    """How to train. rank and alpha are LoRA's; the learning rate rises over a tenth of the steps and falls to zero."""

    steps: int = 500
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate={self.learning_rate}; it must be above 0, such as 0.002.")
        for name in ("steps", "rank", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; it must be at least 1.")

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def heal(
    plan: Plan,
    calibration: Calibration,
    output: str | Path,
    settings: HealSettings | None = None,
    *,
    on_progress: Callable[[int, int, float], None] | None = None,
    stop_after: int | None = None,
) -> Plan:
    """Train an adapter for a plan and write the healed plan to `output`, with its adapter beside it.

    The loss is KL(whole || skipped) in nats a predicted token. A run that was killed goes on from its last checkpoint,
    which lies beside `output` until the run is done. The model is what it was afterwards.
    on_progress(step, steps, loss) is called after every step. stop_after: end early, as if killed after that step.
    Raises UserError for a plan of another model, one that is healed already, a quantised model, and without peft.
    """
    require("peft", "heal")
    settings = settings or HealSettings()
    check_mergeable(calibration.model)  # what is trained here is merged later
    plan.check_model(find_contract(calibration.model).shape)
    if plan.adapter is not None:
        raise UserError("The plan has an adapter already; heal the plan that it was made from.")
    output = Path(output)
    trainer = _Trainer(plan, calibration, settings, output.with_name(f".{output.stem}.heal.pt"))
    try:
        trainer.train(on_progress, stop_after)
        if stop_after is not None and stop_after < settings.steps:
            return plan
        return trainer.finish(output)
    finally:
        trainer.unload()


class _Trainer:
    def __init__(self, plan: Plan, calibration: Calibration, settings: HealSettings, checkpoint: Path):
        self.plan, self.calibration, self.settings = plan, calibration, settings
        self.model = calibration.model
        self.trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        of = self._what()  # before the adapter is there
        self.peft = _with_lora(self.model, plan, settings)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.checkpoint = Checkpoint(checkpoint, of)

    def train(self, on_progress: Callable[[int, int, float], None] | None, stop_after: int | None) -> None:
        """All steps that are left."""
        first = self.checkpoint.resume(self.parameters, self.optimizer)
        stream = self._stream()
        for _ in range(first):
            next(stream)
        with skip(self.model, self.plan) as skipping:
            for step in range(first, min(self.settings.steps, stop_after or self.settings.steps)):
                progress, batch = next(stream)
                loss = self._step(step, progress, batch, skipping)
                if on_progress:
                    on_progress(step + 1, self.settings.steps, loss)
                if (step + 1) % self.settings.checkpoint_every == 0:
                    self.checkpoint.save(step + 1, self.parameters, self.optimizer)

    def _stream(self) -> Iterator[tuple[float, Batch]]:
        """An endless stream of (progress, batch): every epoch goes once through the data of every phase."""
        epoch = 0
        while True:
            begin = 0.0
            for phase in self.plan.phases:
                for batch in self.calibration.batches(begin, phase.until, self.settings.seed * 100_000 + epoch):
                    yield begin, batch
                begin = phase.until
            epoch += 1

    def _step(self, step: int, progress: float, batch: Batch, skipping: Skipping) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        skipping.at(progress)
        with torch.no_grad(), self.peft.disable_adapter(), whole(self.model):
            wanted = batch.predictions(self.model)
        loss = divergence(wanted, batch.predictions(self.model)).mean()
        if not math.isfinite(float(loss.detach())):
            self._end_of_numbers(step, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _end_of_numbers(self, step: int, batch: Batch) -> NoReturn:
        """Raise UserError for a loss that is not finite: the model's fault, or that of the steps before."""
        with torch.no_grad(), self.peft.disable_adapter(), whole(self.model):
            if batch.predictions(self.model).isnan().any():
                raise not_finite(self.model, partial(self.model, input_ids=batch.inputs))
        raise UserError(
            f"The loss is not finite at step {step + 1}; lower the learning rate ({self.settings.learning_rate:g}), or "
            "load the model in float32."
        )

    def _what(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        data = {**self.calibration.facts, "batch_size": self.calibration.batch_size, "seed": self.calibration.seed}
        return identity(self.model, self.plan, settings=asdict(self.settings)) | {"calibration": data}

    def finish(self, output: Path) -> Plan:
        """Write the adapter and the plan, and forget the checkpoint. Raises UserError for an adapter that is none."""
        if not all(map(is_finite, self.parameters)):
            raise UserError(
                f"The adapter is not finite after {self.settings.steps} steps, and is not written; lower the learning "
                f"rate ({self.settings.learning_rate:g})."
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(output.parent) as work:
            self.peft.save_pretrained(work / "adapter", save_embedding_layers=False)
            healed = self.plan.with_adapter(work / "adapter", self._told())
            healed.save(output)
        self.checkpoint.remove()
        return Plan.load(output)

    def _told(self) -> dict[str, Any]:
        return {"heal": asdict(self.settings) | {"calibration": self.calibration.facts}}

    def unload(self) -> None:
        """Take the adapter out of the model, whose parameters are then trainable or not as they were."""
        self.peft.unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trainable[name])


def _with_lora(model: nn.Module, plan: Plan, settings: HealSettings) -> Any:
    """peft's model around `model`, with a LoRA on every linear layer of the blocks that some phase runs."""
    import peft

    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_targets(model, plan),
        bias="none",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what will have another name
        torch.manual_seed(settings.seed)
        wrapped = peft.get_peft_model(model, config)
    return wrapped.eval()


def _targets(model: nn.Module, plan: Plan) -> list[str]:
    stack = find_contract(model).main_stack
    never = set.intersection(*(set(phase.skip.get(stack, ())) for phase in plan.phases))
    found = [
        f"{stack}.{number}.{name}"
        for number, block in enumerate(module_list(model, stack))
        if number not in never
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not found:
        raise UserError(
            f"No block that is left in {stack} has a linear layer (torch.nn.Linear) for an adapter to change."
        )
    return found
