"""What a fine-tuning is to be like: everything that decides how much memory it takes."""

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

from skipwise.errors import UserError, unknown
from skipwise.finetuning.hollow import LateMode
from skipwise.finetuning.lora import PROJECTIONS
from skipwise.loading import DTYPES

Precision = Literal["mixed", "autocast", "pure"]
Optimiser = Literal["adamw", "adamw8bit"]
_NAMES = {"late": LateMode, "precision": Precision, "optimiser": Optimiser}


def check_number(name: str, value: object, least: float, whole: bool = True) -> None:
    """Raise UserError unless a setting's value is a finite number of at least `least`, and a whole one if asked."""
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not right or not least <= value < math.inf:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise UserError(f"A fine-tuning's {name} is {value!r}; give {kind} of {least:g} or more.")


def check_switch(name: str, value: object) -> None:
    """Raise UserError unless a setting's value is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"A fine-tuning's {name} is {value!r}; give true or false.")


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a fine-tuning by LoRA that decide its memory. Frozen; `replace` makes another.

    resolution: side, in pixels, that pictures are resized to; patch: side of the crops that the model sees, None for
    whole pictures; batch: samples a step.
    late: what becomes of skipped blocks behind the first trained one, as in `hollow`. The default is exact, and costs
    nothing where the last blocks are trained; "residual" is the paper's (docs/results/p3.md has why it is not chosen).
    checkpointing: activations inside of a block are computed again in the backward pass.
    rank, targets: of LoRA; targets are ends of names of linear layers in trained blocks.
    dtype: of the base weights. precision: "mixed" keeps LoRA in float32 and computes products in `dtype`, norms in the
    dtype of what comes in; "autocast" is torch's own, which on CUDA computes norms in float32 and saves their copies;
    "pure" holds LoRA in `dtype` too.
    optimiser: "adamw", or "adamw8bit" of bitsandbytes. text_tokens: length of the prompt, None for the model's own.
    """

    resolution: int = 512
    patch: int | None = None
    batch: int = 1
    late: LateMode = "streamed"
    checkpointing: bool = False
    rank: int = 16
    targets: tuple[str, ...] = PROJECTIONS
    dtype: str = "bfloat16"
    precision: Precision = "mixed"
    optimiser: Optimiser = "adamw"
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, literal in _NAMES.items():
            if getattr(self, name) not in get_args(literal):
                raise unknown(f"{name} of a fine-tuning", getattr(self, name), get_args(literal))
        if self.dtype not in list(DTYPES):
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("resolution", "batch", "rank"):
            check_number(name, getattr(self, name), 1)
        for name in ("patch", "text_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1)
        check_switch("checkpointing", self.checkpointing)
        if self.patch is not None and self.patch > self.resolution:
            raise UserError(
                f"Patches of {self.patch} px do not fit into pictures of {self.resolution} px; "
                "choose a patch of at most the resolution."
            )
        if isinstance(self.targets, list):  # as JSON writes it
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not isinstance(self.targets, tuple) or not all(isinstance(t, str) for t in self.targets):
            raise UserError(
                f"LoRA has no targets, which are {self.targets!r}; list ends of linear layers' names, such as "
                '["to_q", "to_v"].'
            )

    @property
    def pixels(self) -> int:
        """Side of what the model sees."""
        return self.patch or self.resolution

    @property
    def rule(self) -> Literal["last", "middle"]:
        """Which blocks to train where nothing is said: the last; under the paper's late mode those in the middle."""
        return "middle" if self.late == "residual" else "last"

    def but(self, **changes: Any) -> Self:
        """These settings with some changed. Raises UserError for an unknown name."""
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise unknown("setting of a fine-tuning", name, names)
        return replace(self, **changes)
