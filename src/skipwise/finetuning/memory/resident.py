"""Tensors for a model on the meta device, fake or real, for as long as they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.finetuning.peak import PeakMemory

Slots = list[tuple[dict[str, Any], str, Tensor]]  # where a tensor is held, its name there, and itself


@contextmanager
def materialised(model: nn.Module, dtype: torch.dtype, fake: bool, device: str = "cpu") -> Iterator[None]:
    """The model with tensors on the device in the place of those on meta; meta again afterwards.

    What is frozen gets `dtype`; what is trained keeps its own. Inside of a FakeTensorMode they are `fake` and hold no
    memory, else parameters are small random numbers.
    """
    slots = _fill(model, dtype, fake, device)
    try:
        yield
    finally:
        _put_back(slots)


class Weights:
    """Where streamed blocks get their weights from, for a simulation: tensors that count as weights while they live."""

    def __init__(self, tracker: PeakMemory, dtype: torch.dtype, fake: bool, device: str = "cpu"):
        self._tracker, self._dtype, self._fake, self._device = tracker, dtype, fake, device
        self._slots: dict[str, Slots] = {}

    def fill(self, module: nn.Module, prefix: str, *, device: torch.device | str | None = None) -> None:
        """Give the module its weights."""
        self._slots[prefix] = _fill(module, self._dtype, self._fake, self._device)
        self._tracker.label(module.parameters(), "weights")
        self._prefix = prefix

    def release(self, module: nn.Module) -> None:
        """Put the module back on the meta device."""
        _put_back(self._slots.pop(self._prefix))


def _fill(model: nn.Module, dtype: torch.dtype, fake: bool, device: str) -> Slots:
    slots: Slots = []
    made: dict[int, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        holders: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in holders:
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        made[id(tensor)] = _like(tensor, dtype, fake, device)
                    slots.append((held, name, tensor))
                    held[name] = made[id(tensor)]
    return slots


def _put_back(slots: Slots) -> None:
    for held, name, tensor in slots:
        held[name] = tensor


def _like(tensor: Tensor, dtype: torch.dtype, fake: bool, device: str) -> Tensor:
    cast = tensor.is_floating_point() and not tensor.requires_grad
    with torch.no_grad():
        new = torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype, device=device)
        if not fake:
            new = new.normal_(0, 0.02) if new.is_floating_point() else new.zero_()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
