"""The state of a training run on disk, so that a run that was killed goes on as if it had not been."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipwise.files import write_state
from skipwise.identity import check_same


@dataclass(frozen=True)
class Checkpoint:
    """The file at `path`. of: what the run is of, in plain values; a checkpoint of anything else is refused."""

    path: Path
    of: Mapping[str, Any]

    def save(self, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps, whole or not at all."""
        state = {
            "step": step,
            "of": dict(self.of),
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
        }
        write_state(self.path, state)

    def resume(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Put the saved state back and return how many steps are done, 0 without a file.

        Raises UserError, naming what differs, for the checkpoint of another run.
        """
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        check_same(
            state["of"],
            self.of,
            f"{self.path} is of a run that",
            "delete it to begin anew, or go on as that run was begun",
        )
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def remove(self) -> None:
        """Forget it, once the run is done."""
        self.path.unlink(missing_ok=True)
