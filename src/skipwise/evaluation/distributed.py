"""An lm-eval model's part in an evaluation by several processes, one device each: every process has its requests."""

import os
from datetime import timedelta
from typing import Any

import torch
from lm_eval.api.model import LM
from torch import Tensor

from skipwise.errors import require


class Distributed(LM):
    """Mix in and call `join_processes`. On one process nothing is set up and `accelerator` is None."""

    accelerator: Any = None

    def join_processes(self) -> None:
        """Take this process's place where a launcher (`accelerate launch`, `torchrun`) started several."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return
        accelerate = require("accelerate", "eval")
        # processes wait for the slowest, whose requests may take days longer
        patience = accelerate.InitProcessGroupKwargs(timeout=timedelta(weeks=52))
        # on a machine without an accelerator it would count one process, unless it is told so
        without = not torch.accelerator.is_available()
        self.accelerator = accelerate.Accelerator(cpu=without, kwargs_handlers=[patience])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after another."""
        return self.accelerator.gather(tensor) if self.accelerator else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes on process `dst`, None on the others."""
        if not self.accelerator:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes, where there are several."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()
