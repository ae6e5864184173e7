"""The Results of paper 2's studies, as the page and its claims read them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skipwise as sw
from skipwise.evaluation import Interval, Row, perplexity_ratio
from skipwise.scheduling.importance import Importance

TEXT, TASKS = "tiny-text", "tiny-dllm"
WRITING = "writing"
SELF = ("grid", "grid + linear stand-ins")
STATIC = ("static", "static + linear stand-ins", "greedy")


@dataclass(frozen=True)
class Pair:
    """A heavy and a light model of English: what was measured of them."""

    label: str
    importance: Importance
    placements: sw.Result
    prefix: sw.Result
    front: sw.Result


@dataclass(frozen=True)
class Solver:
    """A model of exact tasks: its front, and the placements of its light model."""

    label: str
    front: sw.Result
    placements: sw.Result


@dataclass(frozen=True)
class Found:
    """Everything in the folder. search: the table of the exhaustive search, and its Result."""

    pairs: list[Pair]
    solvers: list[Solver]
    search: dict[str, Any] | None
    search_result: sw.Result | None


def read(folder: Path) -> Found:
    """All studies whose files are there."""

    def result(label: str, what: str) -> sw.Result:
        return sw.Result.load(folder / f"{label}.{what}.json")

    pairs, solvers = [], []
    for path in sorted(folder.glob("*.front.json")):
        label = path.name.removesuffix(".front.json")
        if label.startswith(TEXT):
            importance = Importance.load(folder / f"{label}.importance.json")
            results = (result(label, what) for what in ("placements", "prefix", "front"))
            pairs.append(Pair(label, importance, *results))
        else:
            solvers.append(Solver(label, *(result(label, what) for what in ("front", "placements"))))
    table = folder / "search.table.json"
    if not table.exists():
        return Found(pairs, solvers, None, None)
    searched = json.loads(table.read_text(encoding="utf-8"))
    return Found(pairs, solvers, searched, sw.Result.load(folder / "search.result.json"))


def whole(result: sw.Result) -> Row:
    """The row of the heavy model alone."""
    return next(row for row in result.rows if row.plan is None)


def named(result: sw.Result, method: str) -> Row:
    """The first row of a method."""
    return next(row for row in result.rows if row.method == method)


def ratio(result: sw.Result, first: str, second: str | None = None) -> Interval:
    """Generative perplexity of one method over another's, or over the heavy model's, in pairs of samples."""
    other = whole(result) if second is None else named(result, second)
    return perplexity_ratio(named(result, first), other, WRITING)


def at_least(rows: Sequence[Row], saved: float) -> list[Row]:
    """Rows that save this fraction of all-in FLOPs or more; a saving is as fine as one block in one step."""
    return [row for row in rows if row.plan is not None and row.saved_all_in_flops >= saved - 1e-9]


def best(result: sw.Result, methods: Sequence[str], saved: float) -> Row | None:
    """Of rows of these methods (a trailing space: whatever begins so) that save enough, the one that keeps the most."""

    def wanted(method: str) -> bool:
        return any(method == name or (name.endswith(" ") and method.startswith(name)) for name in methods)

    rows = [row for row in at_least(result.rows, saved) if row.mean_retention and wanted(row.method)]
    return max(rows, key=lambda row: row.mean_retention.value if row.mean_retention else 0.0, default=None)
