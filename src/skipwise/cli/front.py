"""`skipwise schedule front`: the Pareto front of schedules."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from skipwise.cli.common import Device, Dtype, ModelName, console, progress_bar
from skipwise.errors import UserError
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
    segments: Annotated[int, typer.Option(help="Equal parts of the trajectory, each with its skip set.", min=1)] = 4,
    budgets: Annotated[str, typer.Option(help="Fractions of all-in FLOPs to save, with commas.")] = "0.1,0.2,0.3,0.4",
    stand_in: Annotated[
        Literal["constant", "linear", "none"], typer.Option(help="What skipped blocks leave in a second plan of each.")
    ] = "linear",
    trials: Annotated[
        int, typer.Option(help="Grids of a kind and budget to decode with; 0 trusts the calibration.", min=0)
    ] = 12,
    moments: Annotated[int, typer.Option(help="Sequences of the sampler to calibrate on.", min=1)] = 1024,
    calibrate: Annotated[int, typer.Option(help="Examples of a task on the calibration split.", min=1)] = 100,
    examples: Annotated[int | None, typer.Option(help="Examples of a task on the test split.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the examples, the search and the bootstrap.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("front"),
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
    network, tokenizer = load(model, dtype=dtype, device=device)
    with progress_bar() as tell:
        found = find_front(
            network, tokenizer, task, settings, light=light, examples=examples, name=model, on_progress=tell
        )
    result = save_front(found, output)
    page = write_report([result], [], output / "page.html")
    console.print(table(result))
    best = ", ".join(f"{row.method} ({row.saved_all_in_flops:.1%} saved)" for row in front(result))
    console.print(f"on the front: {best or 'nothing but the whole model'}; written to {page}", highlight=False)


def _fractions(listed: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in listed.split(","))
    except ValueError as error:
        raise UserError(f"--budgets {listed} are no numbers; write fractions with commas, as in 0.2,0.3.") from error
