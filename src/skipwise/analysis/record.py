"""Analysis: what was measured of a model's hidden states, as JSON for the facts and safetensors for the numbers."""

import json
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

    tensors, all float64, under "STACK/NAME":
      similarity (n+1, n+1)        mean cosine of every pair of boundary states, over tokens
      update_norm (n,)             mean of |output - input| / |input| of every block
      step_similarity (steps, n)   cosine of a block's input and output at each denoising step of own trajectories
      step_update_norm (steps, n)
      noise_similarity (levels, n), noise_update_norm (levels, n)   the same on noised data, by noise level
    The last four exist for diffusion models only; `progress` (steps,) and `noise_levels` (levels,) are their axes.
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
        """(n,): mean cosine between the input and the output of every block; high means redundant."""
        return torch.diagonal(self.tensors[f"{stack}/similarity"], offset=1)

    def save(self, folder: str | Path) -> Path:
        """Write analysis.json and analysis.safetensors into `folder` and return it."""
        folder = Path(folder)
        facts = {
            "format": FORMAT,
            "name": self.name,
            "model": self.model.model_dump(),
            "kind": self.kind,
            "calibration": self.calibration,
            "settings": self.settings,
            "versions": self.versions,
        }
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        write_bytes_atomically(folder / "analysis.safetensors", save(tensors))
        write_atomically(folder / "analysis.json", json.dumps(facts, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Analysis":
        """Read what `save` wrote. Raises UserError for a folder that holds no analysis."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "analysis.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no readable analysis: {error}. Make one with `skipwise analyze`."
            ) from error
        if facts.pop("format", None) != FORMAT:
            raise UserError(f"{folder} is not a {FORMAT} folder. Make one with `skipwise analyze`.")
        return cls(model=ModelShape(**facts.pop("model")), tensors=tensors, **facts)
