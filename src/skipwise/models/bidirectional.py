"""What turns a causal decoder of transformers into a masked diffusion model: attention that looks both ways."""

from typing import Any

import torch
from torch import Tensor, nn

from skipwise.models.lean import is_lean, run, spared
from skipwise.models.native import MaskedDiffusion
from skipwise.models.workspace import Workspace

LEAN = ("past_key_values", "position_ids")  # what `run` takes of what a decoder does
Where = Tensor | tuple[Tensor, Tensor]  # bool (rows, length), or its indices: rows (n,) and positions (n,)


class Bidirectional(MaskedDiffusion):
    """Mix in before a `...ForCausalLM` class whose config says `is_causal = False`."""

    takes_cache = True

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        for layer in self.model.layers:  # type: ignore[attr-defined]
            layer.self_attn.is_causal = False  # the SDPA kernels read this flag when there is no padding mask

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, where: Where | int | None = None, **others: Any
    ) -> Tensor:
        """What the head makes logits of: (rows, length, width), or at `where` alone, as `kept` says.

        Of rows and positions the last block may run those alone. space: a `Workspace`; others: as the decoder takes
        them.
        """
        return self._run(input_ids, attention_mask, where, **others)

    def spared(self, rows: int, keys: int) -> int:
        """FLOPs that a narrow last block spares for every other position, in a forward of so many rows whose positions
        see `keys`.
        """
        return spared(self.model, rows, keys)  # type: ignore[attr-defined]

    @property
    def head(self) -> nn.Module:
        """States (..., width) -> logits (..., vocab_size)."""
        return self.lm_head  # type: ignore[attr-defined]

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        where: Where | int | None,
        space: Workspace | None = None,
        **others: Any,
    ) -> Tensor:
        """The decoder's states at `where`."""
        trunk: Any = self.model  # type: ignore[attr-defined]
        mask, past, numbers = key_mask(attention_mask, trunk.config), *map(others.get, LEAN)
        if not {k for k, v in others.items() if v is not None} <= set(LEAN) or not is_lean(trunk, mask):
            return kept(trunk(input_ids, attention_mask=mask, **others).last_hidden_state, where)
        if isinstance(where, tuple):
            return run(trunk, input_ids, mask, past, where, numbers, space)
        return kept(run(trunk, input_ids, mask, past, None, numbers, space), where)


def key_mask(attention_mask: Tensor | None, config: Any) -> Tensor | None:
    """The mask (rows, length) of keys as torch's attention takes it: bool (rows, 1, 1, length), a view and no copy.

    transformers would write out every query's row of it, at every forward. Kernels that are not torch's get what is
    given.
    """
    if attention_mask is None or attention_mask.ndim != 2 or config._attn_implementation != "sdpa":
        return attention_mask
    return attention_mask.bool()[:, None, None, :]


def kept(values: Tensor, where: Where | int | None) -> Tensor:
    """values (rows, length, width) at `where`, which may be what transformers takes as logits_to_keep.

    A bool mask (rows, length), or rows and positions (n,) as `nonzero(as_tuple=True)` gives them, for which no device
    has to wait -> (n, width), row by row; positions (k,) or (rows, k) -> (rows, k, width); a number -> the last so
    many; None or 0 -> all.
    """
    if where is None:
        return values
    if isinstance(where, int):
        return values[:, -where:]
    if isinstance(where, tuple) or where.dtype == torch.bool:
        return values[where]
    return values[:, where] if where.ndim == 1 else values.take_along_dim(where[..., None], 1)
