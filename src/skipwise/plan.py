"""A plan: which blocks run, are skipped, or are trained, at which part of the denoising trajectory.

A plan is data. It is frozen, prints as JSON, and reading one never executes anything. It names the model it was made
for by architecture, stack lengths and width, so that it can be checked before it is applied.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from skipwise.errors import UserError, unknown
from skipwise.files import write_atomically

FORMAT = "skipwise-plan/1"

# stack name -> block numbers in ascending order
Blocks = dict[str, tuple[int, ...]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelShape(_Frozen):
    """What identifies a model to a plan: class name, number of blocks in every stack, width of the stream."""

    architecture: str
    stacks: dict[str, int]
    hidden_size: int


class Phase(_Frozen):
    """A part of the trajectory that ends at progress `until` (0 = all noise, 1 = done), and what is left out in it.

    `model` names a lighter model that runs instead; None is the model itself.
    """

    until: float = Field(default=1.0, gt=0.0, le=1.0)
    skip: Blocks = {}
    model: str | None = None


class Provenance(_Frozen):
    """How a plan was made: method, settings, calibration data, the scores it was chosen by, versions."""

    method: str
    settings: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    versions: dict[str, str] = {}


class Plan(_Frozen):
    """A validated plan. A static plan has one phase; raises UserError for blocks, stacks or phases that cannot be."""

    format: Literal["skipwise-plan/1"] = "skipwise-plan/1"
    model: ModelShape
    phases: tuple[Phase, ...] = (Phase(),)
    train: Blocks = {}
    made_by: Provenance = Provenance(method="by hand")

    @model_validator(mode="after")
    def _check(self) -> Self:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1.0 or any(a >= b for a, b in pairwise(ends)):
            raise UserError(f"Plan phases end at {ends}; they must rise and the last must end at 1.0.")
        for blocks in (*(phase.skip for phase in self.phases), self.train):
            for stack, numbers in blocks.items():
                self._check_blocks(stack, numbers)
        return self

    def _check_blocks(self, stack: str, numbers: Sequence[int]) -> None:
        if stack not in self.model.stacks:
            raise unknown("stack", stack, self.model.stacks)
        length = self.model.stacks[stack]
        outside = [number for number in numbers if not 0 <= number < length]
        if outside:
            raise UserError(f"Block {outside[0]} is not in {stack}, which has blocks 0 to {length - 1}.")
        if list(numbers) != sorted(set(numbers)):
            raise UserError(f"Blocks {list(numbers)} of {stack} must be listed once each, in ascending order.")

    @classmethod
    def static(cls, model: ModelShape, skip: Mapping[str, Sequence[int]], made_by: Provenance | None = None) -> "Plan":
        """A plan that skips the same blocks at every step."""
        blocks = {stack: tuple(sorted(numbers)) for stack, numbers in skip.items() if len(numbers)}
        made_by = made_by or Provenance(method="by hand")
        return cls(model=model, phases=(Phase(skip=blocks),), made_by=made_by)

    @cached_property
    def is_static(self) -> bool:
        """Whether the same blocks of the same model run at every step."""
        return len({(phase.model, tuple(sorted(phase.skip.items()))) for phase in self.phases}) == 1

    def phase_at(self, progress: float) -> Phase:
        """The phase that the step starting at `progress` in [0, 1) belongs to."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    def check_model(self, shape: ModelShape) -> None:
        """Raise UserError, naming the difference, when this plan was made for another model."""
        for what in ("architecture", "hidden_size", "stacks"):
            mine, theirs = getattr(self.model, what), getattr(shape, what)
            if mine != theirs:
                raise UserError(
                    f"This plan was made for a model with {what} {mine!r}, but the model has {theirs!r}. "
                    "Make a new one with `skipwise plan`."
                )

    def describe(self) -> str:
        """One line for tables and logs, such as `skip model.layers: 3, 4`."""
        parts = []
        for phase in self.phases:
            skipped = "; ".join(f"{stack}: {', '.join(map(str, n))}" for stack, n in phase.skip.items() if n)
            what = f"run {phase.model}" if phase.model else f"skip {skipped}" if skipped else "run all blocks"
            parts.append(what if self.is_static else f"until {phase.until:g} {what}")
            if self.is_static:
                break
        return " | ".join(parts)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all, and return the path."""
        return write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan. Raises UserError, in one line, for a file that is missing, unreadable or not a plan."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"There is no plan at {path}. Make one with `skipwise plan`.") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read as a plan: {error}. Make one with `skipwise plan`.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path} is not a {FORMAT} file (its format is {found!r}). Make one with `skipwise plan`.")
        return cls.parse(content, source=str(path))

    @classmethod
    def parse(cls, content: dict[str, Any], source: str = "plan") -> "Plan":
        """Validate a plan from a dictionary; every problem is one line that begins with `source`."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{source}: {_first_problem(error, cls)}") from error


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one line with the offending value and the legal keys."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        # loc ends in the key that nobody knows; the legal ones are the fields of the model it sits in
        parts: dict[str, type[BaseModel]] = {"phases": Phase, "model": ModelShape, "made_by": Provenance}
        owner = model if len(problem["loc"]) == 1 else parts.get(str(problem["loc"][0]), model)
        return str(unknown("key", where, owner.model_fields))
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{where}: {problem['msg']} (got {problem['input']!r})"
