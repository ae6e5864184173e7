"""`skipwise schedule`: which denoising steps run light."""

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from skipwise.blocks import find_contract
from skipwise.cli import front, importance, search
from skipwise.cli.common import ModelName, console, read_light
from skipwise.cost import Cost, estimate
from skipwise.errors import UserError
from skipwise.examples import Size
from skipwise.files import check_output
from skipwise.loading import load_skeleton
from skipwise.plan import Plan
from skipwise.planners.sandwich import PLACEMENTS, from_lengths, from_segments, schedule, share_for
from skipwise.sampling.others import check_tokens

app = typer.Typer(help="Which denoising steps run light: measure, place, search.", no_args_is_help=True)

app.command("importance")(importance.command)
app.command("search")(search.command)
app.command("front")(front.command)

LightName = Annotated[
    str, typer.Option(help="What is light: another model, or a static plan (.json) of the same model.")
]


@app.command("plan")
def plan(
    model: ModelName,
    light: LightName,
    placement: Annotated[str | None, typer.Option(help=f"Where light steps are: {', '.join(PLACEMENTS)}.")] = None,
    share: Annotated[float | None, typer.Option(help="Of the trajectory that runs light (0.25).")] = None,
    budget: Annotated[float | None, typer.Option(help="Or: the fraction of block FLOPs to save.")] = None,
    segments: Annotated[
        str | None, typer.Option(help="Or: a letter for each equal segment, H heavy, L light, as LHHHHHHL.")
    ] = None,
    lengths: Annotated[str | None, typer.Option("--schedule", help="Or: as the paper writes, L125-H750-L125.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a sequence, for the FLOPs that are shown.", min=1)] = 128,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
) -> None:
    """Place light steps in the trajectory and write the plan. No weights are read.

    Examples: skipwise schedule plan tiny-text --light tiny-text-light --placement sandwich --share 0.25
    |    skipwise schedule plan tiny-text --light tiny-text-light --segments LHHHHHHL
    |    skipwise schedule plan tiny-dllm --light static.json --placement first --budget 0.1
    """
    ways = {"--placement": placement, "--segments": segments, "--schedule": lengths}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude one another; give one of them.")
    if (segments or lengths) and (share is not None or budget is not None):
        raise UserError(f"{given[0]} says already which steps are light; leave out --share and --budget.")
    if share is not None and budget is not None:
        raise UserError("--share and --budget exclude one another; give one of them.")
    check_output(output)
    chosen = read_light(light)
    network = load_skeleton(model)
    others = {} if isinstance(chosen, Plan) else {chosen: load_skeleton(chosen)}
    for name, other in others.items():
        check_tokens(network, other, name)
    shape = find_contract(network).shape
    if segments:
        made = from_segments(shape, segments, chosen)
    elif lengths:
        made = from_lengths(shape, lengths, chosen)
    else:
        where = placement or "sandwich"
        if budget is not None:
            share = share_for(budget, _cost(network, schedule(shape, chosen, where, 1.0), others, tokens))
        made = schedule(shape, chosen, where, 0.25 if share is None else share)
    cost = _cost(network, made, others, tokens)
    console.print(
        f"{made.describe()}; saves {cost.saved_block_flops:.1%} of block FLOPs, {cost.saved_all_in_flops:.1%} all-in "
        f"at {tokens} tokens; written to {made.save(output)}",
        highlight=False,
    )


def _cost(model: nn.Module, made: Plan, others: dict[str, nn.Module], tokens: int) -> Cost:
    return estimate(model, made, Size(tokens=tokens), others)
