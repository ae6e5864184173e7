"""`skipwise demo`: the main job from end to end."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import TokenizerName, console, progress_bar
from skipwise.demo import run_demo
from skipwise.errors import UserError
from skipwise.report import table


def command(
    model: Annotated[
        list[str] | None, typer.Option(help="A model; repeat for several. tiny-dllm and tiny-ar by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything; runs/demo.")] = None,
    examples: Annotated[int | None, typer.Option(help="Prompts a task (200), or windows of a text (6).", min=1)] = None,
    tokenizer_name: TokenizerName = None,
    image: Annotated[
        bool,
        typer.Option("--image", help="Personalise a pipeline like tiny-dit by LoRA and BlockSkip instead."),
    ] = False,
) -> None:
    """Analyse, plan 1, 2, 3, 4 and 6 skipped blocks by similarity and at random, evaluate, and report.

    Examples: skipwise demo    |    skipwise demo --model smollm2-135m    |    skipwise demo --model org/name
    """
    if image:
        if examples or tokenizer_name or len(model or ()) > 1:
            raise UserError(
                "--image has pictures of its own and takes one model; leave out --examples and --tokenizer."
            )
        return _image(model[0] if model else None, output or Path("runs/demo-image"))
    with progress_bar() as tell:
        names = model or ("tiny-dllm", "tiny-ar")
        results, page = run_demo(
            names, output or Path("runs/demo"), examples=examples, on_progress=tell, tokenizer=tokenizer_name
        )
    for result in results:
        console.print(table(result))
    console.print(f"report: {page}", highlight=False)


def _image(model: str | None, output: Path) -> None:
    from skipwise.image_demo import MODEL, run_image_demo
    from skipwise.report.personalisation import personalisation_table

    with progress_bar() as tell:
        outcomes, page = run_image_demo(output, model=model or MODEL, on_progress=tell)
    console.print(personalisation_table(outcomes))
    console.print(f"page: {page}", highlight=False)
