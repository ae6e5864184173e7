"""`skipwise bench`: tokens a second, memory, and the share of what this machine can do."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from skipwise.benchmarking import BenchResult, BenchSettings, bench
from skipwise.benchmarking.modes import THRESHOLD
from skipwise.benchmarking.result import Row
from skipwise.benchmarking.subject import prepare
from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, console, progress_bar
from skipwise.files import check_output, write_atomically
from skipwise.plan import Plan
from skipwise.sampling import FAMILIES


def command(
    model: ModelName,
    plan: Annotated[Path | None, typer.Option(help="Also time every mode under this plan.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights; a preset or a config.json is enough.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.", min=1)] = 1,
    prompt_length: Annotated[int | None, typer.Option(help="Tokens of a prompt; up to 128 by default.", min=1)] = None,
    gen_length: Annotated[int | None, typer.Option(help="New tokens a prompt; up to 128 by default.", min=1)] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens a block; up to 32 by default.", min=1)] = None,
    family: Annotated[
        str | None, typer.Option(help=f"Sampler: {', '.join(FAMILIES)}; llada, block by block, by default.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Of the mode that commits in parallel.")] = THRESHOLD,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also time exact decoding through torch.compile (minutes at first).")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Every mode runs once in each, in turns.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts, noise and random weights.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what this machine can do, then time every way to decode, in turns. The last line is one JSON object.

    Examples: skipwise bench tiny-dllm --plan plan.json    |    skipwise bench llada-8b --random-weights --device cuda
    """
    settings = BenchSettings(
        batch=batch,
        prompt_length=prompt_length,
        gen_length=gen_length,
        block_length=block_length,
        family=family,
        threshold=threshold,
        compile=compile,
        rounds=rounds,
        seed=seed,
    )
    loaded = Plan.load(plan) if plan else None
    if json_file:
        check_output(json_file)
    subject = prepare(model, random=random_weights, dtype=dtype, device=device, seed=seed, tokenizer=tokenizer_name)
    with progress_bar() as tell:
        result = bench(subject, loaded, settings, lambda what, *at: tell(f"{model}: {what}", *at))
    show(result)
    line = result.model_dump_json()
    if json_file:
        write_atomically(json_file, line + "\n")
    print(line)


def show(result: BenchResult) -> None:
    """The table, and beneath it what its columns are of."""
    work, ceiling = result.workload, result.ceiling
    console.print(table(result))
    console.print(
        f"[dim]{result.machine.device}, {result.machine.threads} threads: at most "
        f"{ceiling.matrix_flops / 1e9:,.1f} GFLOP/s ({ceiling.dtype}, {ceiling.matrix_size} x {ceiling.matrix_size}), "
        f"{ceiling.bandwidth / 1e9:,.1f} GB/s ({ceiling.bandwidth_by}). {work.weights.capitalize()} weights, batch "
        f"{work.batch}, {work.prompt_length} + {work.gen_length} tokens, {result.rounds} rounds. "
        f"Peak: {result.memory_is}.[/dim]",
        highlight=False,
    )


def table(result: BenchResult) -> Table:
    """One row a mode."""
    title = f"{result.workload.architecture} ({result.workload.model}), {result.workload.family} sampler"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    shown.add_column("mode", no_wrap=True)
    for column in ("tokens/s", "seconds\nto exact", "ms a\nforward", "forwards\na token", "as\nexact", "peak\nMiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for column in ("matrix\nrate", "band-\nwidth"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Row) -> tuple[str, ...]:
    compared = row.seconds_to_exact
    return (
        row.mode,
        f"{row.tokens_per_second:,.1f}",
        f"{compared.value:.2f} ({compared.low:.2f}-{compared.high:.2f})",
        f"{1000 * row.seconds_per_forward:,.2f}",
        f"{row.forwards_per_token:.2f}",
        f"{row.agreement:.1%}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        f"{row.share_of_matrix_rate:.1%}",
        f"{row.share_of_bandwidth:.1%}",
    )
