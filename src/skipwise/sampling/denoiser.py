"""Running models for a sampler: the plan is followed, the callback told, and every forward entered in the accounts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipwise.cuts import Cut
from skipwise.errors import UserError
from skipwise.finite import Watch, not_finite
from skipwise.models import fact, head_of, mask_token
from skipwise.models.bidirectional import Where, kept
from skipwise.models.heads import prepared
from skipwise.models.hooks import watched
from skipwise.models.linear import linear
from skipwise.models.workspace import Workspace
from skipwise.plan import Plan
from skipwise.sampling.cache import Windows
from skipwise.sampling.compiling import Compiled
from skipwise.sampling.others import load_others
from skipwise.sampling.prediction import Prediction
from skipwise.skipping import Skipping, cut_now, skip


@dataclass(frozen=True)
class Step:
    """One denoising step, announced before its forward. `sequences` is (batch, length), shared, not a copy.

    index counts steps from 0, of `total` at most; progress is how far through the trajectory the step starts, 0 = all
    noise, 1 = done.
    """

    index: int
    total: int
    sequences: Tensor
    progress: float


@dataclass(frozen=True)
class Running:
    """What runs at a moment: a model by the name that the plan gives it, None its own; and what is cut out of that."""

    model: str | None = None
    cut: Cut = field(default_factory=Cut)


@dataclass(frozen=True)
class Forward:
    """One call of a model as it happened: what ran, how many sequences it saw, and of how many tokens each.

    predicted: positions, of all rows together, that logits were made for; None is every one. length: of the sequences,
    whose other positions were stored, if that is more than the tokens that ran (`skipwise.sampling.cache`). narrowed:
    whether the last block, too, ran for the predicted positions alone (`skipwise.models.lean`); known_flops: of what
    an earlier forward had made already.
    """

    running: Running
    rows: int
    tokens: int
    predicted: int | None = None
    length: int | None = None
    narrowed: bool = False
    known_flops: int = 0

    @property
    def keys(self) -> int:
        """How many positions each of the tokens attended to."""
        return self.length or self.tokens


@dataclass
class Denoiser:
    """Masked diffusion models as samplers see them: one after the other, as the plan says.

    model: the plan's own; plan: with the phases that name models, `skipping` what of it is in force in the plan's own
    model; others: the models that phases name; on_step: a user's callback; compiled: runs models compiled.
    """

    model: nn.Module
    skipping: Skipping | None = None
    plan: Plan | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    on_step: Callable[[Step], None] | None = None
    forwards: list[Forward] = field(default_factory=list)
    compiled: Compiled | None = None
    _space: tuple[Running, Workspace] | None = None
    watch: Watch = field(default_factory=Watch)  # of what the models give
    _last: Any = None  # the model that ran last, and what calls it again

    def __post_init__(self) -> None:
        if self.plan is None and self.skipping is not None:
            self.plan = self.skipping.plan

    @property
    def mask_token(self) -> int:
        """Id of the model's mask token. Raises UserError when its config has none."""
        return mask_token(self.model)

    def at(self, progress: float) -> Running:
        """Move to the plan's phase at `progress`; returns what runs there: what was cached of another is stale."""
        name = self.plan.phase_at(progress).model if self.plan else None
        if name is not None:
            return Running(name)
        if self.skipping is not None:
            self.skipping.at(progress)
        return Running(None, cut_now(self.model))

    @property
    def timeless(self) -> bool:
        """Whether the same runs at every step."""
        return self.plan is None or self.plan.is_static

    @property
    def fixed_rows(self) -> bool:
        """Whether every forward must be of all rows."""
        return self.compiled is not None

    def named(self, name: str | None) -> nn.Module:
        """The model that the plan calls so; None is its own."""
        return self.model if name is None else self.others[name]

    def __call__(
        self,
        step: Step,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        where: Where | None = None,
        **others: Any,
    ) -> Tensor:
        """Logits of `inputs` (rows, length) at this step; `others` go to the model.

        where: bool (rows, length), or the rows and positions (n,) that its `nonzero(as_tuple=True)` gives, for which no
        device has to wait -> (n, vocabulary), row by row; None -> (rows, length, vocabulary).
        """
        return self.predict(step, inputs, attention_mask, where, **others).logits()

    def predict(
        self,
        step: Step,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        where: Where | None = None,
        *,
        windows: Windows | None = None,
        **others: Any,
    ) -> Prediction:
        """As a call, but the logits are still to be made: what reads them may do so a chunk at a time.

        A model that does not give its states is run whole. windows: of a cache; what they leave out is not run.
        """
        running = self.at(step.progress)
        if self.on_step is not None:
            self.on_step(step)
        model, length = self.named(running.model), inputs.shape[1]
        again = partial(model, input_ids=inputs, attention_mask=attention_mask, **others)
        if windows is not None:
            before = fact(model, "shift")
            stored = windows.next(inputs.shape, running, before)
            inputs, where = stored.part(inputs), stored.local(where, before)
            others = {**others, "past_key_values": stored, "position_ids": stored.position_ids}
        head = head_of(model)
        space = self._workspace(running, model)
        if self.compiled:
            states = kept(self.compiled.states(model, running.cut, inputs, attention_mask, others), where)
        elif head is not None:
            # called as a module, so that hooks on it run
            asked = {"logits_to_keep": where, "states": True, "space": space}
            states = model(input_ids=inputs, attention_mask=attention_mask, **asked, **others)
        else:
            states = kept(model(input_ids=inputs, attention_mask=attention_mask, **others).logits, where)
        self._last = model, again
        self.watch.add(states)
        words = states.shape[-1] if head is None else cast(Any, model.config).vocab_size
        prediction = Prediction(states, self._head(head, model, space) if head else _as_it_is, words)
        predicted = None if head is None else prediction.states.shape[:-1].numel()
        ran = space.narrowed, space.known_flops
        self.forwards.append(Forward(running, inputs.shape[0], inputs.shape[1], predicted, length, *ran))
        return prediction

    def fault(self) -> UserError:
        """What to raise when something that was watched is not finite; it names the block."""
        model, call = self._last
        return not_finite(model, call)

    def _head(self, head: nn.Module, model: nn.Module, space: Workspace) -> Callable[[Tensor], Tensor]:
        if self._is_overheard(model):
            return partial(linear, head)
        return space.keep("head", lambda: prepared(head, model))

    def _is_overheard(self, model: nn.Module) -> bool:
        """Whether someone is called meanwhile who might change the model."""
        return self.on_step is not None or watched(model)

    def _workspace(self, running: Running, model: nn.Module) -> Workspace:
        """The last forward's, as long as the same model and cut run and nobody might change them."""
        if self._space is None or self._space[0] != running or self._is_overheard(model):
            self._space = running, Workspace()
        space = self._space[1]
        space.narrowed, space.known_flops = False, 0
        return space

    def border(self, progress: float) -> float:
        """Where the phase ends that `progress` belongs to; 1 for the last one."""
        return self.plan.phase_at(progress).until if self.plan else 1.0


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def denoising(
    model: nn.Module,
    plan: Plan | None = None,
    others: Mapping[str, nn.Module] | None = None,
    on_step: Callable[[Step], None] | None = None,
    tokenizer: Any = None,
    compile: bool = False,
) -> Iterator[Denoiser]:
    """A denoiser that follows the plan for as long as the `with` lasts.

    others: models by the names that the plan's phases give them; those not here are loaded by that name. tokenizer: the
    model's, to be compared with theirs. compile: run the models compiled. Raises UserError as `skip` does, and for
    models that do not share their tokens; on leaving, for a model whose numbers were not finite.
    """
    found = load_others(plan, model, tokenizer, others)
    with skip(model, plan.own_part) if plan else nullcontext() as skipping:
        denoiser = Denoiser(model, skipping, plan, found, on_step, compiled=Compiled() if compile else None)
        yield denoiser
        if not denoiser.watch.fine(torch.device("cpu")):
            raise denoiser.fault()
