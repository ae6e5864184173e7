"""Analysis: what was measured of a model's hidden states, as JSON for the facts and safetensors for the numbers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from skipwise.companions import Beside, find_companion, write_together
from skipwise.errors import UserError
from skipwise.files import parse_model, reason_of
from skipwise.finite import is_finite
from skipwise.plan import ModelShape


@dataclass(frozen=True)
class Analysis:
    """Statistics of one model's streams, stack by stack. With n blocks in a stack, boundary state 0 is the input of
    block 0 and boundary state i + 1 the output of block i (read at the blocks, so before the final norm).

    tensors, float64 unless said otherwise, under "STACK/NAME", where the part was measured:

    layers
      similarity (n+1, n+1)        mean cosine of every pair of boundary states, over tokens (and steps)
      similarity_without_outliers (n+1, n+1)   the same with the outlier channels set to zero
      outlier_channels (c,) int64  the channels with the largest share of the mean square, the largest first
      outlier_share (n+1, c)       mean share of a token's squared norm that each of them holds
      cka (n+1, n+1)               linear CKA of every pair of boundary states (unbiased minibatch form)
      update_norm (n,)             mean of |output - input| / |input| of every block
    tokens (texts of 10 tokens or more)
      token_similarity (n+1, d)    mean cosine of the states of two tokens of a text at distances 1 to d (at most 64)
      token_similarity_far (n+1,)  the same at distances of half the text or more
      recency (n+1,)               (near - far) / (1 - far), near = distances 1 to 4: 0 no preference, 1 all near
    lens
      lens_agreement (n+1,)        share of positions whose prediction from boundary state i is the final one (for a
                                   diffusion model of the masked positions); absent where the model gives no logits
    attention (absent where the model shows no weights)
      attention_mass (n, 2b+1)     mean attention of a query by offset of the key; rows sum to 1
      attention_offsets (2b+1, 2)  nearest and farthest key - query of each column: negative past, zero, positive future
      attention_sink (n,)          mean attention on a text's first token
      attention_recency (n,)       (near - far) / (near + far) of the weight a key of the past gets, the sink left out:
                                   0 no preference, 1 all on distances 1 to 4; texts of 10 tokens or more
    always
      block_flops (n,)             FLOPs of each block at the longest text

    Diffusion models have some of these along an axis too, NaN where a bin holds nothing:
      progress (steps,)            of own trajectories, and by it step_similarity (steps, n), the cosine of a block's
                                   input and output, step_similarity_without_outliers (steps, n), step_update_norm
                                   (steps, n), step_recency (steps, n+1), step_lens_agreement (steps, n+1)
      noise_levels (levels,)       of masked texts, and by them noise_similarity (levels, n),
                                   noise_similarity_without_outliers (levels, n), noise_update_norm (levels, n)
    """

    name: str
    model: ModelShape
    kind: str  # "masked diffusion" | "autoregressive" | "encoder"
    tensors: dict[str, Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def get(self, stack: str, name: str) -> Tensor | None:
        """A statistic of a stack, or None where it was not measured."""
        return self.tensors.get(f"{stack}/{name}")

    @property
    def stacks(self) -> list[str]:
        """The analysed stacks, sorted by name."""
        return sorted({key.rpartition("/")[0] for key in self.tensors})

    @property
    def main_stack(self) -> str:
        """The analysed stack with the most blocks."""
        return max(self.stacks, key=lambda name: self.model.stacks[name])

    def successive_similarity(self, stack: str) -> Tensor:
        """(n,): mean cosine between the input and the output of every block; high means redundant.

        Raises UserError when the layers were not measured.
        """
        similarity = self.get(stack, "similarity")
        if similarity is None:
            raise UserError(f"{self.name} has no similarity of {stack}; analyze with `layers` among the parts.")
        return torch.diagonal(similarity, offset=1)

    def save(self, folder: str | Path) -> Path:
        """Write analysis.json and analysis.safetensors into `folder`, both or neither, and return it."""
        facts = Facts(
            name=self.name,
            model=self.model,
            kind=self.kind,
            calibration=self.calibration,
            settings=self.settings,
            versions=self.versions,
        )
        return write_record(folder, "analysis", facts, self.tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "Analysis":
        """Read what `save` wrote. Raises UserError for a folder that holds none, and for numbers that are none."""
        facts, tensors = read_record(folder, "analysis", Facts, "skipwise analyze")
        _check_stacks(folder, facts.model, tensors)
        return cls(**facts.own(), tensors=tensors)


class Record(BaseModel):
    """What the JSON file of a record says, whatever it is of. sum: of the tensors beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    sum: str = ""

    def own(self) -> dict[str, Any]:
        """What it says of its matter, by name."""
        return {name: value for name, value in self.__dict__.items() if name not in ("format", "sum")}


