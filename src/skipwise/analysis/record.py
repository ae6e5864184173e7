"""Analysis: what was measured of a model's hidden states, as JSON for the facts and safetensors for the numbers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from skipwise.errors import UserError
from skipwise.files import write_atomically, write_bytes_atomically
from skipwise.plan import ModelShape

FORMAT = "skipwise-analysis/1"


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
        """Write analysis.json and analysis.safetensors into `folder` and return it."""
        facts = {
            "format": FORMAT,
            "name": self.name,
            "model": self.model.model_dump(),
            "kind": self.kind,
            "calibration": self.calibration,
            "settings": self.settings,
            "versions": self.versions,
        }
        return write_record(folder, "analysis", facts, self.tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "Analysis":
        """Read what `save` wrote. Raises UserError for a folder that holds no analysis."""
        facts, tensors = read_record(folder, "analysis", FORMAT, "`skipwise analyze`")
        return cls(model=ModelShape(**facts.pop("model")), tensors=tensors, **facts)


def write_record(folder: str | Path, what: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write WHAT.json and WHAT.safetensors into `folder` and return it."""
    folder = Path(folder)
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_bytes_atomically(folder / f"{what}.safetensors", save(whole))
    write_atomically(folder / f"{what}.json", json.dumps(facts, indent=2) + "\n")
    return folder


def read_record(folder: str | Path, what: str, form: str, maker: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_record` wrote, facts without their format. Raises UserError for a folder that holds none."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / f"{what}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{what}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no readable {what}: {error}. Make one with {maker}.") from error
    if facts.pop("format", None) != form:
        raise UserError(f"{folder} is not a {form} folder. Make one with {maker}.")
    return facts, tensors
