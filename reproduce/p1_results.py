"""The Results and states of paper 1's studies, as the page and its claims read them."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import skipwise as sw
from skipwise.evaluation import Interval, Row
from skipwise.files import write_atomically

KINDS = {"tiny-dllm": "native diffusion", "tiny-ar": "autoregressive", "tiny-ar2dllm": "AR-initialised diffusion"}
REAL = "smollm2-135m"


@dataclass(frozen=True)
class Study:
    """One model's Result and states."""

    label: str
    result: sw.Result
    states: dict[str, Any]

    def rows(self, method: str) -> dict[int, list[Row]]:
        """k -> rows of a method."""
        found: dict[int, list[Row]] = {}
        for row in self.result.rows:
            if row.method == method:
                found.setdefault(row.k, []).append(row)
        return found

    def row(self, method: str, k: int) -> Row | None:
        """The first row of a method at k."""
        return next(iter(self.rows(method).get(k, [])), None)

    def kept(self, method: str, k: int) -> float | None:
        """Mean retention, averaged over the plans of the method at k."""
        values = [row.mean_retention.value for row in self.rows(method).get(k, []) if row.mean_retention]
        return fmean(values) if values else None

    def third(self, name: str, part: int) -> float:
        """Mean over the first (0), middle (1) or last (2) third of the depth. Block 0 makes the stream: left out."""
        values = self.states["states"][name]
        size = len(values) // 3
        return fmean(values[max(1, part * size) : (part + 1) * size])

    def middle(self, name: str) -> float:
        """Mean over the boundary states that are neither embeddings nor the last."""
        return fmean(self.states["states"][name][1:-1])


def read(folder: Path) -> dict[str, Study]:
    """Label -> study, of every model that has both files."""
    found = {}
    for path in sorted(folder.glob("*.result.json")):
        label = path.name.removesuffix(".result.json")
        states = folder / f"{label}.states.json"
        if states.exists():
            found[label] = Study(label, sw.Result.load(path), json.loads(states.read_text(encoding="utf-8")))
    return found


def of_kind(studies: dict[str, Study], kind: str) -> list[Study]:
    """The seeds of one kind of model."""
    return [study for label, study in studies.items() if label.rpartition("-")[0] == kind]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float | None], digits: int = 3) -> str:
    """Mean (lowest to highest) over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{fmean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def shown(interval: Interval | None, digits: int = 3) -> str:
    """Value (95% interval)."""
    if interval is None:
        return "-"
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def write_page(what: str | None, page_of: Callable[[Path], str]) -> None:
    """The command line of a page: its text is made of the Results in a folder."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    given = parser.parse_args()
    write_atomically(given.page, page_of(given.results))
