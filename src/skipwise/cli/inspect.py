"""`skipwise inspect`: stacks, blocks, parameters, FLOPs, and what can be planned."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from torch import nn

from skipwise.blocks import Stack, find_contract, module_list
from skipwise.cli.common import ModelName, WouldBeDtype, console, settings_from
from skipwise.cost import Cost, Price, Prices, estimate, price_blocks
from skipwise.errors import UserError
from skipwise.examples import Size
from skipwise.loading import load_skeleton
from skipwise.models import kind_of
from skipwise.plan import Plan


def command(
    model: ModelName,
    tokens: Annotated[int, typer.Option(help="Text length that a language model's FLOPs are for.", min=1)] = 1024,
    image: Annotated[
        int, typer.Option(help="Side of the latent image in latent pixels, for image models.", min=2)
    ] = 128,
    text: Annotated[int, typer.Option(help="Text tokens that an image model is conditioned on.", min=1)] = 512,
    dtype: WouldBeDtype = "bfloat16",
    skip: Annotated[int | None, typer.Option(help="Also price skipping this many blocks.", min=0)] = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Estimate the memory of fine-tuning an image model instead.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="With --finetune: find settings that fit, such as 8GiB.")] = None,
    blocks: Annotated[
        str, typer.Option(help="With --finetune: blocks to train: all, a number, 50% of their bytes, or 8GiB.")
    ] = "all",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --finetune: name=value, such as patch=256, checkpointing=true, late=none."),
    ] = None,
) -> None:
    """Print a model's stacks of blocks, their parameters and FLOPs, and what can be planned. No weights are needed.

    Examples: skipwise inspect llada-8b --skip 6    |    skipwise inspect flux.1-dev --image 64    |
    skipwise inspect flux.1-dev --finetune --memory 12GiB    |
    skipwise inspect flux.1-dev --finetune --blocks 28 --set patch=256
    """
    if finetune:
        return _print_finetuning(model, memory, blocks, settings_from(settings or [], command))
    if memory or settings or blocks != "all":
        raise UserError("--memory, --blocks and --set are for the estimate of a fine-tuning; add --finetune.")
    skeleton = load_skeleton(model, dtype=dtype)
    contract = find_contract(skeleton)
    prices = price_blocks(skeleton, Size(tokens=tokens, image=image, text=text))
    of_images = kind_of(skeleton) == "image or video diffusion"
    at = f"a {image} x {image} latent image and {text} text tokens" if of_images else f"{tokens:,} tokens"
    title = f"{contract.architecture} ({model}), one forward at {at}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("stack", "block", "streams", "parameters\na block", "FLOPs\na block", "of all\nFLOPs"):
        table.add_column(column, overflow="fold")
    for name, stack in contract.stacks.items():
        table.add_row(*_row(stack, prices.blocks[name], prices, _parameters(skeleton, name)))
    table.add_row("outside of the blocks", "", "", "", _flops(prices.outside.flops), _share(prices.outside, prices))
    console.print(table)
    for name, reason in contract.refused.items():
        console.print(f"not planned: {name}: {reason}", highlight=False)
    if skip is not None:
        plan = Plan.static(contract.shape, {contract.main_stack: range(skip)})
        _print_saving(plan, estimate(skeleton, plan, prices.size), contract.main_stack, at, dtype)


def _print_finetuning(model: str, memory: str | None, blocks: str, changes: dict[str, Any]) -> None:
    from skipwise.cli.finetune import Choice, print_estimate
    from skipwise.finetuning.settings import FinetuneSettings

    choice = Choice(model, blocks=blocks, memory=memory)
    plan, settings = choice.make(FinetuneSettings().but(**changes))
    print_estimate(choice, settings, plan)


def _parameters(model: nn.Module, name: str) -> list[int]:
    return [sum(p.numel() for p in block.parameters()) for block in module_list(model, name)]


def _row(stack: Stack, row: tuple[Price, ...], prices: Prices, parameters: list[int]) -> list[str]:
    streams = "\n".join(stream.argument for stream in stack.streams)
    place = " (keeps its place)" if stack.in_place else ""
    share = _share(sum(row, Price()), prices)
    flops = _range([price.flops for price in row], _flops)
    block = f"{stack.length} x {stack.block_class}{place}"
    return [stack.name, block, streams, _range(parameters, _count), flops, share]


def _range(values: list[int], show: Callable[[int], str]) -> str:
    low, high = min(values), max(values)
    return show(low) if low == high else f"{show(low)} to {show(high)}"


def _share(price: Price, prices: Prices) -> str:
    return f"{100 * price.flops / prices.forward().flops:.2f}%"


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _flops(number: int) -> str:
    return f"{number / 1e9:,.3f} GFLOP" if number < 1e12 else f"{number / 1e12:,.3f} TFLOP"


def _print_saving(plan: Plan, cost: Cost, stack: str, at: str, dtype: str) -> None:
    skipped = sum(map(len, plan.phases[0].skip.values()))
    console.print(
        f"skipping {skipped} of {plan.model.stacks[stack]} blocks of {stack} saves {cost.saved_block_flops:.2%} of "
        f"block FLOPs (the papers' count), {cost.saved_head_flops:.2%} with the head, "
        f"{cost.saved_all_in_flops:.2%} all-in with attention at {at}; "
        f"{cost.weight_bytes / 2**30:.2f} GiB of {dtype} weights are left",
        highlight=False,
    )
