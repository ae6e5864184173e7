"""A denoising step through `torch.compile`: the model up to its head, one graph for each phase of a plan.

Every forward of a generation has the same shape (all rows, all positions), so that nothing is compiled from step to
step; the head is left outside, as the number of positions that it runs on changes. The model itself is not changed.
"""

import time
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from skipwise.errors import UserError

GRAPHS = 256  # of one function, where torch would stop at 8: phases, models and lengths of prompts each take one
CALLS = {"cuda": 3}  # that a graph takes until it is at speed: compiled, recorded, replayed; elsewhere one

_warm: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


@dataclass
class Compiled:
    """Runs models' `states` compiled. seconds: what the first calls of each graph took, which are made twice."""

    seconds: float = 0.0
    _functions: dict[nn.Module, Any] = field(default_factory=dict)

    def states(self, model: nn.Module, cut: Any, inputs: Tensor, mask: Tensor | None, others: dict[str, Any]) -> Tensor:
        """`model.states(inputs, mask, **others)`. cut: what is cut out of the model at this moment.

        Raises UserError for a model that gives no states, and where there is no compiler.
        """
        if not hasattr(model, "states"):
            raise UserError(f"{type(model).__name__} gives no states to compile up to; leave out compile=True.")
        if model not in self._functions:
            mode = "reduce-overhead" if inputs.is_cuda else None
            states: Any = model.states
            self._functions[model] = torch.compile(states, dynamic=False, mode=mode)
        key = (repr(cut), inputs.shape, mask is None, inputs.device, tuple(others))
        known = _warm.setdefault(model, set())
        if key not in known:
            self._warm_up(model, inputs, mask, others)
            known.add(key)
        return self._call(model, inputs, mask, others)

    def _call(self, model: nn.Module, inputs: Tensor, mask: Tensor | None, others: dict[str, Any]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            return self._functions[model](inputs, mask, **others)

    def _warm_up(self, model: nn.Module, inputs: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            for _ in range(CALLS.get(inputs.device.type, 1)):
                self._call(model, inputs, mask, others)
        except (TorchDynamoException, RuntimeError) as error:
            cause = str(error).strip().splitlines()[0]
            needed = "triton" if inputs.is_cuda else "a C++ compiler such as g++"
            raise UserError(
                f"compile=True: torch.compile failed ({cause}); install {needed}, or leave out compile=True."
            ) from error
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        self.seconds += time.perf_counter() - began
