"""`skipwise plan`: choose the blocks to skip."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from skipwise.analysis import Analysis
from skipwise.calibration import Calibration
from skipwise.cli.common import Device, Dtype, TokenizerName, calibrate, console, progress_bar, settings_from
from skipwise.errors import UserError
from skipwise.evaluation import Result
from skipwise.files import check_writable
from skipwise.healing import fit_stand_ins
from skipwise.plan import Plan
from skipwise.planners import make_plan, needs_model, planner_names
from skipwise.scheduling.front import pick


def command(
    analysis: Annotated[
        Path | None, typer.Argument(help="Folder that `skipwise analyze` wrote; left out with --front.")
    ] = None,
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
    front: Annotated[
        Path | None, typer.Option(help="Instead of an analysis: result.json of `skipwise schedule front`.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="With --front: the part of the score to keep, 0.95 by default.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="With --front: by the estimate, not the lower end of its interval.")
    ] = False,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Make a plan from an analysis and write it as JSON, with its stand-ins, if it has any, in a file beside it.

    Examples: skipwise plan ANALYSIS --skip 4    |    skipwise plan ANALYSIS --budget 0.18 --set forbid_neighbours=true
    |    skipwise plan ANALYSIS --skip 6 --method greedy --stand-in linear --model tiny-dllm
    |    skipwise plan --front front/result.json --keep 0.95
    """
    if front is not None:
        asked = {"ANALYSIS": analysis, "--skip": skip, "--budget": budget, "--stand-in": stand_in, "--model": model}
        _refuse([*(name for name, value in asked.items() if value is not None), *(["--set"] if setting else [])])
        _write(pick(Result.load(front), 0.95 if keep is None else keep, "value" if estimate else "low"), output)
        return
    if analysis is None:
        raise UserError("Give ANALYSIS, a folder that `skipwise analyze` wrote, or --front with a Result of schedules.")
    if keep is not None or estimate:
        raise UserError("--keep and --estimate choose a plan of a front; name it with --front, or ask for --skip.")
    measured, settings = Analysis.load(analysis), settings_from(setting or [])
    calibration: Calibration | None = None
    if needs_model(method) or stand_in:
        if model is None:
            what = method if needs_model(method) else f"a {stand_in} stand-in"
            raise UserError(f"{what} runs the model; name it with --model, such as --model {measured.name}.")
        calibration = calibrate(model, texts, count, dtype, device, batch_size, tokenizer_name)
    check_writable(output.parent)
    plan = make_plan(measured, method, skip=skip, budget=budget, stack=stack, calibration=calibration, **settings)
    if stand_in and calibration:
        with progress_bar() as tell:
            plan = fit_stand_ins(plan, calibration, stand_in, on_progress=lambda *at: tell("fit stand-ins", *at))
    _write(plan, output)


def _refuse(given: list[str]) -> None:
    if given:
        raise UserError(f"--front chooses among finished plans; leave out {', '.join(given)}, or leave out --front.")


def _write(plan: Plan, output: Path) -> None:
    check_writable(output.parent)
    console.print(f"{plan.describe()}; written to {plan.save(output)}", highlight=False)
