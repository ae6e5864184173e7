"""In which precision a training step computes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from skipwise.finetuning.settings import FinetuneSettings
from skipwise.loading import DTYPES

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def lora_dtype(settings: FinetuneSettings) -> torch.dtype:
    """What the adapter's weights, their gradients and the optimiser's state are held in."""
    return DTYPES[settings.dtype] if settings.precision == "pure" else torch.float32


def computing(settings: FinetuneSettings, device: str) -> AbstractContextManager[Any]:
    """Run the forwards of a training in here. device: its type, "cuda" or "cpu"."""
    if settings.precision == "pure" or settings.dtype == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=DTYPES[settings.dtype])


@contextmanager
def plain_norms(model: nn.Module, settings: FinetuneSettings, device: str) -> Iterator[None]:
    """Train in here: under precision "mixed" norms compute in the dtype of what comes in, whatever autocast thinks.

    CUDA's autocast has them take and give float32 copies, which autograd saves, although their kernels add up in
    float32 anyhow. Backward passes belong in here too, since checkpointed blocks are computed again in them.
    """
    wanted = settings.precision == "mixed"
    norms = [module for module in model.modules() if wanted and isinstance(module, NORMS)]
    for module in norms:
        vars(module)["forward"] = partial(_plainly, module.forward, device)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


def _plainly(forward: Callable[..., Any], device: str, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return forward(*args, **kwargs)
