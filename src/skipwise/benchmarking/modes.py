"""The ways to decode that are timed side by side: those that a model and a sampler can do."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from skipwise.errors import UserError
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.sampling import FAMILIES
from skipwise.sampling.cache import KINDS, check_cacheable

THRESHOLD = 0.9  # the default of Fast-dLLM's evaluation
EXACT = "exact"  # the mode that the others are compared with
AUTOREGRESSIVE = "autoregressive"  # no family of denoisers: one token after the other
BLOCKS = "llada"  # the family whose sampler decodes block by block, with thresholds


FOCUS = 8  # masks that a step of the mode "focus" looks at


@dataclass(frozen=True)
class Mode:
    """A name, what `skipwise.generate` is told, and whether the tokens are meant to be those of exact decoding."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    exact: bool = False


def modes(
    model: nn.Module, family: str, plan: Plan | None = None, threshold: float = THRESHOLD, compile: bool = False
) -> list[Mode]:
    """Exact decoding first, compiled too if asked, then each approximation; with a plan, all of them under it, too."""
    ways: dict[str, dict[str, Any]] = {EXACT: {}}
    if compile and family != AUTOREGRESSIVE:
        ways["compiled"] = {"compile": True}
    if family == BLOCKS:
        ways |= {"threshold": {"threshold": threshold}, **caches(model)}
        ways |= {"dual, threshold": {"cache": "dual", "threshold": threshold}} if "dual" in ways else {}
    found = [Mode(name, settings, exact=set(settings) <= {"compile"}) for name, settings in ways.items()]
    if plan is not None:
        found += [Mode(f"{name} + plan" if settings else "plan", settings, plan) for name, settings in ways.items()]
    return found


def caches(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The caches that this model can be decoded with, by name."""
    try:
        check_cacheable([model], KINDS[0])
    except UserError:
        return {}
    return {kind: {"cache": kind} for kind in KINDS} | {"focus": {"cache": "delayed", "focus": FOCUS}}


def family_for(model: nn.Module, wanted: str | None) -> str:
    """The sampler: what was asked for, or LLaDA's, which runs on every masked diffusion model, or `autoregressive`."""
    if kind_of(model) != "masked diffusion":
        return AUTOREGRESSIVE
    return wanted if wanted in FAMILIES else BLOCKS
