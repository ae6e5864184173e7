"""The shapes of a model's streams at a given size, and which of them its head takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.blocks import Contract, Stack, module_list
from skipwise.examples import Shapes as OnShapes
from skipwise.examples import Size, example_inputs
from skipwise.skipping import PassThrough, placing

Shape = tuple[int, ...]
Shapes = Mapping[str, Mapping[int, tuple[Shape | None, ...]]]  # stack -> number of blocks that ran -> streams


class _Leaf(PassThrough):
    """Notes the streams, and lets on new ones, whose gradients tell which are used."""

    def __init__(self, block: nn.Module, stack: Stack):
        super().__init__(block, stack)
        self.__dict__["leaves"] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The streams as new leaves, in the places in which the block returns them."""
        streams = [kwargs[name] if name in kwargs else args[place] for name, place in self.places]
        leaves = [stream.detach().requires_grad_() for stream in streams]
        self.__dict__["leaves"] = leaves
        if self.returns is None:
            return leaves[0]
        by_place = dict(zip(self.outputs, leaves, strict=True))
        return tuple(by_place.get(place) for place in range(self.returns))


def stream_shapes(model: nn.Module, contract: Contract, size: Size) -> Shapes:
    """The streams' shapes behind 1, 2, ... blocks of each stack; None for one that nobody takes any more.

    The model must be on the meta device; no block is run.
    """
    last = list(contract.stacks)[-1]
    modules: dict[str, dict[int, nn.Module]] = {}
    for name, stack in contract.stacks.items():
        blocks = module_list(model, name)
        modules[name] = {n: PassThrough(blocks[n], stack) for n in range(stack.length - 1)}
        modules[name][stack.length - 1] = _Leaf(blocks[stack.length - 1], stack)
    with placing(model, modules), OnShapes(), torch.enable_grad():
        out = model(**example_inputs(model, size), return_dict=False)[0]
        out.float().sum().backward()
    found: dict[str, dict[int, tuple[Shape | None, ...]]] = {}
    for name, stack in contract.stacks.items():
        leaves: list[Tensor] = modules[name][stack.length - 1].__dict__["leaves"]
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        found[name] = {stop: shapes for stop in range(1, stack.length + 1)}
        if name == last:
            used = tuple(None if leaf.grad is None else tuple(leaf.shape) for leaf in leaves)
            found[name][stack.length] = used
    return found
