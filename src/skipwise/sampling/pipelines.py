"""A diffusers pipeline under a plan: its transformers are changed between steps, by the pipeline's own callback.

Most pipelines denoise with one transformer. Wan2.2 has two experts, one for high and one for low noise, and Ideogram 4
a second one for the forward without a prompt: each is planned, followed and counted. While the pipeline runs, blocks
are skipped in them, or another transformer stands in their place, as the plans say; afterwards everything is what it
was.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.cost import Prices, price_blocks
from skipwise.errors import UserError, unknown
from skipwise.plan import Plan
from skipwise.sampling.accounts import Share, Shares, shares
from skipwise.sampling.denoiser import Denoiser, Forward, Running
from skipwise.sampling.others import load_others
from skipwise.skipping import skip
from skipwise.wrapping import class_of, unwrap

COMPONENT = "transformer"  # in the names of the components that denoise: transformer_2, unconditional_transformer
CALLBACK = "callback_on_step_end"


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers that denoise in a pipeline, by the names of its components; those that it lacks are left out.

    Raises UserError for a pipeline without any.
    """
    parts = dict(getattr(pipeline, "components", {}))
    found = {name: part for name, part in parts.items() if COMPONENT in name and isinstance(part, nn.Module)}
    if not found:
        models = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        raise UserError(
            f"{type(pipeline).__name__} has no transformer, which is what a plan is about; its models are "
            f"{', '.join(models) or 'none'}. `skipwise.skip` takes any model that has a plan."
        )
    return found


