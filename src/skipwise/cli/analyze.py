"""`skipwise analyze`: what every block does to the hidden states."""

from pathlib import Path
from typing import Annotated

import typer

from skipwise.analysis import analyze
from skipwise.cli.common import Device, Dtype, ModelName, console, progress_bar, read_lines
from skipwise.evaluation import calibration_texts
from skipwise.files import check_writable
from skipwise.loading import load


def command(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the analysis.")] = Path("runs/analysis"),
    texts: Annotated[
        Path | None, typer.Option(help="File with one text a line; built-in calibration texts by default.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many built-in texts to read.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Texts are cut to this length.", min=2)] = 512,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure layer-wise similarity and update norms of a language model, by denoising step for diffusion models.

    Example: skipwise analyze tiny-dllm -o runs/analysis-tiny-dllm
    """
    check_writable(output)
    network, tokenizer = load(model, dtype=dtype, device=device)
    chosen = read_lines(texts) if texts else calibration_texts(tokenizer, count)
    with progress_bar() as tell:
        analysis = analyze(
            network,
            tokenizer,
            chosen,
            name=model,
            max_tokens=max_tokens,
            on_progress=lambda *at: tell(f"{model}: analyse", *at),
        )
    analysis.save(output)
    console.print(f"{analysis.calibration['tokens']} tokens of {model} analysed; written to {output}", highlight=False)
