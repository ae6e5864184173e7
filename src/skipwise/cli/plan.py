"""`skipwise plan`: choose the blocks to skip."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.analysis import Analysis
from skipwise.cli.common import console, settings_from
from skipwise.planners import make_plan, planner_names


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
) -> None:
    """Make a plan from an analysis and write it as JSON.

    Examples: skipwise plan ANALYSIS --skip 4    |    skipwise plan ANALYSIS --budget 0.18 --set forbid_neighbours=true
    """
    settings = settings_from(setting or [])
    plan = make_plan(Analysis.load(analysis), method, skip=skip, budget=budget, stack=stack, **settings)
    console.print(f"{plan.describe()}; written to {plan.save(output)}", highlight=False)
