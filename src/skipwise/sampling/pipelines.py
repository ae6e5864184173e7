"""A diffusers pipeline under a plan with phases: its denoiser is changed between steps, by the pipeline's own callback.

A plan is made for the pipeline's transformer. While the pipeline runs, blocks are skipped in it, or another transformer
stands in its place, as the plan says; afterwards everything is what it was.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.cost import Prices, price_blocks
from skipwise.errors import UserError
from skipwise.plan import Plan
from skipwise.sampling.accounts import Shares, shares
from skipwise.sampling.denoiser import Denoiser, Forward
from skipwise.sampling.others import load_others
from skipwise.skipping import skip

COMPONENT = "transformer"  # what denoises in a pipeline


@dataclass
class Follower:
    """Give it to the pipeline as `callback_on_step_end`. `forwards` are the calls of transformers as they happened."""

    pipeline: Any
    denoiser: Denoiser
    forwards: list[Forward] = field(default_factory=list)
    _inputs: dict[str | None, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called at the end of a step: move to where the next one starts; after the last, to the beginning."""
        progress = (step + 1) / pipeline.num_timesteps
        self.at(progress if progress < 1 else 0.0)
        return {}

    def at(self, progress: float) -> None:
        """Put in place what runs at `progress` (0 = all noise, 1 = done)."""
        self.running = self.denoiser.at(progress)
        setattr(self.pipeline, COMPONENT, self.denoiser.named(self.running.model))

    def account(self) -> Shares:
        """What the forwards so far took, by model. FLOPs are those of the first inputs that each model saw."""
        return shares(self.forwards, self._prices)

    def _prices(self, name: str | None, tokens: int) -> Prices:
        rows, example = self._inputs[name if name in self._inputs else next(iter(self._inputs))]
        prices = price_blocks(self.denoiser.named(name), example=example)
        return prices.per_row(rows)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Enter a call of a transformer in the accounts."""
        given = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
        given.pop("self", None)
        first = next(value for value in given.values() if isinstance(value, Tensor) and value.ndim)
        if first.is_meta:  # it is being priced
            return
        rows = len(first)
        self._inputs.setdefault(self.running.model, (rows, given))
        self.forwards.append(Forward(self.running, rows, 0))


@contextmanager
def follow(pipeline: Any, plan: Plan, others: Mapping[str, nn.Module] | None = None) -> Iterator[Follower]:
    """Run a diffusers pipeline under a plan of its transformer: `pipeline(..., callback_on_step_end=follower)`.

    others: transformers by the names that the plan's phases give them; those not here are loaded by that name.
    Raises UserError for a pipeline without a transformer and for a plan of another one.
    """
    model = getattr(pipeline, COMPONENT, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(pipeline).__name__} has no transformer, which is what a plan is about.")
    found = load_others(plan, model, given=others)
    for other in found.values():
        find_contract(other)  # traced now, so that the call it takes is not counted
    handles = []
    with skip(model, plan.own_part) as skipping:
        follower = Follower(pipeline, Denoiser(model, skipping, plan, found))
        try:
            for module in (model, *found.values()):
                # no bound method: pricing copies modules with their hooks, and would copy the pipeline along
                handle = module.register_forward_pre_hook(lambda *call: follower.note(*call), with_kwargs=True)
                handles.append(handle)
            follower.at(0.0)
            yield follower
        finally:
            setattr(pipeline, COMPONENT, model)
            for handle in handles:
                handle.remove()
