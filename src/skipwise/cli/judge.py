"""`skipwise judge`: how good the text is that a model writes, without and under plans."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.cli.common import (
    Device,
    Dtype,
    JudgeDtype,
    ModelName,
    TokenizerName,
    console,
    progress_bar,
    read_lines,
    settings_from,
)
from skipwise.errors import UserError
from skipwise.evaluation import evaluate
from skipwise.evaluation.writing import Writing, family_of
from skipwise.files import check_output
from skipwise.loading import load
from skipwise.plan import Plan
from skipwise.report.writing import facts_of, writing_table
from skipwise.sampling.denoiser import denoising


def command(
    model: ModelName,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan to write under; repeat for several.")] = None,
    judge: Annotated[str, typer.Option(help="The causal language model that judges, anything that loads.")] = (
        "smollm2-135m"
    ),
    judge_dtype: JudgeDtype = "float32",
    samples: Annotated[int, typer.Option(help="Texts to write, each from its own seed.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="New tokens a text.", min=1)] = 128,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the sampler's default when left out.")] = None,
    prefixes: Annotated[
        Path | None, typer.Option(help="Texts to continue, one a line; only what follows is scored.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Another family's sampler than the model's own.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of the sampler, such as noise_dtype=float32.")
    ] = None,
    end_of_text: Annotated[str, typer.Option(help="What becomes of it: cut, or mdlm for the official count.")] = "cut",
    show: Annotated[int, typer.Option(help="Print this many texts of every plan.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts a forward of the model; changes no result.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of the first text; text i has seed + i. Also of the bootstrap.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the Result.")] = Path("result.json"),
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Let a model write without and under plans, and score the texts: perplexity under a judge, and diversity.

    Example: skipwise judge tiny-text --plan plan.json --judge smollm2-135m --samples 64 --set sampler=ddpm_cache
    """
    plans = [Plan.load(path) for path in plan or []]
    given = settings_from(setting or [], command)
    begun = _prefixes(prefixes)
    check_output(output)
    network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
    writing = Writing(
        judge=judge,
        judge_dtype=judge_dtype,
        samples=samples,
        length=length,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        prefixes=begun,
        family=family or family_of(network),
        settings=given,
        end_of_text=end_of_text,
    )
    writing.judge_for(network)  # a mistake in its name is found before anything is written, and its loading not timed
    with progress_bar() as tell:
        result = evaluate(
            network,
            tokenizer,
            tasks=[writing],
            plans=plans,
            seed=seed,
            name=model,
            on_progress=lambda *at: tell(f"{model}: write and judge", *at),
        )
    console.print(writing_table(result))
    for fact in facts_of(result):
        console.print(fact, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {result.save(output)}", highlight=False)
    if show:
        _show(network, tokenizer, replace(writing, samples=min(show, samples)), [None, *plans])


def _prefixes(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    lines = tuple(read_lines(path))
    if not lines:
        raise UserError(f"{path} holds no prefixes; write one a line, or leave out --prefixes.")
    return lines


def _show(model: Any, tokenizer: Any, writing: Writing, plans: Iterable[Plan | None]) -> None:
    """Print texts, written once more: each depends on its own seed alone, so they are those that were judged."""
    for plan in plans:
        with denoising(model, plan, tokenizer=tokenizer) as denoiser:
            ids = writing.write(denoiser, tokenizer)
        console.print(f"\n[bold]{plan.method if plan else 'whole model'}[/bold]")
        for number, text in enumerate(writing.texts(ids, tokenizer)):
            console.print(f"{number}: {writing.prefix(number)}{text}", highlight=False, markup=False, soft_wrap=True)
