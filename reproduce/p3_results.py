"""What docs/results/p3.md is made from: estimates of memory, and scores of every way of fine-tuning tiny-dit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.evaluation import Interval
from skipwise.evaluation.pictures import over_seeds

GROUPS = ("tricks", "late", "rules", "schedules")
BEFORE, LORA, BLOCKSKIP = "as it was", "LoRA on all blocks", "BlockSkip"
LAST = "last half, exact, whole pictures"


@dataclass(frozen=True)
class Way:
    """A way of fine-tuning: scores of all runs, and what a training step took, measured. Bytes are of tensors."""

    name: str
    similarities: tuple[float, ...]
    fidelities: tuple[float, ...]
    trained: str
    peak: int
    seconds: float

    @property
    def similarity(self) -> Interval:
        """Mean with a 95% bootstrap over runs."""
        return mean_of(self.similarities)

    @property
    def fidelity(self) -> Interval:
        """As similarity."""
        return mean_of(self.fidelities)


@dataclass(frozen=True)
class Found:
    """memory: as benchmarks/memory_finetune.py writes it, and its tables; groups: ways in their order; itself: how
    alike the subject's own pictures are; crops: as benchmarks/patch_space.py writes it; models: of tiny-dit.
    """

    memory: Mapping[str, Any]
    tables: str
    groups: Mapping[str, Sequence[Way]]
    itself: float
    crops: Mapping[str, Any]
    training: Mapping[str, Any]
    models: int

    def way(self, name: str) -> Way:
        """The way of this name."""
        return next(way for ways in self.groups.values() for way in ways if way.name == name)

    @property
    def runs(self) -> int:
        """Fine-tunings of every way."""
        return len(self.way(LORA).similarities)


def mean_of(values: Sequence[float]) -> Interval:
    """Mean with a 95% bootstrap."""
    return over_seeds(np.array(values)[:, None])


def gain(way: Way, over: Way) -> Interval:
    """Of similarity, in pairs: both were trained and drawn with the same seeds."""
    return mean_of([one - other for one, other in zip(way.similarities, over.similarities, strict=True)])


def read(folder: Path) -> Found:
    """All Results in a folder. GROUP.json is of the shipped model, GROUP-SEED.json of others."""
    contents = {group: [_json(path) for path in _files(folder, group)] for group in GROUPS}
    first = contents["tricks"][0]
    return Found(
        _json(folder / "memory.json"),
        (folder / "memory.md").read_text(encoding="utf-8"),
        {group: _joined(found) for group, found in contents.items()},
        float(np.mean([content["of_the_subject_itself"] for content in contents["tricks"]])),
        _json(folder / "crops.json"),
        first["training"],
        len(contents["tricks"]),
    )


def _files(folder: Path, group: str) -> list[Path]:
    return [folder / f"{group}.json", *sorted(folder.glob(f"{group}-*.json"))]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _joined(contents: Sequence[Any]) -> list[Way]:
    """The runs of all models, way by way; memory and seconds are of the first model."""
    ways = []
    for of_models in zip(*(content["outcomes"] for content in contents), strict=True):
        scores = [
            [s for o in of_models for s in o[key]["of_seeds"]] for key in ("subject_similarity", "prompt_fidelity")
        ]
        one = of_models[0]
        peak = sum((one["peak_bytes_measured"] or {}).values())
        ways.append(Way(one["way"], *map(tuple, scores), one["trained"], peak, one["seconds_a_step"] or 0.0))
    return ways
