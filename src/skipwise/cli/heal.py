"""`skipwise heal`: train an adapter that makes good what a plan loses."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, calibrate, console, progress_bar
from skipwise.files import check_output
from skipwise.healing import HealSettings, heal
from skipwise.plan import Plan


def command(
    plan: Annotated[Path, typer.Argument(help="The plan to heal.")],
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("healed.json"),
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = HealSettings.steps,
    rank: Annotated[int, typer.Option(help="Of the LoRA.", min=1)] = HealSettings.rank,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = HealSettings.learning_rate,
    batch_size: Annotated[int, typer.Option(help="Texts a step.", min=1)] = 16,
    texts: Annotated[Path | None, typer.Option(help="File with one text a line; built-in ones by default.")] = None,
    count: Annotated[int, typer.Option(help="How many built-in texts to train on.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of the adapter and the masks.")] = 0,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Train a LoRA by self-distillation, so that the skipped model predicts what the whole one does.

    The adapter is written beside the healed plan and merged into the weights wherever that plan is applied. A run that
    was killed goes on when it is started again.

    Example: skipwise heal plan.json tiny-dllm -o healed.json && skipwise eval tiny-dllm --plan healed.json
    """
    loaded = Plan.load(plan)
    check_output(output)
    calibration = calibrate(model, texts, count, dtype, device, batch_size, tokenizer_name)
    settings = HealSettings(steps=steps, rank=rank, learning_rate=learning_rate, seed=seed)
    losses: list[float] = []
    with progress_bar() as tell:

        def on_progress(step: int, total: int, loss: float) -> None:
            losses.append(loss)
            tell(f"{model}: heal", step, total)

        healed = heal(loaded, calibration, output, settings, on_progress=on_progress)
    change = f"KL {losses[0]:.4f} to {losses[-1]:.4f} nats a token; " if losses else ""
    console.print(f"{change}{healed.describe()}; written to {output}", highlight=False)
