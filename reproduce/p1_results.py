"""The Results and states of paper 1's studies, as the page and its claims read them."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import skipwise as sw
from skipwise.evaluation import Row

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
