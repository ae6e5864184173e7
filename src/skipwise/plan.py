"""A plan: which blocks run, are skipped, or are trained, at which part of the denoising trajectory.

A plan is data. It is frozen, prints as JSON, and reading one never executes anything. It names the model it was made
for by architecture, stack lengths and width, so that it can be checked before it is applied.
"""

import hashlib
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from skipwise.companions import Beside, find_companion, write_together
from skipwise.errors import UserError, unknown
from skipwise.files import output_file, read_json

FORMAT = "skipwise-plan/1"
STAND_INS, ADAPTER = ".stand-ins.safetensors", ".adapter"  # behind the name of the plan's file

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

    `stand_in` says what skipped blocks leave behind: their mean residual ("constant"), a map of their normed input
    ("linear"), or None, the identity. `model` names a lighter model that runs instead, as `skipwise.load` takes it;
    None is the model itself.
    """

    until: float = Field(default=1.0, gt=0.0, le=1.0)
    skip: Blocks = {}
    stand_in: Literal["constant", "linear"] | None = None
    model: str | None = None


class Companion(_Frozen):
    """A file or folder beside the plan, by name, and the checksum of its tensors."""

    name: str
    sha256: str


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
    stand_ins: Companion | None = None
    adapter: Companion | None = None
    made_by: Provenance = Provenance(method="by hand")

    _folder: Path | None = PrivateAttr(default=None)  # where the companions are
    _bytes: bytes | None = PrivateAttr(default=None)  # the stand-ins, before they are saved

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    @model_validator(mode="after")
    def _check(self) -> Self:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1.0 or any(a >= b for a, b in pairwise(ends)):
            raise UserError(f"Plan phases end at {ends}; they must rise and the last must end at 1.0.")
        both = next((phase for phase in self.phases if phase.model and any(phase.skip.values())), None)
        if both:
            raise UserError(f"A phase runs {both.model} and skips blocks too; a phase hands its steps over or skips.")
        for blocks in (*(phase.skip for phase in self.phases), self.train):
            for stack, numbers in blocks.items():
                self._check_blocks(stack, numbers)
        if any(phase.stand_in for phase in self.phases) != (self.stand_ins is not None):
            raise UserError("A plan names a file of stand-ins exactly when skipped blocks leave some behind.")
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
        """A plan that skips the same blocks at every step. Raises UserError for blocks that the model has not."""
        blocks = {stack: tuple(sorted(set(numbers))) for stack, numbers in skip.items() if len(numbers)}
        made_by = made_by or Provenance(method="by hand")
        return cls.parse({"model": model, "phases": (Phase(skip=blocks),), "made_by": made_by}, source="")

    @classmethod
    def of(cls, model: ModelShape, what: "Plan | Sequence[int] | Mapping[str, Sequence[int]]") -> "Plan":
        """A plan as it is, or a static one from block numbers: [3, 4] of a model's only stack, or {"stack": [3, 4]}.

        Raises UserError for anything else, and for bare numbers where the model has several stacks.
        """
        if isinstance(what, Plan):
            return what
        if not isinstance(what, Mapping):
            what = {_only_stack(model, what): what}
        return cls.static(model, {stack: _numbers(stack, numbers) for stack, numbers in what.items()})

    @cached_property
    def is_static(self) -> bool:
        """Whether the same blocks of the same model run at every step."""
        kinds = {(phase.model, phase.stand_in, tuple(sorted(phase.skip.items()))) for phase in self.phases}
        return len(kinds) == 1 and (len(self.phases) == 1 or self.stand_ins is None)

    @property
    def own_part(self) -> "Plan":
        """This plan with the phases of other models left to the plan's own model, whole: what `skip` can follow."""
        own = tuple(phase.model_copy(update={"model": None}) for phase in self.phases)
        return self.model_copy(update={"phases": own})

    def phase_at(self, progress: float) -> Phase:
        """The phase that the step starting at `progress` in [0, 1) belongs to."""
        return self.phases[self.phase_number(progress)]

    def phase_number(self, progress: float) -> int:
        """The number of `phase_at(progress)`, from 0."""
        return next((i for i, phase in enumerate(self.phases) if progress < phase.until), len(self.phases) - 1)

    def named(self, method: str) -> "Plan":
        """This plan under another name of how it was made; everything else stays, what lies beside it too."""
        return self.model_copy(update={"made_by": self.made_by.model_copy(update={"method": method})})

    def with_stand_ins(self, kind: Literal["constant", "linear"], tensors: Mapping[str, Tensor]) -> "Plan":
        """This plan, whose skipped blocks leave something behind; tensors by `skipwise.stand_ins.key`."""
        content = tensor_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
        phases = tuple(p.model_copy(update={"stand_in": kind if p.skip else None}) for p in self.phases)
        companion = Companion(name="stand-ins.safetensors", sha256=hashlib.sha256(content).hexdigest())
        plan = self._changed(phases=phases, stand_ins=companion)
        plan._folder, plan._bytes = self._folder, content
        return plan

    def with_adapter(self, folder: Path, settings: Mapping[str, Any] | None = None) -> "Plan":
        """This plan, with a LoRA adapter (a folder as peft writes it) that was trained to make good the loss.

        settings: added to those that the plan was made with.
        """
        companion = Companion(name=folder.name, sha256=_adapter_sum(folder))
        made_by = self.made_by.model_copy(update={"settings": self.made_by.settings | dict(settings or {})})
        plan = self._changed(adapter=companion, made_by=made_by)
        plan._bytes = self._stand_in_bytes() if self.stand_ins else None
        plan._folder = folder.parent
        return plan

    def _changed(self, **update: Any) -> "Plan":
        """Validated anew. `dict(self)` would hold cached properties too."""
        return Plan.model_validate({name: getattr(self, name) for name in Plan.model_fields} | update)

    def stand_in_tensors(self) -> dict[str, Tensor]:
        """The stand-ins' tensors. Raises UserError when their file is gone or is another one."""
        return read_tensors(self._stand_in_bytes()) if self.stand_ins else {}

    def _stand_in_bytes(self) -> bytes:
        assert self.stand_ins is not None
        if self._bytes is None:
            content = _read_companion(self._path(self.stand_ins, _file_sum))
            _check_sum(self.stand_ins, hashlib.sha256(content).hexdigest())
            self._bytes = content
        return self._bytes

    def adapter_folder(self) -> Path | None:
        """The folder of the adapter, checked. Raises UserError when it is gone or holds other weights."""
        if self.adapter is None:
            return None
        folder = self._path(self.adapter, _folder_sum)
        _check_sum(self.adapter, _adapter_sum(folder))
        return folder

    def _path(self, companion: Companion, sum_of: Callable[[Path], str | None]) -> Path:
        if Path(companion.name).name != companion.name:
            raise UserError(f"The plan names {companion.name!r} beside it; a bare name is legal, a path is not.")
        return find_companion(self._folder or Path(), companion.name, companion.sha256, sum_of)

    def check_model(self, shape: ModelShape) -> None:
        """Raise UserError, naming the difference, when this plan was made for another model."""
        for what in ("architecture", "hidden_size", "stacks"):
            mine, theirs = getattr(self.model, what), getattr(shape, what)
            if mine != theirs:
                raise UserError(
                    f"This plan was made for a model with {what} {mine!r}, but the model has {theirs!r}. "
                    "Make a new one with `skipwise plan`."
                )

    @property
    def method(self) -> str:
        """How it was made, for tables and figures: `greedy`, `greedy + linear stand-ins`, `greedy + healing`."""
        kinds = dict.fromkeys(phase.stand_in for phase in self.phases if phase.stand_in)
        parts = [self.made_by.method, *(f"{kind} stand-ins" for kind in kinds), *(["healing"] if self.adapter else [])]
        return " + ".join(parts)

    def describe(self) -> str:
        """One line for tables and logs, such as `skip model.layers: 3, 4`."""
        parts = []
        for phase in self.phases:
            skipped = "; ".join(f"{stack}: {', '.join(map(str, n))}" for stack, n in phase.skip.items() if n)
            left = f" (a {phase.stand_in} stand-in each)" if phase.stand_in else ""
            what = f"run {phase.model}" if phase.model else f"skip {skipped}{left}" if skipped else "run all blocks"
            parts.append(what if self.is_static else f"until {phase.until:g} {what}")
            if self.is_static:
                break
        return " | ".join(parts) + (", healed by an adapter" if self.adapter else "")

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, with its stand-ins and its adapter beside it under its name, and return the path.

        What was there is replaced whole: a crash leaves the older plan or the newer one, each with what is its own.
        """
        path, beside, update = output_file(path), [], {}
        stem = path.name.removesuffix(".json")
        if self.stand_ins is not None:
            content, name = self._stand_in_bytes(), f"{stem}{STAND_INS}"
            update["stand_ins"] = self.stand_ins.model_copy(update={"name": name})
            beside.append(Beside(name, self.stand_ins.sha256, lambda new: new.write_bytes(content), _file_sum))
        if self.adapter is not None and (source := self.adapter_folder()) is not None:
            name = f"{stem}{ADAPTER}"
            update["adapter"] = self.adapter.model_copy(update={"name": name})
            beside.append(Beside(name, self.adapter.sha256, lambda new: shutil.copytree(source, new), _folder_sum))
        content_of = self.model_copy(update=update).model_dump_json(indent=2, exclude_none=True) + "\n"
        return write_together(path, content_of, beside, [f"{stem}{suffix}" for suffix in (STAND_INS, ADAPTER)])

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan. Raises UserError, in one line, for a file that is missing, unreadable or not a plan."""
        try:
            content = read_json(path)
        except FileNotFoundError as error:
            raise UserError(f"There is no plan at {path}. Make one with `skipwise plan`.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a plan: {error}. Make one with `skipwise plan`.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path} is not a {FORMAT} file (its format is {found!r}). Make one with `skipwise plan`.")
        plan = cls.parse(content, source=str(path))
        plan._folder = output_file(path).parent  # companions lie beside the file itself, not beside a link to it
        return plan

    @classmethod
    def parse(cls, content: dict[str, Any], source: str = "plan") -> "Plan":
        """Validate a plan from a dictionary; every problem is one line that begins with `source`, if there is one."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = _first_problem(error, cls)
            raise UserError(f"{source}: {problem}" if source else problem) from error


def _only_stack(model: ModelShape, numbers: Any) -> str:
    if len(model.stacks) == 1:
        return next(iter(model.stacks))
    names = ", ".join(f'{{"{name}": {numbers}}}' for name in model.stacks)
    raise UserError(f"Blocks {numbers} of which stack of {model.architecture}? Give one of: {names}.")


def _numbers(stack: str, numbers: Any) -> list[int]:
    """Whole numbers of any kind (range, set, numpy, tensor). Raises UserError for anything else."""
    try:
        if isinstance(numbers, str | bytes):
            raise TypeError(f"{numbers!r} is text")
        numbers = list(numbers)
        found = [operator.index(number) for number in numbers]
    except TypeError as error:
        raise UserError(
            f"Blocks of {stack} are given as {numbers!r}: {error}; give whole numbers, such as [3, 4], or a Plan."
        ) from error
    if any(isinstance(number, bool) or "bool" in str(getattr(number, "dtype", "")) for number in numbers):
        raise UserError(
            f"Blocks of {stack} are given as {numbers!r}; give the numbers of those to skip, such as [3, 4]."
        )
    return found


def _read_companion(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The plan needs {path}, which cannot be read; copy it beside the plan.") from error


def _check_sum(companion: Companion, found: str) -> None:
    if found != companion.sha256:
        raise UserError(
            f"{companion.name} is not the file that the plan was made with: its sha256 is {found[:12]}..., "
            f"the plan says {companion.sha256[:12]}..."
        )


def _adapter_sum(folder: Path) -> str:
    names = ("adapter_config.json", "adapter_model.safetensors")
    if not (folder / names[0]).exists() and any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no adapter as peft writes it ({' and '.join(names)}); a LoRA in the layout of diffusers "
            "or kohya is loaded into the pipeline by its load_lora_weights."
        )
    return hashlib.sha256(b"".join(_read_companion(folder / name) for name in names)).hexdigest()


def _file_sum(path: Path) -> str | None:
    """The sum of a file of stand-ins, or None."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _folder_sum(path: Path) -> str | None:
    """The sum of an adapter's folder, or None."""
    try:
        return _adapter_sum(path)
    except UserError:
        return None


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
