"""One self-contained HTML page: figures inline, no script, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from skipwise.analysis.record import Analysis
from skipwise.errors import UserError
from skipwise.evaluation.result import Result
from skipwise.files import write_atomically
from skipwise.report import figures, schedules
from skipwise.report.rows import percent, scores_of, spread, whole_row
from skipwise.report.summary import summarize
from skipwise.scheduling.front import front


@dataclass(frozen=True)
class Picture:
    """A figure of the page: data URI, what it shows for those who do not see it, and its caption."""

    uri: str
    alt: str
    caption: str


def write_report(results: Sequence[Result], analyses: Sequence[Analysis], path: str | Path) -> Path:
    """Write the page and return its path. Raises UserError when there is nothing to report or nowhere to write."""
    if not results and not analyses:
        raise UserError("There is nothing to report; give at least one Result (skipwise eval) or Analysis.")
    return write_atomically(path, render(results, analyses))


def render(results: Sequence[Result], analyses: Sequence[Analysis]) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("skipwise.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = list(dict.fromkeys([r.name for r in results] + [a.name for a in analyses]))
    return environment.get_template("page.html.jinja").render(
        names=names,
        summary=summarize(results, analyses),
        comparison=_comparison([r for r in results if not schedules.has_schedules(r)], analyses),
        schedules=[(r.name, _front_pictures(r), _grid_pictures(r)) for r in results if schedules.has_schedules(r)],
        models=[(a.name, a.kind, _pictures(a)) for a in analyses],
        tables=[_table(result) for result in results],
        provenance=[*map(_provenance, results), *map(_provenance, analyses)],
    )


def _comparison(results: Sequence[Result], analyses: Sequence[Analysis]) -> list[Picture]:
    pictures = []
    if any(row.mean_retention for result in results for row in result.rows):
        pictures.append(
            Picture(
                figures.retention_by_saving(results),
                "Lines of retention falling as more block FLOPs are saved, one a model and method",
                "Retention (score under the plan / score without, mean over tasks, same examples) against the fraction "
                "of block FLOPs saved. Error bars: 95% bootstrap interval for a single plan, lowest and highest for "
                "random plans. Dotted: 90%.",
            )
        )
    layered = [analysis for analysis in analyses if analysis.get(analysis.main_stack, "similarity") is not None]
    if layered:
        pictures.append(
            Picture(
                figures.models_by_depth(layered),
                "Successive cosine and relative update norm over relative depth, one line a model",
                "What each block does to the stream: cosine of its input and output (near 1: direction unchanged) and "
                "size of its update relative to its input, by relative depth.",
            )
        )
    return pictures


def _front_pictures(result: Result) -> list[Picture]:
    bars = "Error bars: 95% bootstrap interval; dotted: 95%; the line joins the plans that no other beats in both."
    counted = "Retention against all-in FLOPs saved, as counted over the forwards that were made."
    timed = "Retention against measured seconds of the whole evaluation, on the device named below."
    name = f"{result.name}: retention of every schedule against"
    return [
        Picture(
            schedules.front_figure(result, "flops"),
            f"{name} all-in FLOPs saved, one colour a method",
            f"{counted} {bars}",
        ),
        Picture(
            schedules.front_figure(result, "seconds"),
            f"{name} measured seconds, one colour a method",
            f"{timed} {bars}",
        ),
    ]


def _grid_pictures(result: Result) -> list[Picture]:
    pictures = []
    for row in front(result):
        assert row.plan is not None
        said = (
            f"{row.method}: {percent(row.saved_all_in_flops)} of all-in FLOPs saved, {spread(row.mean_retention)} kept"
        )
        alt = f"Grid of blocks by progress for {said}: {row.plan.describe()}"
        pictures.append(Picture(schedules.grid_figure(row.plan), alt, f"{said}."))
    return pictures


def _pictures(analysis: Analysis) -> list[Picture]:
    stack = analysis.main_stack
    layers = _of_layers(analysis, stack) if analysis.get(stack, "similarity") is not None else []
    return layers + _of_other_parts(analysis, stack) + _of_axes(analysis, stack)


def _of_layers(analysis: Analysis, stack: str) -> list[Picture]:
    name, tensors = analysis.name, analysis.tensors
    steps = " and denoising steps of the model's own trajectories." if analysis.kind == "masked diffusion" else "."
    pictures = [
        Picture(
            figures.similarity_map(tensors[f"{stack}/similarity"]),
            f"Heat map of the cosine similarity of all pairs of states of {name}",
            f"Mean cosine similarity of every pair of states between blocks of {stack}, over tokens{steps}",
        ),
        Picture(
            figures.by_depth(tensors[f"{stack}/update_norm"], analysis.successive_similarity(stack)),
            f"Relative update norm and cosine of every block of {name}",
            "Bars: relative size of each block's update. Line: cosine of its input and output.",
        ),
    ]
    lines = {"cosine": analysis.successive_similarity(stack)}
    for what, statistic in (("cosine without outlier channels", "similarity_without_outliers"), ("linear CKA", "cka")):
        values = analysis.get(stack, statistic)
        if values is not None:
            lines[what] = values.diagonal(1)
    if len(lines) > 1:
        channels = analysis.get(stack, "outlier_channels")
        named = f" Outlier channels: {', '.join(map(str, channels.tolist()))}." if channels is not None else ""
        caption = f"How alike each block's input and output are, by three measures.{named}"
        pictures.append(Picture(figures.profiles(lines, "input and output of a block"), f"{name}: {caption}", caption))
    return pictures


# what -> statistics by depth that are drawn together
_PROFILES = {
    "Recency: how much the near past outweighs the far, in states and in attention (0 no preference, 1 all near).": {
        "states": "recency",
        "attention": "attention_recency",
    },
    "Logit lens: share of positions whose prediction from this depth is the final one.": {
        "agreement": "lens_agreement"
    },
}


def _of_other_parts(analysis: Analysis, stack: str) -> list[Picture]:
    pictures = []
    for caption, statistics in _PROFILES.items():
        found = {name: analysis.get(stack, statistic) for name, statistic in statistics.items()}
        lines = {name: values for name, values in found.items() if values is not None}
        if lines:
            label = caption.partition(":")[0].lower()
            pictures.append(Picture(figures.profiles(lines, label), f"{analysis.name}: {caption}", caption))
    return pictures


def _of_axes(analysis: Analysis, stack: str) -> list[Picture]:
    """Heat maps by denoising step and by noise level."""
    pictures = []
    for axis, label, prefix in (
        ("progress", "progress (0 = all noise)", "step"),
        ("noise_levels", "fraction masked", "noise"),
    ):
        for statistic, what in (("update_norm", "relative update norm"), ("similarity", "cosine of input and output")):
            values, rows = analysis.get(stack, f"{prefix}_{statistic}"), analysis.get(stack, axis)
            if values is not None and rows is not None:
                data = "along its own trajectories" if prefix == "step" else "on noised texts"
                caption = f"{what[0].upper()}{what[1:]} of each block by {label}, {data}."
                alt = f"Heat map for {analysis.name}: {caption}"
                pictures.append(Picture(figures.grid_map(values, rows, label, what), alt, caption))
    return pictures


def _table(result: Result) -> dict[str, Any]:
    labels = list(whole_row(result).scores)
    rows = []
    for row in result.rows:
        rows.append(
            {
                "plan": row.plan.describe() if row.plan else "whole model",
                "method": row.method,
                "k": row.k,
                "saved": [percent(row.saved_block_flops, 2), percent(row.saved_all_in_flops, 2)]
                if row.plan
                else ["-", "-"],
                "seconds": f"{row.seconds:.2f}",
                "scores": [scores_of([row], label) for label in labels],
                "retention": spread(row.mean_retention),
            }
        )
    metrics: dict[str, Any] = {label: score.metric for label, score in whole_row(result).scores.items()}
    return {"name": result.name, "labels": labels, "metrics": metrics, "rows": rows}


def _provenance(item: Result | Analysis) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in item.versions.items())
    if isinstance(item, Analysis):
        known = {"settings": item.settings, "calibration": item.calibration, "versions": versions}
        return {"what": f"Analysis of {item.name}", "facts": known}
    facts: dict[str, Any] = {
        "date": item.date,
        "device": item.device,
        "dtype": item.dtype,
        "seeds": item.seeds,
        "settings": item.settings,
    }
    return {"what": f"Result of {item.name}", "facts": facts | {"model": item.model, "versions": versions}}
