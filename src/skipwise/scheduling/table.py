"""What a search found, as a table of every schedule and as a Result of those that were confirmed."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from skipwise.evaluation.result import Interval, Result, Row
from skipwise.evaluation.rows import Run, judged
from skipwise.files import write_atomically
from skipwise.plan import Plan
from skipwise.scheduling.trials import Outcome

FORMAT = "skipwise-schedules/1"
NOTE = (
    "Schedules are ranked on the examples of the search, where the best of many looks better than it is; `confirmed` "
    "scores are on examples that no schedule was chosen by."
)


class Found(BaseModel):
    """One schedule: rank and last round, from 1; why it was dropped, None of a finalist; and how it did.

    scores (first metric of each task), retention and saved FLOPs are on the `examples` that it ran on, FLOPs as they
    happened; one that never ran has those of the formula. importance: what the screen foretold. confirmed: its row on
    the held-out examples.
    """

    model_config = ConfigDict(frozen=True)

    rank: int
    segments: str
    round: int | None
    dropped: str | None
    examples: int
    scores: dict[str, float]
    retention: float | None
    saved_block_flops: float
    saved_all_in_flops: float
    importance: float | None = None
    plan: Plan
    confirmed: Row | None = None

    def line(self) -> dict[str, Any]:
        """Flat, for a table; without seconds, so that equal searches give equal files."""
        line = self.model_dump(exclude={"plan", "confirmed", "scores"})
        line |= {f"score {task}": value for task, value in self.scores.items()}
        if self.confirmed is None:
            return line
        for task, score in self.confirmed.scores.items():
            line |= _parts(f"confirmed {task}", score.value)
        line |= _parts("confirmed retention", self.confirmed.mean_retention)
        for what in ("saved_block_flops", "saved_all_in_flops"):
            line[f"confirmed {what}"] = getattr(self.confirmed, what)
        return line


def _parts(name: str, value: Interval | None) -> dict[str, float]:
    return {name: value.value, f"{name} low": value.low, f"{name} high": value.high} if value else {}


@dataclass(frozen=True)
class Search:
    """Every schedule, best first, the paper's sandwich for comparison, and a Result of what was confirmed."""

    found: tuple[Found, ...]
    result: Result

    @property
    def best(self) -> Found:
        """The schedule that kept the most."""
        return self.found[0]

    def save(self, folder: str | Path) -> Path:
        """Write table.json and table.csv (all schedules), result.json (for reports), plan.json (the best one)."""
        folder = Path(folder)
        lines = [one.line() for one in self.found]
        write_atomically(
            folder / "table.json", json.dumps({"format": FORMAT, "note": NOTE, "rows": lines}, indent=1) + "\n"
        )
        write_atomically(folder / "table.csv", _csv(lines))
        self.result.save(folder / "result.json")
        return self.best.plan.save(folder / "plan.json")


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def row(method: str, plan: Plan | None, outcome: Outcome, whole: Outcome, seed: int) -> Row:
    """A Result's row from outcomes on the same examples; plan None is the whole model."""
    return judged(plan, _run(outcome), _run(whole), seed, method)


def _run(outcome: Outcome) -> Run:
    return Run(outcome.scores, outcome.block_flops, outcome.all_in_flops, outcome.seconds)
