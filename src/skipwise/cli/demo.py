"""`skipwise demo`: the main job from end to end."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import console, progress_bar
from skipwise.demo import run_demo
from skipwise.report import table


def command(
    model: Annotated[
        list[str] | None, typer.Option(help="A model; repeat for several. tiny-dllm and tiny-ar by default.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("runs/demo"),
    examples: Annotated[int | None, typer.Option(help="Prompts a task (200), or windows of a text (6).", min=1)] = None,
) -> None:
    """Analyse, plan 1, 2, 3, 4 and 6 skipped blocks by similarity and at random, evaluate, and report.

    Examples: skipwise demo    |    skipwise demo --model smollm2-135m    |    skipwise demo --model org/name
    """
    with progress_bar() as tell:
        results, page = run_demo(model or ("tiny-dllm", "tiny-ar"), output, examples=examples, on_progress=tell)
    for result in results:
        console.print(table(result))
    console.print(f"report: {page}", highlight=False)
