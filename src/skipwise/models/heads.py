"""A large vocabulary's head on a CPU that oneDNN is preferred on (`skipwise.models.linear`).

Few rows against a whole vocabulary take about as long as reading the weight does, and the order in which torch holds it
is not that in which oneDNN multiplies: 10 to 20 rows of width 512 against 126,464 words take 12 ms by a weight as it
is and 8 ms by one that was packed before (two threads; `python benchmarks/products.py`). A packed head is held beside
the module for as long as that lives. It is looked over at the beginning of every generation, as a weight can be
changed without a trace.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipwise.models import linear

LARGE = 2**25  # bytes of a weight that no cache holds
SHARE = 8  # a head is packed where it is this part of its model or more: elsewhere it decides little
ROWS = 16  # that it is packed for; others take no longer than by a weight that is not

# the weight, and what the head's own made of a probe
_packed: WeakKeyDictionary[nn.Module, "tuple[Tensor, Tensor]"] = WeakKeyDictionary()


def prepared(head: nn.Module, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """states (..., width) -> logits (..., vocabulary) by a model's head, until somebody changes that."""
    if not (isinstance(head, nn.Linear) and _is_worth_it(head, model)):
        return partial(linear.linear, head)
    seen = linear.product(_probe(head), head.weight)
    if head not in _packed or not torch.equal(_packed[head][1], seen):
        _packed[head] = packed(head.weight), seen
    weight = _packed[head][0]
    return lambda x: linear.by_onednn(x, weight, head.bias)


def packed(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) as `by_onednn` takes it, of no use for anything else."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _is_worth_it(head: nn.Linear, model: nn.Module) -> bool:
    weight = head.weight
    plain = linear.PREFERRED and linear.is_plain(head) and linear.suits(weight, weight)
    large = plain and weight.nbytes >= LARGE and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return large and weight.numel() * SHARE >= sum(part.numel() for part in model.parameters())


def _probe(head: nn.Linear) -> Tensor:
    """(1, width)"""
    return torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0))
