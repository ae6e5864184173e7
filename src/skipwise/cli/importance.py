"""`skipwise schedule importance`: at which noise levels a light model is far from the heavy one."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, console, progress_bar, read_lines
from skipwise.errors import UserError
from skipwise.evaluation import Interval, calibration_texts
from skipwise.files import check_writable
from skipwise.loading import load
from skipwise.plan import Plan
from skipwise.report.importance import plot_importance
from skipwise.scheduling.importance import THIRDS, Importance, measure_importance


def command(
    heavy: ModelName,
    light: Annotated[str | None, typer.Option(help="The light model, of the same tokenizer; or give --plan.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan of the heavy model, which under it is the light one.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for importance.json and .svg.")] = Path(
        "runs/importance"
    ),
    texts: Annotated[
        Path | None, typer.Option(help="File with one held-out text a line; built-in ones by default.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many built-in texts to read.", min=1)] = 64,
    bins: Annotated[int, typer.Option(help="Bins of noise levels; every text is read once in each.", min=1)] = 24,
    max_tokens: Annotated[
        int | None, typer.Option(help="Texts are cut to this length; by default the models' own, 512 at most.", min=2)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise and the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts a forward.", min=1)] = 16,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure loss and KL of a heavy and a light masked diffusion model by noise level, on the same noised texts.

    Examples: skipwise schedule importance tiny-text --light tiny-text-light -o runs/importance
    |    skipwise schedule importance tiny-dllm --plan plan.json
    """
    if (light is None) == (plan is None):
        raise UserError("Give either --light, another model, or --plan, under which the heavy model is the light one.")
    under = Plan.load(plan) if plan else None
    check_writable(output)
    heavy_model, tokenizer = load(heavy, dtype=dtype, device=device, tokenizer=tokenizer_name)
    light_model, light_tokenizer = (
        load(light, dtype=dtype, device=device, tokenizer=tokenizer_name) if light else (None, None)
    )
    chosen = read_lines(texts) if texts else calibration_texts(tokenizer, count)
    with progress_bar() as tell:
        importance = measure_importance(
            heavy_model,
            light_model,
            tokenizer,
            chosen,
            plan=under,
            light_tokenizer=light_tokenizer,
            bins=bins,
            max_tokens=max_tokens,
            seed=seed,
            batch_size=batch_size,
            names=(heavy, light or heavy),
            on_progress=lambda *at: tell("step importance", *at),
        )
    plot_importance(importance, output / "importance.svg")
    written = importance.save(output / "importance.json")
    console.print(_table(importance))
    console.print(_summary(importance), highlight=False)
    console.print(f"written to {written} and importance.svg beside it", highlight=False)


def _table(importance: Importance) -> Table:
    """One row a bin, in the order of sampling, in nats a masked token."""
    title = (
        f"{importance.describe()}\nnats a masked token on {importance.texts} texts, 95% bands; sampling runs downwards"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    losses = ("loss,\nheavy", "loss,\nlight")
    for column in ("noise level t", *losses, "KL(heavy || light)", "KL(light || heavy)", "share\nof KL"):
        shown.add_column(column, justify="right", no_wrap=True)
    n, curves = importance.bins, importance.token
    for i in reversed(range(n)):
        found = (f"{points[i].value:.3f}" for points in (curves.heavy_loss, curves.light_loss))
        kls = (_band(points[i]) for points in (curves.kl, curves.reverse_kl))
        share = importance.share(1 - (i + 1) / n, 1 - i / n)
        shown.add_row(f"{(i + 1) / n:.3f} to {i / n:.3f}", *found, *kls, f"{100 * share:.1f}%")
    return shown


def _band(point: Interval) -> str:
    return f"{point.value:.4f} ({point.low:.4f} to {point.high:.4f})"


def _summary(importance: Importance) -> str:
    """What a light model costs all along the trajectory, and in which third the models are apart."""
    gap, kl = (importance.totals[curve] for curve in ("loss_gap", "kl"))
    parts = [
        f"{name} third {100 * third.value:.1f}% ({100 * third.low:.1f} to {100 * third.high:.1f})"
        for name, third in zip(THIRDS, importance.thirds, strict=True)
    ]
    return (
        f"all light: the loss rises by {_band(gap)} nats a token, KL(heavy || light) is {_band(kl)}\n"
        f"share of the KL: {', '.join(parts)}"
    )
