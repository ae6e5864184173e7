"""Schedules: which part of the denoising trajectory runs light, given as a placement, by segments or by lengths.

Source: "Not All Denoising Steps Are Equal" (arXiv 2604.02340), whose best placement is the sandwich: light steps first
and last, heavy ones in the middle. Ours: what is light may also be the model itself under a static plan.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from skipwise.cost import Cost
from skipwise.errors import UserError, unknown
from skipwise.plan import ModelShape, Phase, Plan, Provenance
from skipwise.stand_ins import key
from skipwise.versions import versions

Light = str | Plan  # the name of another model, as `skipwise.load` takes it, or a static plan of the same model
Stretch = tuple[float, bool]  # (until, whether it is light)

SPREAD = 8  # pieces that light steps are spread in


def _first(share: float) -> list[Stretch]:
    return [(share, True), (1.0, False)]


def _last(share: float) -> list[Stretch]:
    return [(1 - share, False), (1.0, True)]


def _middle(share: float) -> list[Stretch]:
    return [((1 - share) / 2, False), ((1 + share) / 2, True), (1.0, False)]


def _sandwich(share: float) -> list[Stretch]:
    return [(share / 2, True), (1 - share / 2, False), (1.0, True)]


def _spread(share: float) -> list[Stretch]:
    pieces = ((piece / SPREAD, share / SPREAD) for piece in range(SPREAD))
    return [stretch for begin, light in pieces for stretch in ((begin + light, True), (begin + 1 / SPREAD, False))]


PLACEMENTS: Mapping[str, Callable[[float], list[Stretch]]] = {
    "first": _first,
    "last": _last,
    "middle": _middle,
    "sandwich": _sandwich,
    "spread": _spread,
}


def schedule(shape: ModelShape, light: Light, placement: str = "sandwich", share: float = 0.25) -> Plan:
    """A plan that runs light for this share of the trajectory, placed as the paper's schedules are.

    shape: of the heavy model (`skipwise.find_contract(model).shape`). light: the name of another model, or a static
    plan of the same model. placement: first, last, middle, sandwich (half at either end) or spread (in 8 even pieces).
    Raises UserError for an unknown placement, a share outside of [0, 1], and a light plan that is not static.
    """
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    if not 0 <= share <= 1:
        raise UserError(f"share={share} is no part of a trajectory; choose from 0 (all heavy) to 1 (all light).")
    return _plan(shape, light, PLACEMENTS[placement](share), placement, {"share": share})


def from_segments(shape: ModelShape, segments: str, light: Light, expected: int | None = None) -> Plan:
    """A plan by equal segments of the trajectory, such as "LHHHHHHL": H runs heavy, L light.

    expected: how many segments there must be. Raises UserError for other letters and another number.
    """
    if not re.fullmatch("[HL]+", segments):
        raise UserError(f"{segments!r} is no schedule; write one letter a segment, H heavy or L light, as in LHHL.")
    if expected is not None and len(segments) != expected:
        raise UserError(f"{segments} has {len(segments)} segments, not {expected}; write one letter for each.")
    stretches = [((number + 1) / len(segments), letter == "L") for number, letter in enumerate(segments)]
    return _plan(shape, light, stretches, "segments", {"segments": segments})


def from_lengths(shape: ModelShape, notation: str, light: Light) -> Plan:
    """A plan in the paper's notation, such as "L125-H750-L125": parts in order, each with its number of steps.

    Only the ratios count: a plan knows progress, not steps. Raises UserError for what cannot be read.
    """
    parts = [re.fullmatch(r"([HL])(\d+)", part) for part in notation.split("-")]
    total = sum(int(part[2]) for part in parts if part)
    if not all(parts) or not total:
        raise UserError(f"{notation!r} is no schedule; write parts and their steps, as in L125-H750-L125.")
    stretches, done = [], 0
    for part in parts:
        assert part is not None
        done += int(part[2])
        stretches.append((done / total, part[1] == "L"))
    return _plan(shape, light, stretches, "lengths", {"schedule": notation})


def share_for(budget: float, light: Cost) -> float:
    """The share of light steps that saves this fraction of block FLOPs. light: the cost of running light all the way.

    Raises UserError, with the most that can be saved, for a budget that light steps cannot meet.
    """
    if not 0 <= budget <= light.saved_block_flops:
        raise UserError(
            f"budget={budget} cannot be met: all steps light save {light.saved_block_flops:.4f} of the block FLOPs; "
            f"choose from 0 to {light.saved_block_flops:.4f}."
        )
    return budget / light.saved_block_flops if budget else 0.0


def _plan(
    shape: ModelShape, light: Light, stretches: Sequence[Stretch], method: str, settings: Mapping[str, Any]
) -> Plan:
    merged = _merge(stretches)
    made_by = Provenance(method=method, settings=dict(settings), versions=versions())
    if isinstance(light, str):
        phases = [Phase(until=until, model=light if is_light else None) for until, is_light in merged]
        return Plan(model=shape, phases=tuple(phases), made_by=made_by)
    light.check_model(shape)
    if not light.is_static or light.phases[0].model or light.adapter:
        raise UserError(
            "The light plan of a schedule is a static plan without an adapter; make one with `skipwise plan`."
        )
    skip, kind = light.phases[0].skip, light.phases[0].stand_in
    phases = [Phase(until=until, skip=skip if is_light else {}) for until, is_light in merged]
    plan = Plan(model=shape, phases=tuple(phases), made_by=made_by)
    lit = [number for number, phase in enumerate(phases) if phase.skip]
    return plan.with_stand_ins(kind, _repeated(light, lit)) if kind and lit else plan


def _merge(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Without empty stretches, and with neighbours of a kind made one; the last ends at 1."""
    merged: list[Stretch] = []
    begun = 0.0
    for until, is_light in stretches:
        if until <= begun + 1e-9:
            continue
        if merged and merged[-1][1] == is_light:
            merged.pop()
        merged.append((until, is_light))
        begun = until
    return [*merged[:-1], (1.0, merged[-1][1])]


def _repeated(light: Plan, phases: Sequence[int]) -> dict[str, Tensor]:
    """The stand-ins of a static plan for each of these phases."""
    found: dict[str, Tensor] = {}
    for name, tensor in light.stand_in_tensors().items():
        _, stack, block, which = name.split("/")
        found |= {key(phase, stack, int(block), which): tensor.clone() for phase in phases}
    return found
