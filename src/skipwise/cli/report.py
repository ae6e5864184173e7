"""`skipwise report`: one HTML page from Results and Analyses."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.analysis import Analysis
from skipwise.cli.common import console
from skipwise.evaluation import Result
from skipwise.report import write_report


def command(
    results: Annotated[list[Path], typer.Argument(help="Result files that `skipwise eval` wrote.")],
    analysis: Annotated[list[Path] | None, typer.Option(help="An analysis folder; repeat for several.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page; it needs no network.

    Example: skipwise report result.json --analysis runs/analysis-tiny-dllm -o report.html
    """
    loaded = [Result.load(path) for path in results]
    analyses = [Analysis.load(path) for path in analysis or []]
    console.print(f"written to {write_report(loaded, analyses, output)}", highlight=False)
