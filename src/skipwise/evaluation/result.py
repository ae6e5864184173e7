"""Result: one evaluation of a model under a list of plans, as one JSON object. Reports are made from these alone."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from skipwise.files import read_model, write_atomically
from skipwise.plan import Plan

FORMAT = "skipwise-result/1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Frozen):
    """An estimate with its 95% bootstrap confidence interval."""

    value: float
    low: float
    high: float


class Score(_Frozen):
    """What a model scored on one task under one plan.

    `metric` is "exact match", "next-token accuracy", "distinct-2" and the like (fractions, higher is better),
    "perplexity" or "generative perplexity" (lower is better), "token entropy" (nats) or "tokens scored".
    `retention` is the score under the plan over the score without one, on the same examples; of a perplexity the other
    way round. `outcomes` of a metric
    that is right or wrong: "1" or "0" for every example in order, so that any two rows can be compared in pairs.
    `parts` of a task's first metric that is not: numerator and denominator of every example, for the same purpose.
    """

    metric: str
    value: Interval
    examples: int
    retention: Interval | None = None
    outcomes: str | None = None
    parts: tuple[tuple[float, float], ...] | None = None

    @property
    def is_fraction(self) -> bool:
        """Whether the score can be written as a percentage."""
        return not self.metric.endswith(("perplexity", "entropy", "scored"))


class Row(_Frozen):
    """One plan's outcome. `plan` None is the whole model.

    method and k group rows in figures ("similarity", "random", ...; k blocks skipped). Saved FLOPs are fractions of
    the whole model's: `saved_block_flops` counts the blocks alone (the papers' count), `saved_all_in_flops` also
    the head, embeddings and attention at the length evaluated. `seconds` is measured wall-clock of the evaluation.
    """

    plan: Plan | None
    method: str
    k: int
    saved_block_flops: float
    saved_all_in_flops: float
    seconds: float
    scores: dict[str, Score]
    mean_retention: Interval | None = None


class Result(_Frozen):
    """All rows for one model, and what is needed to repeat them."""

    format: Literal["skipwise-result/1"] = "skipwise-result/1"
    name: str
    kind: str
    model: dict[str, Any]
    rows: tuple[Row, ...]
    device: str
    dtype: str
    seeds: dict[str, int]
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    date: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(row.plan is None for row in self.rows) != 1:
            raise ValueError("a Result has one row without a plan, with which the others are compared")
        return self

    def save(self, path: str | Path) -> Path:
        """Write the result as one JSON object, whole or not at all."""
        return write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a result, whose plans find their companions in `plans` beside it. Raises UserError for anything else."""
        result = read_model(cls, path, FORMAT, "skipwise eval")
        for row in result.rows:
            if row.plan is not None:
                row.plan._folder = Path(path).parent / "plans"
        return result
