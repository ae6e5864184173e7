"""A trial: a plan on a range of a task's examples. And the work that trials are part of, which any process can open.

An example's noise depends on its own number and seed alone, a range is cut into batches the same way wherever it runs,
and every process computes with the same number of threads: so a trial has the same outcome, bit for bit, in this
process, in another one and on another machine of the same kind.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from skipwise.errors import UserError
from skipwise.evaluation.measure import Measured
from skipwise.evaluation.tasks import EvaluationTask
from skipwise.loading import find, find_tokenizer, load
from skipwise.loading.tokenizers import FILES
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.sampling.accounts import Share, account
from skipwise.sampling.denoiser import denoising
from skipwise.sampling.others import load_other
from skipwise.versions import versions

COUNTS = ("examples", "samples")  # what tasks call the number of their examples

Task = TypeVar("Task", bound=EvaluationTask)
Scores = dict[str, list[Measured]]  # task name -> its metrics


@dataclass(frozen=True)
class Work:
    """All that a process needs to run trials: models by the names that `load` takes, tasks, where and how to compute.

    tasks: frozen dataclasses such as `ExactMatch` or `Writing`, with a field `first` and one of `COUNTS`, which every
    trial sets. others: the models that plans' phases name. threads: of torch, while a trial runs. tokenizer: another
    one than the model's own, by a name that `load` takes.
    Raises UserError for tasks that cannot be run by ranges.
    """

    model: str
    tasks: tuple[EvaluationTask, ...]
    others: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    threads: int = 1
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            count_field(task)
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise UserError(f"A search needs tasks of different names, at least one; these are {names}.")

    @property
    def tokens(self) -> int:
        """Length of the longest task's sequences."""
        return max(task.tokens for task in self.tasks)

    def identity(self) -> dict[str, Any]:
        """What the outcome of a trial depends on beside the trial, as JSON: weights by their checksum, not by name."""
        return {
            "model": weights_sum(self.model),
            "others": {name: weights_sum(name) for name in self.others},
            "tasks": {task.name: _settings(task) for task in self.tasks},
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "versions": versions(),
            **({"tokenizer": tokenizer_sum(self.tokenizer)} if self.tokenizer else {}),
        }

    def open(self) -> "OpenWork":
        """Load the models. Raises UserError for those that cannot be searched over."""
        return OpenWork(self)


