"""`skipwise export`: a plan baked into a smaller checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import console
from skipwise.exporting import export
from skipwise.plan import Plan


def command(
    plan: Annotated[Path, typer.Argument(help="A static plan that `skipwise plan` wrote.")],
    source: Annotated[
        str, typer.Argument(help="The model: an embedded name (tiny-dllm), a folder or a hub id (org/name).")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")],
) -> None:
    """Write a smaller standard checkpoint without the blocks that a plan skips, shard by shard.

    Example: skipwise export plan.json tiny-dllm runs/tiny-dllm-20 && skipwise eval runs/tiny-dllm-20
    """
    loaded = Plan.load(plan)
    console.print(f"{loaded.describe()}; written to {export(loaded, source, target)}", highlight=False)
