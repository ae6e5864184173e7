"""`skipwise plan`: choose the blocks to skip."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from skipwise.analysis import Analysis
from skipwise.calibration import Calibration
from skipwise.cli.common import Device, Dtype, calibrate, console, progress_bar, settings_from
from skipwise.errors import UserError
from skipwise.files import check_writable
from skipwise.healing import fit_stand_ins
from skipwise.planners import make_plan, needs_model, planner_names


def command(
    analysis: Annotated[Path, typer.Argument(help="Folder that `skipwise analyze` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(planner_names())}.")] = "similarity",
    skip: Annotated[int | None, typer.Option(help="Number of blocks to skip.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Or: fraction of the stack's FLOPs to save, such as 0.18.")
    ] = None,
    stack: Annotated[str | None, typer.Option(help="Which stack; the longest by default.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, such as seed=3.")] = None,
    stand_in: Annotated[
        Literal["constant", "linear"] | None,
        typer.Option(help="What skipped blocks leave behind, fitted in closed form; nothing by default."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model, for greedy and for stand-ins, which run it.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File with one calibration text a line; built-in ones by default.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many built-in texts to calibrate on.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Calibration texts a forward.", min=1)] = 16,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Make a plan from an analysis and write it as JSON, with its stand-ins, if it has any, in a file beside it.

    Examples: skipwise plan ANALYSIS --skip 4    |    skipwise plan ANALYSIS --budget 0.18 --set forbid_neighbours=true
    |    skipwise plan ANALYSIS --skip 6 --method greedy --stand-in linear --model tiny-dllm
    """
    measured, settings = Analysis.load(analysis), settings_from(setting or [])
    calibration: Calibration | None = None
    if needs_model(method) or stand_in:
        if model is None:
            what = method if needs_model(method) else f"a {stand_in} stand-in"
            raise UserError(f"{what} runs the model; name it with --model, such as --model {measured.name}.")
        calibration = calibrate(model, texts, count, dtype, device, batch_size)
    check_writable(output.parent)
    plan = make_plan(measured, method, skip=skip, budget=budget, stack=stack, calibration=calibration, **settings)
    if stand_in and calibration:
        with progress_bar() as tell:
            plan = fit_stand_ins(plan, calibration, stand_in, on_progress=lambda *at: tell("fit stand-ins", *at))
    console.print(f"{plan.describe()}; written to {plan.save(output)}", highlight=False)
