"""What `skipwise demo --image` shows: one row a way with its pictures, scores and costs, as a table and as a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich import box
from rich.table import Table

from skipwise.evaluation.result import Interval
from skipwise.files import write_atomically

COLUMNS = (
    "way",
    "subject similarity",
    "prompt fidelity",
    "peak of a training step",
    "seconds a step",
    "blocks trained",
)
ENLARGED = 2  # screen pixels a pixel


@dataclass(frozen=True)
class Outcome:
    """What a way gives: pictures[seed][prompt] (height, width, 3) uint8, how like the subject they are, how many of
    the prompts' colours they have, and what training took. None for the model as it was.

    similarities, fidelities: of each picture; similarity, fidelity: their means with 95% bootstraps over seeds.
    """

    name: str
    pictures: list[list[np.ndarray]]
    similarities: np.ndarray
    fidelities: np.ndarray
    similarity: Interval
    fidelity: Interval
    trained: str = ""
    peak: dict[str, int] | None = None
    seconds_a_step: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        return {
            "way": self.name,
            "subject_similarity": self.similarity.model_dump() | {"of_seeds": _means(self.similarities)},
            "prompt_fidelity": self.fidelity.model_dump() | {"of_seeds": _means(self.fidelities)},
            "trained": self.trained,
            "peak_bytes_measured": self.peak,
            "seconds_a_step": self.seconds_a_step,
        }


def _means(scores: np.ndarray) -> list[float]:
    return [round(float(mean), 4) for mean in scores.mean(1)]


def rows_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The table's cells. Less memory is said in relation to the first way that was trained."""
    first = next((sum(o.peak.values()) for o in outcomes if o.peak), 0)
    return [
        (
            outcome.name,
            _interval(outcome.similarity),
            _interval(outcome.fidelity),
            _memory(sum(outcome.peak.values()), first) if outcome.peak else "-",
            f"{outcome.seconds_a_step:.2f}" if outcome.seconds_a_step else "-",
            outcome.trained or "-",
        )
        for outcome in outcomes
    ]


def personalisation_table(outcomes: Sequence[Outcome]) -> Table:
    """For the terminal."""
    table = Table(title="95% intervals over seeds", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows_of(outcomes):
        table.add_row(*row)
    return table


def write_page(outcomes: Sequence[Outcome], prompts: Sequence[str], subject: Sequence[np.ndarray], path: Path) -> Path:
    """One self-contained HTML page: the subject's pictures, and for each way a row of pictures a seed."""
    environment = Environment(
        loader=PackageLoader("skipwise.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("personalisation.html.jinja").render(
        columns=COLUMNS,
        rows=rows_of(outcomes),
        prompts=prompts,
        subject=[_uri(picture) for picture in subject],
        ways=[(o.name, [[_uri(picture) for picture in row] for row in o.pictures]) for o in outcomes],
        size=outcomes[0].pictures[0][0].shape[0] * ENLARGED,
    )
    return write_atomically(path, page)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _memory(peak: int, first: int) -> str:
    less = f" ({100 * (peak / first - 1):+.0f}%)" if peak != first else ""
    return f"{peak / 2**20:.1f} MiB{less}"


def _uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
