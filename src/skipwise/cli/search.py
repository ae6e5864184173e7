"""`skipwise schedule search`: the best schedules of a heavy and a light model, by running them."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from skipwise.cli.common import Device, Dtype, JudgeDtype, ModelName, TokenizerName, console, progress_bar, read_light
from skipwise.errors import UserError, unknown
from skipwise.evaluation.result import Row, Score
from skipwise.evaluation.tasks import EvaluationTask, ExactMatch
from skipwise.files import check_writable
from skipwise.loading import load_skeleton
from skipwise.scheduling.candidates import Screen
from skipwise.scheduling.search import Rules, search_schedules
from skipwise.scheduling.table import NOTE, Search
from skipwise.zoo.tasks import TASKS

SHOWN = 12  # schedules in the terminal; all are in the table's files


def command(
    model: ModelName,
    light: Annotated[str, typer.Option(help="What light segments run: another model, or a static plan (.json).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; a killed search goes on there.")] = Path(
        "runs/search"
    ),
    segments: Annotated[int, typer.Option(help="Equal parts of the trajectory, each heavy or light.")] = 8,
    light_segments: Annotated[int | None, typer.Option(help="How many are light; 2 unless --budget is given.")] = None,
    budget: Annotated[float | None, typer.Option(help="Or: the part of the FLOPs to save at least, as 0.1.")] = None,
    count: Annotated[str, typer.Option(help="FLOPs that --budget counts: all-in or block.")] = "all-in",
    task: Annotated[list[str] | None, typer.Option(help="Exact-answer task of the zoo; repeat for several.")] = None,
    judge: Annotated[str | None, typer.Option(help="Or: the judge of written text, such as smollm2-135m.")] = None,
    judge_dtype: JudgeDtype = "float32",
    length: Annotated[int, typer.Option(help="New tokens of a text.", min=1)] = 128,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a text; the sampler's own by default.")] = None,
    samples: Annotated[int, typer.Option(help="Examples a task, for the schedules that get to the finals.")] = 64,
    confirm: Annotated[int, typer.Option(help="Fresh examples that the finalists are reported on.")] = 64,
    finalists: Annotated[int, typer.Option(help="Schedules that get to the finals.")] = 4,
    importance: Annotated[
        Path | None, typer.Option(help="importance.json of `skipwise schedule importance`: screens the schedules.")
    ] = None,
    screen: Annotated[float, typer.Option(help="Share of the schedules that the screen lets through.")] = 0.5,
    engine: Annotated[str, typer.Option(help="Where trials run: inline, processes or ray.")] = "processes",
    workers: Annotated[int, typer.Option(help="Processes, or Ray actors.")] = 2,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; a local one by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a forward.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the examples, their noise and the bootstrap.")] = 0,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Try every schedule of heavy and light segments, drop the worse half again and again, and confirm the best.

    Examples: skipwise schedule search tiny-text --light tiny-text-light --judge smollm2-135m -o runs/search
    |    skipwise schedule search tiny-dllm --light plan.json --task sort --budget 0.1
    """
    rules = {"segments": segments, "budget": budget, "count": count, "screen": screen, "seed": seed}
    rules |= {"light_segments": 2 if light_segments is None and budget is None else light_segments}
    rules |= {"examples": samples, "confirm": confirm, "finalists": finalists}
    Rules(**rules)  # type: ignore[arg-type]  # a mistake is told before anything is loaded
    tasks = _tasks(model, task or [], judge, judge_dtype, length, steps, batch_size, seed)
    check_writable(output)
    with progress_bar() as tell:
        found = search_schedules(
            model,
            read_light(light),
            tasks,
            importance=_importance(importance),
            engine=engine,
            workers=workers,
            address=ray_address,
            folder=output,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer_name,
            on_progress=lambda *at: tell("search, in examples", *at),
            **rules,
        )
    console.print(_table(found))
    console.print(NOTE, highlight=False)
    console.print(f"written to {output}: table.json, table.csv, result.json, plan.json", highlight=False)


def _importance(path: Path | None) -> Screen | None:
    if path is None:
        return None
    from skipwise.scheduling.importance import Importance

    return Importance.load(path)


def _tasks(
    model: str,
    names: list[str],
    judge: str | None,
    judge_dtype: str,
    length: int,
    steps: int | None,
    batch_size: int,
    seed: int,
) -> list[EvaluationTask]:
    """Exact-answer tasks, from the calibration split so that `skipwise eval` stays a test; or writing."""
    if bool(names) == (judge is not None):
        raise UserError(f"Give either --task ({', '.join(TASKS)}) or --judge, such as --judge smollm2-135m.")
    if judge is not None:
        from skipwise.evaluation.writing import Writing, family_of

        family = family_of(load_skeleton(model))
        written = Writing(
            judge=judge,
            judge_dtype=judge_dtype,
            length=length,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            family=family,
        )
        return [written]
    for name in names:
        if name not in TASKS:
            raise unknown("exact-answer task", name, TASKS)
    return [ExactMatch(name, "calibration", 1, seed, batch_size) for name in names]


def _table(found: Search) -> Table:
    """The best schedules, the paper's and the whole model; scores in %, perplexities as they are."""
    tasks = list(found.best.scores)
    title = f"{found.result.name}: {len(found.found)} schedules, best first; [95% interval] on fresh examples"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("schedule", "dropped", "n", "kept", "FLOPs saved,\nblock/all-in", *(f"{t}, fresh" for t in tasks)):
        shown.add_column(column, justify="left" if column in ("schedule", "dropped") else "right", no_wrap=True)
    for one in found.found[:SHOWN]:
        dropped = "" if one.dropped is None else one.dropped if one.round is None else f"{one.dropped}, {one.round}"
        kept = "" if one.retention is None else f"{100 * one.retention:.1f}%"
        shown.add_row(one.segments, dropped, str(one.examples), kept, _saved(one), *_fresh(one.confirmed, tasks))
    if len(found.found) > SHOWN:
        shown.add_row(f"{len(found.found) - SHOWN} more in table.csv")
    for row in found.result.rows:
        if row.method in ("sandwich", "whole model"):
            shown.add_row(row.method, "", "", "", _saved(row), *_fresh(row, tasks))
    return shown


def _saved(one: object) -> str:
    return f"{100 * one.saved_block_flops:.1f}/{100 * one.saved_all_in_flops:.1f}%"  # type: ignore[attr-defined]


def _fresh(row: Row | None, tasks: list[str]) -> list[str]:
    return [_score(row.scores[task]) for task in tasks] if row else [""] * len(tasks)


def _score(score: Score) -> str:
    if not score.is_fraction:
        return f"{score.value.value:.4g} [{score.value.low:.4g}, {score.value.high:.4g}]"
    value, low, high = (100 * part for part in (score.value.value, score.value.low, score.value.high))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"
