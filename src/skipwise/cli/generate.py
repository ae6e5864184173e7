"""`skipwise generate`: decode under a plan."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from skipwise.cli.common import Device, Dtype, ModelName, TokenizerName, console, settings_from
from skipwise.errors import UserError
from skipwise.loading import chat_prompts, load
from skipwise.plan import Plan
from skipwise.sampling import FAMILIES, Statistics, generate
from skipwise.sampling.others import load_others


def command(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    plan: Annotated[Path | None, typer.Option(help="A plan to decode under.")] = None,
    gen_length: Annotated[int, typer.Option(help="New tokens a prompt; 0 fills the prompt's own masks.", min=0)] = 128,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; one a token by default (diffusion only).")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens decoded block by block (diffusion only).")] = None,
    remasking: Annotated[str | None, typer.Option(help="low_confidence or random (diffusion only).")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Commit all tokens that are this probable (LLaDA's sampler).")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance (LLaDA's sampler).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    family: Annotated[
        str | None, typer.Option(help=f"Sampler: {', '.join(FAMILIES)}; the model's own by default (diffusion only).")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of the sampler, such as alg=entropy.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt to the model by its chat template, and print the answer.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the model is told before each prompt.")] = None,
    tokenizer_name: TokenizerName = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode text with any language model, under a plan or without, and say what it took.

    Examples: skipwise generate tiny-dllm "s3141592=" --gen-length 7 --plan plan.json    |
    skipwise generate tiny-dllm "r3141592=29<mask>1413" --gen-length 0    |
    skipwise generate GSAI-ML/LLaDA-8B-Instruct --chat "Why is the sky blue?" --block-length 32
    """
    if not all(prompts):
        raise UserError("A prompt is empty; give at least one character, such as 'a123+456='.")
    if system and not chat:
        raise UserError("--system is for a chat; add --chat.")
    network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
    if tokenizer is None:
        raise UserError(f"{model} came without a tokenizer, so it cannot read prompts; name one with --tokenizer.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat:
        inputs = chat_prompts(tokenizer, prompts, system).to(network.device)
    else:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(network.device)
    given: dict[str, Any] = {
        "steps": steps,
        "block_length": block_length,
        "remasking": remasking,
        "threshold": threshold,
        "cfg_scale": cfg_scale,
        "temperature": temperature,
        "family": family,
    }
    loaded = Plan.load(plan) if plan else None
    generated = generate(
        network,
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        plan=loaded,
        others=load_others(loaded, network, tokenizer),
        gen_length=gen_length,
        seed=seed,
        **{key: value for key, value in given.items() if value is not None},
        **settings_from(setting or [], command, inspect.signature(generate).parameters),
    )
    start = inputs["input_ids"].shape[1]
    for prompt, sequence in zip(prompts, generated.sequences, strict=True):
        infilled = tokenizer.mask_token is not None and tokenizer.mask_token in prompt
        text = tokenizer.decode(sequence if infilled else sequence[start:], skip_special_tokens=True)
        console.print(text if infilled or chat else prompt + text, highlight=False, markup=False)
    stats = generated.stats
    console.print(
        f"[dim]{stats.forwards} forwards{_by_model(stats)}, {stats.all_in_flops / 1e9:.3f} GFLOP all-in "
        f"({1 - stats.all_in_flops / stats.whole_all_in_flops:.1%} saved), {stats.seconds:.2f} s[/dim]",
        highlight=False,
    )


def _by_model(stats: Statistics) -> str:
    """` (5 of it, 2 of tiny-text-light)`, or nothing where one model did it all."""
    if not stats.by_model or set(stats.by_model) == {None}:
        return ""
    parts = (f"{share.forwards} of {name or 'the model itself'}" for name, share in stats.by_model.items())
    return f" ({', '.join(parts)})"
