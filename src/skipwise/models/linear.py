"""Linear maps of inference on CPUs where torch's default library takes twice the time that they need.

In float32 torch hands matrix products to Intel's MKL, which uses AVX-512 on Intel's own processors alone. oneDNN, which
torch carries along and uses in half precision, uses it wherever it is: on an AMD EPYC products of 512 x 512 and larger
take 45% of MKL's time, and the few rows that a head is asked for, against a whole vocabulary, a sixth to a half
(`python benchmarks/products.py`).
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.models.hooks import watched
from skipwise.versions import told_of_processor

WORTH = 1_000_000  # multiplications a thread that make up for the longer way into oneDNN (10 microseconds)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), to the rounding of float32. A hook, an adapter or a quantised weight is called as it is."""
    if not (isinstance(module, nn.Linear) and is_plain(module)):
        return module(x)
    return product(x, module.weight, module.bias)


def is_plain(module: nn.Linear) -> bool:
    """Whether the module's product can be made without calling it."""
    return type(module) is nn.Linear and not watched(module) and not torch.is_grad_enabled()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, where no gradient is wanted. x: (..., inputs); weight: (outputs, inputs); bias: (outputs,)."""
    work = x.numel() * weight.shape[0]
    if work < WORTH or not (PREFERRED and work >= WORTH * _threads() and suits(x, weight)):
        return F.linear(x, weight, bias)
    return (_opaque if torch.compiler.is_compiling() else by_onednn)(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` by oneDNN, which also takes a weight that it has packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("skipwise::linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for torch's compiler, which takes that operator of weights that it froze and fails at others."""
    return by_onednn(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _threads() -> int:
    return 1 if torch.compiler.is_compiling() else torch.get_num_threads()


def suits(x: Tensor, weight: Any) -> bool:
    """Whether `by_onednn` is of use for these."""
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous()
    return plain and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu


def prefers_onednn() -> bool:
    """Whether this machine's processor has AVX-512 and is not Intel's, and torch was built with oneDNN."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and _vendor() == "AuthenticAMD" and torch.backends.mkldnn.is_available() and _callable()


def _callable() -> bool:
    """torch's own compiler calls it, but nobody promises that it stays."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    return told_of_processor("vendor_id") or platform.processor()


PREFERRED = prefers_onednn()
