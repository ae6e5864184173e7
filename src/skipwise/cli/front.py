"""`skipwise schedule front`: the Pareto front of schedules."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import nn

from skipwise.cli.common import Device, Dtype, JudgeDtype, ModelName, TokenizerName, console, progress_bar
from skipwise.errors import UserError
from skipwise.evaluation.writing import Writing, family_of
from skipwise.files import check_writable
from skipwise.loading import load
from skipwise.report import table, write_report
from skipwise.scheduling.front import FrontSettings, find_front, front, save_front


def command(
    model: ModelName,
    light: Annotated[str | None, typer.Option(help="A lighter model to hold beside: a name, folder or hub id.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; repeat for several; the model's own by default.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="Instead of tasks: the judge of texts that the model writes; repeatable.")
    ] = None,
    judge_dtype: JudgeDtype = "float32",
    segments: Annotated[int, typer.Option(help="Equal parts of the trajectory, each with its skip set.", min=1)] = 4,
    budgets: Annotated[str, typer.Option(help="Fractions of all-in FLOPs to save, with commas.")] = "0.1,0.2,0.3,0.4",
    stand_in: Annotated[
        Literal["constant", "linear", "none"], typer.Option(help="What skipped blocks leave in a second plan of each.")
    ] = "linear",
    trials: Annotated[
        int, typer.Option(help="Grids of a kind and budget to decode with; 0 trusts the calibration.", min=0)
    ] = 12,
    moments: Annotated[int, typer.Option(help="Sequences of the sampler to calibrate on.", min=1)] = 1024,
    calibrate: Annotated[int, typer.Option(help="Examples of a task, or texts, to calibrate on.", min=1)] = 100,
    examples: Annotated[
        int | None, typer.Option(help="Examples of a task (500), or texts (64), to test on.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples, the search and the bootstrap.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("front"),
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Find schedules for a ladder of budgets, evaluate all, and write result.json, plans/ and page.html.

    Example: skipwise schedule front tiny-dllm --budgets 0.2,0.3 -o front; skipwise plan --front front/result.json
    """
    settings = FrontSettings(
        budgets=_fractions(budgets),
        segments=segments,
        stand_in=None if stand_in == "none" else stand_in,
        moments=moments,
        trials=trials,
        examples=calibrate,
        seed=seed,
    )
    check_writable(output)
    if task and judge:
        raise UserError("--task and --judge are two measures of quality, and a front has one; leave out either.")
    network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
    written = [_writing(network, name, judge_dtype, examples or 64, seed) for name in judge or []]
    with progress_bar() as tell:
        found = find_front(
            network,
            tokenizer,
            written or task,
            settings,
            # other texts than those that are judged in the end
            calibrate_on=[replace(w, first=w.samples, samples=calibrate) for w in written] or None,
            light=light,
            examples=examples,
            name=model,
            on_progress=tell,
        )
    result = save_front(found, output)
    page = write_report([result], [], output / "page.html")
    console.print(table(result))
    best = ", ".join(f"{row.method} ({row.saved_all_in_flops:.1%} saved)" for row in front(result))
    console.print(f"on the front: {best or 'nothing but the whole model'}; written to {page}", highlight=False)


def _writing(model: nn.Module, judge: str, dtype: str, samples: int, seed: int) -> Writing:
    task = Writing(
        judge=judge,
        judge_dtype=dtype,
        samples=samples,
        seed=seed,
        family=family_of(model),
        name=f"writing for {judge}",
    )
    task.judge_for(model)  # a mistake in its name is found before the search
    return task


def _fractions(listed: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in listed.split(","))
    except ValueError as error:
        raise UserError(f"--budgets {listed} are no numbers; write fractions with commas, as in 0.2,0.3.") from error
