"""`skipwise eval`: scores and retention under plans."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, console, progress_bar
from skipwise.evaluation import evaluate
from skipwise.files import check_output
from skipwise.loading import load
from skipwise.plan import Plan
from skipwise.report import table


def command(
    model: ModelName,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan to evaluate; repeat for several.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; repeat for several; the model's own by default.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Prompts a task (500), or windows of a text (8).", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the examples and the bootstrap.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the Result.")] = Path("result.json"),
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Evaluate a model without and under plans, on the same held-out examples, and write a Result.

    Example: skipwise eval tiny-dllm --plan plan.json --task sort --examples 200
    """
    plans = [Plan.load(path) for path in plan or []]
    check_output(output)
    network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
    with progress_bar() as tell:
        result = evaluate(
            network,
            tokenizer,
            tasks=task,
            plans=plans,
            examples=examples,
            seed=seed,
            name=model,
            on_progress=lambda *at: tell(f"{model}: evaluate", *at),
        )
    console.print(table(result))
    console.print(f"written to {result.save(output)}", highlight=False)
