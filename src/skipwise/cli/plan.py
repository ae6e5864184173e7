"""`skipwise plan`: choose the blocks to skip."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from skipwise.analysis import Analysis
from skipwise.blocks import find_contract
from skipwise.calibration import Calibration
from skipwise.cli.common import Device, Dtype, TokenizerName, calibrate, console, progress_bar, settings_from
from skipwise.errors import UserError
from skipwise.evaluation import Result
from skipwise.files import check_output
from skipwise.healing import fit_stand_ins
from skipwise.loading import load_skeleton
from skipwise.plan import Plan
from skipwise.planners import make_plan, needs_model, planner_names
from skipwise.scheduling.front import pick


def command(
    analysis: Annotated[
        str | None,
        typer.Argument(
            metavar="ANALYSIS|MODEL",
            help="Folder that `skipwise analyze` wrote; a model with --blocks; left out with --front.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(planner_names())}.")] = "similarity",
    skip: Annotated[int | None, typer.Option(help="Number of blocks to skip.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Or: fraction of the stack's FLOPs to save, such as 0.18.")
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Or: which blocks, by number, as 3,8-11; of a model with several stacks as STACK:3,8-11."),
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
    |    skipwise plan --front front/result.json --keep 0.95    |    skipwise plan llada-8b --blocks 3,8-11
    """
    if front is not None:
        asked: dict[str, object] = {"ANALYSIS": analysis, "--skip": skip, "--budget": budget, "--stand-in": stand_in}
        asked |= {"--model": model, "--blocks": blocks or None, "--set": setting or None}
        _refuse("--front chooses among finished plans", "--front", asked)
        _write(pick(Result.load(front), 0.95 if keep is None else keep, "value" if estimate else "low"), output)
        return
    if blocks:
        _refuse("--blocks names the blocks", "--blocks", {"--skip": skip, "--budget": budget, "--set": setting or None})
        plan = by_number(analysis, blocks, stack)
        if stand_in:
            plan = _with_stand_ins(
                plan, calibrate(model or str(analysis), texts, count, dtype, device, batch_size), stand_in
            )
        _write(plan, output)
        return
    if analysis is None:
        raise UserError("Give ANALYSIS, a folder that `skipwise analyze` wrote, or --front with a Result of schedules.")
    if keep is not None or estimate:
        raise UserError("--keep and --estimate choose a plan of a front; name it with --front, or ask for --skip.")
    measured, settings = Analysis.load(Path(analysis)), settings_from(setting or [], command)
    calibration: Calibration | None = None
    if needs_model(method) or stand_in:
        if model is None:
            what = method if needs_model(method) else f"a {stand_in} stand-in"
            raise UserError(f"{what} runs the model; name it with --model, such as --model {measured.name}.")
        calibration = calibrate(model, texts, count, dtype, device, batch_size, tokenizer_name)
    check_output(output)
    plan = make_plan(measured, method, skip=skip, budget=budget, stack=stack, calibration=calibration, **settings)
    if stand_in and calibration:
        plan = _with_stand_ins(plan, calibration, stand_in)
    _write(plan, output)


def by_number(source: str | None, blocks: list[str], stack: str | None) -> Plan:
    """The plan of `--blocks 3,8-11` for a model, of which the config alone is read, or for the model of an analysis."""
    if source is None:
        raise UserError("--blocks needs a model; name it first, such as `skipwise plan tiny-dllm --blocks 3,8-11`.")
    if Path(source, "analysis.json").is_file():
        shape = Analysis.load(Path(source)).model
    else:
        shape = find_contract(load_skeleton(source)).shape
    chosen: dict[str, list[int]] = {}
    for part in blocks:
        name, _, numbers = part.rpartition(":")
        chosen.setdefault(name or stack or "", []).extend(block_numbers(numbers))
    bare = chosen.pop("", None)
    if bare is not None and chosen:
        raise UserError(
            f"--blocks {','.join(map(str, bare))} names no stack, and others do; write STACK:NUMBERS for all."
        )
    return Plan.of(shape, chosen if bare is None else bare)


def block_numbers(text: str) -> list[int]:
    """`3,8-11` -> [3, 8, 9, 10, 11]. Raises UserError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"--blocks {text}: {part!r} is no block number; write numbers and ranges, such as 3,8-11.")
        numbers.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return numbers


def _with_stand_ins(plan: Plan, calibration: Calibration, kind: Literal["constant", "linear"]) -> Plan:
    with progress_bar() as tell:
        return fit_stand_ins(plan, calibration, kind, on_progress=lambda *at: tell("fit stand-ins", *at))


def _refuse(why: str, option: str, asked: Mapping[str, object]) -> None:
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise UserError(f"{why}; leave out {', '.join(given)}, or leave out {option}.")


def _write(plan: Plan, output: Path) -> None:
    check_output(output)
    console.print(f"{plan.describe()}; written to {plan.save(output)}", highlight=False)
