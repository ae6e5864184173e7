"""What a skipped block may leave behind: its mean residual, or a linear map of its normed input.

Beyond the papers, which leave the identity. With x the stream at a token, a constant gives x + b and a linear map
x + W n(x) + b, where n(x) = x / rms(x): a block sees its input normed, so that the scale of the stream, which grows
with depth, says nothing. A map costs 2 d^2 FLOPs a token, about a twelfth of a block.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

StandInKind = Literal["constant", "linear"]
EPSILON = 1e-6


def normed(states: Tensor) -> Tensor:
    """States (..., width) divided by their root mean square."""
    return F.rms_norm(states, states.shape[-1:], eps=EPSILON)


class Constant(nn.Module):
    """Adds `bias` (width,) to the stream (..., width)."""

    bias: Tensor

    def __init__(self, bias: Tensor):
        super().__init__()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """The stream behind the block."""
        return states + self.bias


class Linear(nn.Module):
    """Adds `weight` (width, width) times the normed stream, and `bias` (width,), to the stream (..., width)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """The stream behind the block."""
        return states + F.linear(normed(states), self.weight, self.bias)


class Stored(nn.Module):
    """Puts a known state in the stream's place, so that what was computed before need not be computed again."""

    states: Tensor

    def __init__(self, states: Tensor):
        super().__init__()
        self.register_buffer("states", states, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """The stored states (batch, length, width), whatever comes in."""
        return self.states


def key(phase: int, stack: str, block: int, name: str) -> str:
    """Where a plan's tensor file keeps a stand-in's "weight" or "bias"."""
    return f"phase{phase}/{stack}/{block}/{name}"


def build(tensors: Mapping[str, Tensor], phase: int, stack: str, block: int, like: Tensor) -> nn.Module:
    """The stand-in of a block from a plan's tensors, in the dtype and on the device of `like`."""
    bias = tensors[key(phase, stack, block, "bias")].to(like)
    weight = tensors.get(key(phase, stack, block, "weight"))
    return Constant(bias) if weight is None else Linear(weight.to(like), bias)


class Moments:
    """Running sums, in float64, from which both kinds of stand-in follow; memory does not grow with the tokens."""

    def __init__(self, width: int):
        self.tokens = 0
        self._xx = torch.zeros(width, width, dtype=torch.float64)
        self._xy = torch.zeros(width, width, dtype=torch.float64)
        self._x = torch.zeros(width, dtype=torch.float64)
        self._y = torch.zeros(width, dtype=torch.float64)

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """inputs, residuals: (tokens, width), of any float dtype; the inputs as they are before the norm."""
        x, y = normed(inputs.float()), residuals.float()
        self._xx += (x.T @ x).double().cpu()
        self._xy += (x.T @ y).double().cpu()
        self._x += x.double().sum(0).cpu()
        self._y += y.double().sum(0).cpu()
        self.tokens += len(x)

    def constant(self) -> Tensor:
        """(width,): the mean residual."""
        return (self._y / self.tokens).float()

    def linear(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(weight (width, width), bias (width,)); `ridge` is the penalty in units of the mean variance of an input."""
        mean_x, mean_y = self._x / self.tokens, self._y / self.tokens
        covariance = self._xx / self.tokens - torch.outer(mean_x, mean_x)
        cross = self._xy / self.tokens - torch.outer(mean_x, mean_y)
        penalty = ridge * covariance.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=torch.float64), cross).T
        return weight.float(), (mean_y - weight @ mean_x).float()
