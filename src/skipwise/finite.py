"""Measured numbers are finite, or the first block that makes them otherwise is named."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError
from skipwise.kept import every_block

MANY = 256  # numbers that are held back before the largest of them is taken


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is."""
    if tensor.is_complex():
        return is_finite(torch.view_as_real(tensor))
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # float8 knows no sums
        tensor = tensor.float()
    # a sum is quicker, and not finite when any number in it is not; the other way round it may overflow by itself
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class Watch:
    """Whether all numbers that a model makes are finite, for which no device is waited for before it is asked."""

    def __init__(self) -> None:
        self._most: list[Tensor] = []  # NaN or infinite where any number is

    def add(self, numbers: Tensor) -> None:
        """Take note of some more. Logits of -inf are fine."""
        if numbers.numel():
            self._most.append(numbers.detach().amax())
            if len(self._most) == MANY:
                self._most = [self._worst()]

    def fine(self, device: torch.device) -> Tensor:
        """(): bool, whether all were finite."""
        if not self._most:
            return torch.tensor(True, device=device)
        self._most = [self._worst()]
        return (self._most[0] < torch.inf).to(device)

    def _worst(self) -> Tensor:
        device = self._most[0].device
        return torch.stack([most.to(device).float() for most in self._most]).amax()


def not_finite(model: nn.Module, call: Callable[[], object]) -> UserError:
    """What to raise for a model whose numbers are not finite in this call of it: a line that names the first block."""
    return UserError(f"{type(model).__name__} gives numbers that are not finite: {_where(model, call)}.")


def _where(model: nn.Module, call: Callable[[], object]) -> str:
    found: list[tuple[str, nn.Module | None]] = []
    hooks = [
        block.register_forward_hook(_look(found, f"block {number} of {name}", block), with_kwargs=True)
        for name in find_contract(model).stacks
        for number, block in enumerate(every_block(module_list(model, name)))
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not found:
        return f"its blocks are finite, what is made of them is not, in {dtype}; check its last norm and its head"
    name, block = found[0]
    if block is None:
        return f"what goes into {name} is not finite already; check its weights and inputs"
    bad = [name for name, weight in block.named_parameters() if not is_finite(weight)]
    if bad:
        return f"{name} has weights that are not finite ({bad[0]}); load the checkpoint anew"
    other = "float32" if dtype != "float16" else "bfloat16 or float32"
    return f"{name} overflows in {dtype}; load it in {other} (dtype=)"


def _look(found: list[tuple[str, nn.Module | None]], name: str, block: nn.Module) -> Callable[..., None]:
    def look(module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
        if found:
            return
        if not all(map(is_finite, _tensors([*args[:1], kwargs.get("hidden_states")]))):
            found.append((name, None))
        elif not all(map(is_finite, _tensors(result))):
            found.append((name, block))

    return look


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
