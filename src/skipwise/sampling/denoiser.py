"""Running a model for a sampler: the plan is followed, the callback told, and every forward entered in the accounts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skipwise.models import mask_token
from skipwise.skipping import Cut, Skipping, cut_now


@dataclass(frozen=True)
class Step:
    """One denoising step, announced before its forward. `sequences` is (batch, length), shared, not a copy.

    index counts steps from 0, of `total` at most; progress is how far through the trajectory the step starts, 0 = all
    noise, 1 = done.
    """

    index: int
    total: int
    sequences: Tensor
    progress: float


@dataclass(frozen=True)
class Forward:
    """One call of the model as it happened: what was cut out of it, and how many sequences it saw."""

    cut: Cut
    rows: int


@dataclass
class Denoiser:
    """A masked diffusion model as samplers see it. `skipping` is the plan in force, `on_step` a user's callback."""

    model: nn.Module
    skipping: Skipping | None = None
    on_step: Callable[[Step], None] | None = None
    forwards: list[Forward] = field(default_factory=list)

    @property
    def mask_token(self) -> int:
        """Id of the model's mask token. Raises UserError when its config has none."""
        return mask_token(self.model)

    def at(self, progress: float) -> Cut:
        """Move to the plan's phase at `progress`; returns what is cut out there, so that caches can be dropped."""
        if self.skipping is not None:
            self.skipping.at(progress)
        return cut_now(self.model)

    def __call__(self, step: Step, inputs: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Logits (rows, length, vocabulary) of `inputs` (rows, length) at this step. `others` go to the model."""
        cut = self.at(step.progress)
        if self.on_step is not None:
            self.on_step(step)
        self.forwards.append(Forward(cut, len(inputs)))
        return self.model(input_ids=inputs, attention_mask=attention_mask, **others).logits
