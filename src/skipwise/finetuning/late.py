"""Late blocks that are frozen, exact, and not resident: their weights are there only while they run."""

from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


class Blocks(Protocol):
    """Where the weights of single blocks come from: the files of a checkpoint, or host memory."""

    def fill(self, module: nn.Module, prefix: str, *, device: torch.device | str | None = None) -> None:
        """Give `module`, whose parameters are called `prefix`.* in the checkpoint, its weights."""
        ...

    def release(self, module: nn.Module) -> None:
        """Put the module back on the meta device: new parameters, since a graph may still hold the old ones."""
        ...


class Streamed(nn.Module):
    """A frozen block whose weights are brought in for its forward, and again for its backward, and then let go.

    Of its activations only what goes in is kept. Gradients pass it exactly.
    """

    def __init__(self, block: nn.Module, name: str, blocks: Blocks):
        super().__init__()
        self.__dict__.update(block=block, blocks=blocks)  # not as a submodule: its parameters are not this one's
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        # the recomputed graph holds the weights until the block's backward is done, although they are released
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        return checkpoint(self._run, *args, use_reentrant=False, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        block, blocks = self.__dict__["block"], self.__dict__["blocks"]
        blocks.fill(block, self.name, device=_device(args, kwargs))
        block.requires_grad_(False)
        try:
            return block(*args, **kwargs)
        finally:
            blocks.release(block)


def _device(*arguments: Any) -> torch.device | None:
    return next((leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)), None)
