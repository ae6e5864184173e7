"""The tasks that a model can be evaluated on, by name: the zoo's exact-answer tasks and held-out English text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from skipwise.errors import unknown
from skipwise.evaluation.measure import Measured
from skipwise.evaluation.text import TextTask
from skipwise.evaluation.texts import documents
from skipwise.evaluation.texts import names as text_names
from skipwise.models import kind_of
from skipwise.sampling.autoregressive import decode_autoregressive
from skipwise.sampling.denoiser import Denoiser
from skipwise.sampling.llada import LLaDASettings, decode
from skipwise.zoo.tasks import PROMPT_LENGTH, TASKS, distinct_examples
from skipwise.zoo.tokenizer import CHARACTERS

Split = Literal["calibration", "test"]


class EvaluationTask(Protocol):
    """A task measures a model on the same examples every time it is asked."""

    @property
    def name(self) -> str:
        """Name on the command line and in Results."""
        ...

    @property
    def tokens(self) -> int:
        """Length of the sequences that the model sees."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that scores depend on and that every Result must show; may be empty."""
        ...

    def run(self, denoiser: Denoiser, tokenizer: Any) -> list[Measured]:
        """Scores of every example; the first metric is the one that retention is about.

        denoiser: the model and the plan that is in force; a diffusion model is run through it, so that phases are
        followed and forwards counted.
        """
        ...


@dataclass(frozen=True)
class ExactMatch:
    """Generate the answer of each of a zoo task's prompts; an example scores 1 when every token is right.

    Greedy; a diffusion model of any family by LLaDA's rule, one token a step, so that scores can be compared. The
    examples are those from number `first` on of the task's stream.
    """

    name: str
    split: Split
    examples: int
    seed: int
    batch_size: int
    first: int = 0

    @property
    def tokens(self) -> int:
        """Length of prompt and answer."""
        return PROMPT_LENGTH + TASKS[self.name].answer_length

    @property
    def facts(self) -> dict[str, Any]:
        """None beyond those of every task."""
        return {}

    def run(self, denoiser: Denoiser, tokenizer: Any) -> list[Measured]:
        """One metric: exact match."""
        pairs = distinct_examples(self.name, self.split, self.first + self.examples, self.seed)[self.first :]
        batches = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        correct = np.concatenate([self._batch(denoiser, tokenizer, batch) for batch in batches])
        return [Measured("exact match", correct, np.ones(len(correct)))]

    def _batch(self, denoiser: Denoiser, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        model = denoiser.model
        device = next(model.parameters()).device
        prompts = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in pairs], device=device)
        answers = torch.tensor([tokenizer(answer)["input_ids"] for _, answer in pairs], device=device)
        length = answers.shape[1]
        if kind_of(model) == "masked diffusion":
            sequences = decode(denoiser, prompts, LLaDASettings(gen_length=length))
        else:
            sequences = decode_autoregressive(model, prompts, None, length, stop_at_eos=False)
        return (sequences[:, -length:] == answers).all(1).double().cpu().numpy()


def task_names() -> list[str]:
    """All tasks: the zoo's and the English texts."""
    return [*TASKS, *text_names()]


def default_tasks(tokenizer: Any) -> list[str]:
    """The zoo's tasks for a tokenizer that is the zoo's, else the English texts."""
    is_zoo = tokenizer is not None and set(CHARACTERS) <= set(tokenizer.get_vocab()) and len(tokenizer) < 64
    return list(TASKS) if is_zoo else text_names()


def build_task(name: str, split: Split, examples: int | None, seed: int, batch_size: int) -> EvaluationTask:
    """A task by name. `examples` are prompts (500 when None), or windows of a text (8 when None).

    Raises UserError, with the nearest name, for a task that there is not.
    """
    if name in TASKS:
        return ExactMatch(name, split, examples or 500, seed, batch_size)
    if name in text_names():
        return TextTask(name, split, examples or 8, seed)
    raise unknown("task", name, task_names())


def calibration_texts(
    tokenizer: Any, count: int = 256, seed: int = 0, tasks: Sequence[str] | None = None
) -> list[str | tuple[str, str]]:
    """About `count` texts of the calibration split: the zoo's examples, or pieces of English text.

    tasks: those that the texts come from, all that suit the tokenizer by default. Raises UserError for an unknown one.
    """
    names = list(tasks or default_tasks(tokenizer))
    for name in names:
        if name not in task_names():
            raise unknown("task", name, task_names())
    if names[0] in TASKS:
        pairs = (distinct_examples(name, "calibration", max(1, count // len(names)), seed) for name in names)
        return [pair for task in pairs for pair in task]
    pieces = (_pieces(documents("calibration")[name]) for name in names)
    return [piece for row in zip(*pieces, strict=False) for piece in row][:count]


def _pieces(text: str, characters: int = 1200) -> list[str]:
    """Consecutive pieces of a text, of about 256 tokens each."""
    return [text[i : i + characters] for i in range(0, len(text) - characters + 1, characters)]