ALWAYS_FINITE = ("similarity", "similarity_without_outliers", "cka", "update_norm", "outlier_share", "block_flops")
_BY_BLOCK = ("block_flops", "similarity", "similarity_without_outliers", "cka")  # what planners and figures count on
Kind = TypeVar("Kind", bound=Record)


class Facts(Record):
    """What analysis.json says."""

    format: Literal["skipwise-analysis/1"] = "skipwise-analysis/1"
    name: str
    model: ModelShape
    kind: str
    calibration: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def write_record(folder: str | Path, what: str, facts: Record, tensors: Mapping[str, Tensor]) -> Path:
    """Write WHAT.json and WHAT.safetensors into `folder`, both or neither, and return it."""
    folder, name = Path(folder), f"{what}.safetensors"
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    total = hashlib.sha256(save(whole)).hexdigest()
    beside = Beside(name, total, lambda new: new.write_bytes(save(whole, {"sum": total})), _sum_of)
    content = json.dumps(facts.model_copy(update={"sum": total}).model_dump(mode="json"), indent=2) + "\n"
    write_together(folder / f"{what}.json", content, [beside], [name])
    return folder


def read_record(folder: str | Path, what: str, kind: type[Kind], maker: str) -> tuple[Kind, dict[str, Tensor]]:
    """What `write_record` wrote. Raises UserError for a folder that holds none, and for a number that is not finite."""
    folder = Path(folder)
    path = folder / f"{what}.safetensors"
    try:
        facts = parse_model(kind, folder / f"{what}.json")
        tensors, total = _read(path) if path.exists() else ({}, None)
        if total != facts.sum:  # its writer was stopped, and the one that belongs to the facts has another name
            tensors, total = _read(find_companion(folder, path.name, facts.sum, _sum_of))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no readable {what}: {reason_of(error)}. Make one with `{maker}`.") from error
    if facts.sum and total != facts.sum:
        raise UserError(f"{path} is not what {what}.json was written with. Make both anew with `{maker}`.")
    wrong = not_measured(tensors)
    if wrong:
        raise UserError(f"{path} holds numbers that are not finite, in {wrong[0]}. Make it anew with `{maker}`.")
    return facts, tensors


def not_measured(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of statistics that hold what no measurement gives. NaN, where a bin holds nothing, is no number but fine in
    statistics by step, by noise level and by distance.
    """
    numbers = [tensor.reshape(-1) for tensor in tensors.values() if tensor.is_floating_point()]
    if not numbers or bool(torch.cat(numbers).sum().isfinite()):  # the quick way, which is nearly always enough
        return []
    always = {name for name in tensors if name.rpartition("/")[2] in ALWAYS_FINITE}
    return [
        name for name, tensor in tensors.items() if tensor.isinf().any() or (name in always and not is_finite(tensor))
    ]


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, and the sum that it was written with."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, (file.metadata() or {}).get("sum", "")


def _sum_of(path: Path) -> str | None:
    """The sum that a file of tensors was written with, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("sum")
    except (OSError, SafetensorError):
        return None


def _check_stacks(folder: str | Path, model: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for statistics of other stacks, or of stacks of another length, than the model's."""
    for key, tensor in tensors.items():
        stack, _, name = key.rpartition("/")
        length = model.stacks.get(stack, -1)
        shape = (length,) if name == "block_flops" else (length + 1, length + 1)
        if length < 0 or (name in _BY_BLOCK and tuple(tensor.shape) != shape):
            raise UserError(
                f"{folder} has {name} {tuple(tensor.shape)} of {stack!r}, and {model.architecture} has {model.stacks}; "
                "make it anew with `skipwise analyze`."
            )
