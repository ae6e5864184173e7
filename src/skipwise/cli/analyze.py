"""`skipwise analyze`: what every block does to the hidden states."""

from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.analysis import PARTS, Analysis, Comparison, analyze, compare
from skipwise.analysis.analyze import check_parts
from skipwise.analysis.processes import joined
from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, console, progress_bar, read_lines
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
    parts: Annotated[str, typer.Option(help=f"What to measure, out of {','.join(PARTS)}.")] = "layers,tokens",
    outliers: Annotated[int, typer.Option(help="Channels left out of the similarity without outliers.", min=0)] = 1,
    batch_size: Annotated[int, typer.Option(help="Texts a forward.", min=1)] = 64,
    beside: Annotated[
        str | None, typer.Option(help="Another model of equal shape, such as the one this was initialised from.")
    ] = None,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what every block of a language model does to its hidden states, by denoising step for diffusion models.

    Examples: skipwise analyze tiny-dllm -o runs/analysis-tiny-dllm
    |    skipwise analyze Dream-org/Dream-v0-Base-7B --beside Qwen/Qwen2.5-7B --parts layers,tokens,lens
    |    accelerate launch -m skipwise analyze tiny-dllm
    """
    check_writable(output)
    chosen_parts = check_parts([part.strip() for part in parts.split(",") if part.strip()])
    with joined() as writes, progress_bar() as tell:
        network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
        other = load(beside, dtype=dtype, device=device, tokenizer=tokenizer)[0] if beside else None
        chosen = read_lines(texts) if texts else calibration_texts(tokenizer, count)

        def settings(what: str) -> dict[str, Any]:
            progress = (lambda *at: tell(what, *at)) if writes else None
            return {"max_tokens": max_tokens, "batch_size": batch_size, "outliers": outliers, "on_progress": progress}

        comparison = None
        if other is not None and beside is not None:  # first, as not every model can stand beside another
            shown = f"{model} beside {beside}"
            comparison = compare(network, other, tokenizer, chosen, names=(model, beside), **settings(shown))
        shown = f"{model}: analyse"
        analysis = analyze(network, tokenizer, chosen, name=model, parts=chosen_parts, **settings(shown))
    if writes:
        _write(output, analysis, comparison)


def _write(output: Path, analysis: Analysis, comparison: Comparison | None) -> None:
    analysis.save(output)
    tokens = analysis.calibration["tokens"]
    console.print(f"{tokens} tokens of {analysis.name} analysed; written to {output}", highlight=False)
    if comparison:
        comparison.save(output)
        console.print(_say(comparison), highlight=False)


def _say(comparison: Comparison) -> str:
    values = comparison.corresponding
    first, second = comparison.names
    return (
        f"{first} beside {second}: CKA of corresponding layers {float(values.mean()):.3f} on average, "
        f"{float(values.min()):.3f} to {float(values.max()):.3f}"
    )
