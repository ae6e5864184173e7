"""The sequences that a sampler really goes through, to calibrate on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skipwise.calibration import Moment, Visited
from skipwise.errors import UserError
from skipwise.evaluation.tasks import EvaluationTask
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.prediction import Prediction


@dataclass
class _Recorder(Denoiser):
    """A denoiser that remembers what it was given."""

    moments: list[Moment] = field(default_factory=list)

    def predict(
        self, step: Step, inputs: Tensor, attention_mask: Tensor | None = None, *rest: Any, **others: Any
    ) -> Prediction:
        """As a denoiser's."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UserError("Padded prompts cannot be calibrated on; use a task whose prompts are of equal length.")
        self.moments += [Moment(tuple(row), 0, step.progress) for row in inputs.tolist()]
        return super().predict(step, inputs, attention_mask, *rest, **others)


def visit(
    model: nn.Module, tokenizer: Any, tasks: Sequence[EvaluationTask], *, most: int = 4096, batch_size: int = 256
) -> Visited:
    """What the whole model sees while it works on tasks (of the calibration split), in every forward.

    most: moments that are kept, evenly spread over all there were. Raises UserError when the tasks run no diffusion.
    """
    recorder = _Recorder(model)
    for task in tasks:
        task.run(recorder, tokenizer)
    moments = recorder.moments
    if not moments:
        raise UserError(f"{', '.join(t.name for t in tasks)}: nothing is denoised; use a masked diffusion model.")
    step = max(1, -(-len(moments) // most))
    return Visited(model, moments[::step], batch_size=batch_size)