@dataclass(frozen=True)
class Trial:
    """A plan (None is the whole model) on the examples from number `begin` up to `end` of every task.

    label: for messages and records, such as the segments of a schedule.
    """

    plan: Plan | None
    begin: int
    end: int
    label: str = "whole model"

    def __str__(self) -> str:
        return f"{self.label} on examples {self.begin} to {self.end}"

    def key(self, identity: dict[str, Any]) -> str:
        """Names the trial among all trials of works of this identity, whatever it is labelled."""
        plan = self.plan and {
            "shape": self.plan.model.model_dump(),
            "phases": [phase.model_dump() for phase in self.plan.phases],
            "stand_ins": self.plan.stand_ins and self.plan.stand_ins.sha256,
            "adapter": self.plan.adapter and self.plan.adapter.sha256,
        }
        content = json.dumps([identity, plan, self.begin, self.end], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a trial gave, example by example, and what it took as it happened.

    forwards: calls of each model, "" is the plan's own; FLOPs by formula, of all examples; seconds: wall-clock.
    """

    scores: Scores
    forwards: dict[str, int] = field(default_factory=dict)
    block_flops: int = 0
    all_in_flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Outcome") -> "Outcome":
        """The outcome on two ranges, one after the other."""
        if not self.scores:
            return other
        names = dict.fromkeys([*self.forwards, *other.forwards])
        return Outcome(
            {
                task: [_joined(*pair) for pair in zip(self.scores[task], other.scores[task], strict=True)]
                for task in self.scores
            },
            {name: self.forwards.get(name, 0) + other.forwards.get(name, 0) for name in names},
            self.block_flops + other.block_flops,
            self.all_in_flops + other.all_in_flops,
            self.seconds + other.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON, from which `from_json` makes the same outcome to the bit."""
        scores = {
            task: [
                {
                    "metric": m.metric,
                    "numerators": m.numerators.tolist(),
                    "denominators": m.denominators.tolist(),
                    "perplexity": m.perplexity,
                }
                for m in metrics
            ]
            for task, metrics in self.scores.items()
        }
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": scores}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Outcome":
        """Read what `to_json` gave."""
        scores = {
            task: [
                Measured(m["metric"], np.array(m["numerators"]), np.array(m["denominators"]), m["perplexity"])
                for m in metrics
            ]
            for task, metrics in content["scores"].items()
        }
        return cls(**content | {"scores": scores})


def _joined(first: Measured, second: Measured) -> Measured:
    return replace(
        first,
        numerators=np.concatenate([first.numerators, second.numerators]),
        denominators=np.concatenate([first.denominators, second.denominators]),
    )


class OpenWork:
    """Loaded models, and trials run on them one after the other."""

    def __init__(self, work: Work):
        self.work = work
        self.model, self.tokenizer = load(work.model, dtype=work.dtype, device=work.device, tokenizer=work.tokenizer)
        if kind_of(self.model) != "masked diffusion":
            raise UserError(
                f"{work.model} is of the kind {kind_of(self.model)!r}, which has no denoising steps to schedule; "
                "name a masked diffusion model."
            )
        self.others = {name: load_other(name, self.model, self.tokenizer) for name in work.others}

    def run(self, trial: Trial) -> Outcome:
        """Every task on the trial's range under its plan."""
        began = time.perf_counter()
        scores: Scores = {}
        forwards: dict[str, int] = {}
        taken = Share()
        with _threads(self.work.threads):
            for task in self.work.tasks:
                with denoising(self.model, trial.plan, self.others, tokenizer=self.tokenizer) as denoiser:
                    scores[task.name] = ranged(task, trial.begin, trial.end).run(denoiser, self.tokenizer)
                for name, share in account(denoiser).items():
                    forwards[name or ""] = forwards.get(name or "", 0) + share.forwards
                    taken += share
        return Outcome(scores, forwards, taken.block_flops, taken.all_in_flops, time.perf_counter() - began)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's intra-op threads, put back afterwards: sums are split by thread, so their rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_field(task: EvaluationTask) -> str:
    """What a task calls the number of its examples. Raises UserError for a task that has no ranges."""
    names = {f.name for f in fields(task)}  # type: ignore[arg-type]
    found = [name for name in COUNTS if name in names]
    if not found or "first" not in names:
        raise UserError(f"Task {task.name!r} cannot be run by ranges of examples; use an exact-answer task or writing.")
    return found[0]


def ranged(task: Task, begin: int, end: int) -> Task:
    """The task on its examples from number `begin` up to `end`."""
    return replace(task, first=begin, **{count_field(task): end - begin})  # type: ignore[type-var]


def _settings(task: EvaluationTask) -> dict[str, Any]:
    """What a task is told, but for the range; a judge by its weights."""
    told = asdict(task)  # type: ignore[call-overload]
    rest = {key: value for key, value in told.items() if key not in ("first", count_field(task))}
    if "judge" in rest:
        rest["judge"] = weights_sum(rest["judge"])
    return {"kind": type(task).__name__, **json.loads(json.dumps(rest))}


def weights_sum(name: str) -> str:
    """sha256 over a model's config and weights, as they lie on disk."""
    source = find(name)
    weights = sorted(path.name for path in source.folder.glob("*.safetensors"))
    return _sum(source.folder, [source.gguf] if source.gguf else ["config.json", *weights])


def tokenizer_sum(name: str) -> str:
    """sha256 over the files of a tokenizer, as they lie on disk."""
    source = find_tokenizer(name)
    names = [*FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json"]
    return _sum(source.folder, [source.gguf] if source.gguf else [n for n in names if (source.folder / n).exists()])


def _sum(folder: Path, names: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in names:
        with (folder / part).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
