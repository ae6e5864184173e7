"""`skipwise export`: a plan baked into a smaller checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import console
from skipwise.exporting import export
from skipwise.exporting.card import PLAN_FILE
from skipwise.exporting.engines import title
from skipwise.plan import Plan


def command(
    plan: Annotated[Path, typer.Argument(help="A static plan that `skipwise plan` wrote.")],
    source: Annotated[
        str, typer.Argument(help="The model: an embedded name (tiny-dllm), a folder or a hub id (org/name).")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")],
    engine: Annotated[
        str | None,
        typer.Option("--for", help="Another engine: mlx-lm, ctranslate2, llama.cpp (GGUF), onnx or openvino."),
    ] = None,
    nearest: Annotated[
        bool, typer.Option(help="Take the nearest plan that this engine can run, instead of refusing.")
    ] = False,
) -> None:
    """Write a smaller standard checkpoint without the blocks that a plan skips, shard by shard.

    Example: skipwise export plan.json tiny-dllm runs/tiny-dllm-20 && skipwise eval runs/tiny-dllm-20
    """
    loaded = Plan.load(plan)
    written = export(loaded, source, target, engine=engine, nearest=nearest)
    baked = Plan.load(written / PLAN_FILE)
    console.print(f"{baked.describe()}; written to {written}", highlight=False)
    if engine is not None:
        card = (written / "README.md").read_text(encoding="utf-8").splitlines()
        console.print(next(line for line in card if line.startswith(f"- {title(engine)}: "))[2:], highlight=False)
    if baked.phases != loaded.phases:
        console.print(f"The plan was moved for {engine}; it was: {loaded.describe()}.", highlight=False)