@dataclass
class Follower:
    """Give it to the pipeline as `callback_on_step_end`. It moves all transformers along their plans together, by how
    far the whole pipeline is.

    denoisers: by component name. places: the components that hold the same module, by the first of them. calls: every
    call of a transformer as it happened, with the component in whose place it stood.
    """

    pipeline: Any
    denoisers: Mapping[str, Denoiser]
    places: Mapping[str, tuple[str, ...]]
    calls: list[tuple[str, Forward]] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    told: bool = False  # whether the pipeline has called this
    _inputs: dict[tuple[str, str | None], tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called at the end of a step: move to where the next one starts; after the last, to the beginning."""
        self.told = True
        if not self.timeless:
            progress = (step + 1) / pipeline.num_timesteps
            self.at(progress if progress < 1 else 0.0)
        return {}

    def at(self, progress: float) -> None:
        """Put in place what runs at `progress` (0 = all noise, 1 = done)."""
        for name, denoiser in self.denoisers.items():
            self.running[name] = denoiser.at(progress)
            for place in self.places[name]:
                setattr(self.pipeline, place, denoiser.named(self.running[name].model))

    @property
    def timeless(self) -> bool:
        """Whether the same runs at every step."""
        return all(denoiser.timeless for denoiser in self.denoisers.values())

    @property
    def forwards(self) -> list[Forward]:
        """The calls of all transformers, in the order in which they happened."""
        return [forward for _, forward in self.calls]

    def account(self) -> Shares:
        """What the forwards so far took, by model; None stands for the pipeline's own transformers together.

        FLOPs are those of the first inputs that each model saw.
        """
        total: Shares = {}
        for taken in self.accounts().values():
            for model, share in taken.items():
                total[model] = total.get(model, Share()) + share
        return total

    def accounts(self) -> dict[str, Shares]:
        """The same by component: component name -> model -> its share. A component that never ran has no models.

        Where one other model stands in several places at once, its calls are entered for the first of them.
        """
        return {
            name: shares(
                (forward for component, forward in self.calls if component == name), partial(self._prices, name)
            )
            for name in self.denoisers
        }

    def _prices(self, component: str, model: str | None, tokens: int) -> Prices:
        seen = [inputs for (name, _), inputs in self._inputs.items() if name == component]
        rows, example = self._inputs.get((component, model), seen[0])
        return price_blocks(self.denoisers[component].named(model), example=example).per_row(rows)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Enter a call of a transformer in the accounts."""
        given = dict(inspect.signature(class_of(unwrap(module)).forward).bind(module, *args, **kwargs).arguments)
        given.pop("self", None)
        first = next(value for value in given.values() if isinstance(value, Tensor) and value.ndim)
        if first.is_meta:  # it is being priced
            return
        name, running = next(
            (name, running)
            for name, running in self.running.items()
            if self.denoisers[name].named(running.model) is module
        )
        self._inputs.setdefault((name, running.model), (len(first), given))
        self.calls.append((name, Forward(running, len(first), 0)))


@contextmanager
def follow(
    pipeline: Any, plan: Plan | Mapping[str, Plan], others: Mapping[str, nn.Module] | None = None
) -> Iterator[Follower]:
    """Run a diffusers pipeline under a plan of its transformer: `pipeline(..., callback_on_step_end=follower)`.

    plan: of every transformer of the pipeline, or one for each, by component name, such as
    `{"transformer": plan, "transformer_2": other}`; one that is not named runs whole. others: transformers by the names
    that the plans' phases give them; those not here are loaded by that name.
    Raises UserError for a pipeline without a transformer, for a plan of another one, and, when the plan changes along
    the trajectory, for a pipeline that calls nobody between steps or was not given the follower.
    """
    models = transformers_of(pipeline)
    places: dict[str, tuple[str, ...]] = {}
    for name, model in models.items():
        first = next(known for known in models if models[known] is model)
        places[first] = (*places.get(first, ()), name)
    plans = _plans(pipeline, {name: models[name] for name in places}, plan)
    found = dict(others or {})
    for name in places:
        found |= load_others(plans[name], models[name], given=found)
    own = [models[name] for name in places]
    with ExitStack() as stack:
        denoisers = {
            name: Denoiser(models[name], stack.enter_context(skip(models[name], each.own_part)), each, found)
            for name, each in plans.items()
        }
        follower = Follower(pipeline, denoisers, places)
        _check_callback(pipeline, follower)
        stack.callback(_put_back, pipeline, models)
        for module in {id(module): module for module in (*own, *found.values())}.values():
            find_contract(module)  # traced now, so that the call it takes is not counted
            # no bound method: pricing copies modules with their hooks, and would copy the pipeline along
            hook = module.register_forward_pre_hook(lambda *call: follower.note(*call), with_kwargs=True)
            stack.callback(hook.remove)
        follower.at(0.0)
        if not follower.timeless:
            stack.enter_context(_told_of_starts(pipeline, follower))
        yield follower
        if follower.calls and not follower.told and not follower.timeless:
            raise UserError(
                f"The plan changes along the trajectory, but {type(pipeline).__name__} never called its follower; "
                f"call the pipeline with {CALLBACK}=follower."
            )


@contextmanager
def _told_of_starts(pipeline: Any, follower: Follower) -> Iterator[None]:
    """A run of the pipeline begins where its scheduler is given its timesteps, also after a run that was broken off."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "set_timesteps"):
        yield
        return
    begin = scheduler.set_timesteps

    @wraps(begin)  # pipelines ask for its arguments
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        follower.at(0.0)
        return begin(*args, **kwargs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def _plans(pipeline: Any, models: Mapping[str, nn.Module], plan: Plan | Mapping[str, Plan]) -> dict[str, Plan]:
    """A plan for every transformer. Raises UserError for one that is not for it."""
    if isinstance(plan, Plan):
        plans = dict.fromkeys(models, plan)
        if len(models) > 1 and (plan.stand_ins or plan.adapter):
            raise UserError(
                f"{type(pipeline).__name__} denoises with {' and '.join(models)}, but stand-ins and adapters are "
                f"fitted to the weights of one; give each its own plan: {_example(models)}."
            )
    else:
        for name in plan:
            if name not in models:
                raise unknown(f"transformer of {type(pipeline).__name__}", name, models)
        plans = {name: plan.get(name, Plan(model=find_contract(model).shape)) for name, model in models.items()}
    for name, model in models.items():
        try:
            plans[name].check_model(find_contract(model).shape)
        except UserError as error:
            if len(models) == 1:
                raise
            raise UserError(f"{name}: {error} Or give each its own plan: {_example(models)}.") from error
    return plans


def _example(models: Mapping[str, nn.Module]) -> str:
    return f"follow(pipeline, {{{', '.join(f'{name!r}: plan' for name in models)}}})"


def _check_callback(pipeline: Any, follower: Follower) -> None:
    """Raise UserError for a plan that changes along the trajectory of a pipeline that does not say where it is."""
    kind = type(pipeline)
    says = CALLBACK in inspect.signature(kind.__call__).parameters and hasattr(kind, "num_timesteps")
    if not says and not follower.timeless:
        raise UserError(
            f"{kind.__name__} does not tell a callback how far it is ({CALLBACK}, num_timesteps), so that a plan with "
            "phases cannot be followed; a plan that skips the same blocks at every step can."
        )


def _put_back(pipeline: Any, models: Mapping[str, nn.Module]) -> None:
    for name, model in models.items():
        setattr(pipeline, name, model)
