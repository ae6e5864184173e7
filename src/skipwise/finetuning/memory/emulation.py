"""What CUDA saves for the backward pass, on a machine without it. Fake tensors of CUDA need a build of torch for CUDA.

On fake CPU tensors attention is one op that keeps no scores, as on CUDA. Norms differ, and are made alike here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.finetuning.settings import FinetuneSettings


class _FusedRMSNorm(torch.autograd.Function):
    """Memory of aten._fused_rms_norm on CUDA: saves its input and one float32 a row. On the CPU it is taken apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def norms_as_on_cuda(model: nn.Module, settings: FinetuneSettings) -> Iterator[None]:
    """The model whose norms, on fake CPU tensors, hold the memory that they hold on CUDA; their results mean nothing.

    Under precision "autocast" they take and give float32, since `layer_norm` and `rms_norm` are among the functions
    that CUDA's autocast computes in float32 (AT_FORALL_FP32 in torch's autocast_mode.h), and not among the CPU's.
    """
    widen = settings.precision == "autocast"
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm | nn.LayerNorm)]
    for module in norms:
        norm = partial(_layer_norm, module) if isinstance(module, nn.LayerNorm) else _FusedRMSNorm.apply
        vars(module)["forward"] = partial(_as_autocast, norm, widen)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


def _as_autocast(norm: Callable[[Tensor], Tensor], widen: bool, x: Tensor) -> Tensor:
    return norm(x.float() if widen and torch.is_autocast_enabled("cpu") else x)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (module.weight, module.bias))
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
