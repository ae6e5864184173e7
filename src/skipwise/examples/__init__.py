"""Example inputs: one call of a model, made from its config alone, at a stated size.

What a model takes is what tracing cannot see: the names, the ranks, which tensor is a mask and which an index. Language
models take token ids. What a diffusers transformer takes is found from its forward's signature and its config; the few
that say too little there have a row in `ROWS`. One way serves the published model and a toy of two blocks.
"""

from typing import Any

import torch
from torch import nn

from skipwise.examples.language import TEXTS, check_text_alone, language_inputs, on_meta
from skipwise.examples.rows import ROWS
from skipwise.examples.shapes import Shapes, shapes_only
from skipwise.examples.signature import dtype_of, from_signature, no_example, parameters_of, run_example
from skipwise.examples.size import TINY, Size
from skipwise.examples.tensors import Tensors

__all__ = [
    "ROWS",
    "TINY",
    "Shapes",
    "Size",
    "check_text_alone",
    "example_inputs",
    "on_meta",
    "run_example",
    "shapes_only",
]


def example_inputs(
    model: nn.Module, size: Size = TINY, device: torch.device | str | None = None, whole: bool = False
) -> dict[str, Any]:
    """Keyword arguments for one forward of `model`, deterministic, on `device` (default: where the model is).

    Random floats have the model's dtype. Under the meta device they hold no memory, and only masks, indices and
    timesteps, whose values a forward may read, are real: run the model inside `shapes_only()`.

    A language model is given text alone, and more only when it does not run on that; whole: or when some of its blocks
    do not (Mllama's that look at pictures). A module with a method `example_inputs(size)` is asked itself.
    Raises UserError, with the reason, for a model whose inputs cannot be made.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own(size)
    new = Tensors(size.batch, torch.device(device or next(model.parameters()).device), dtype_of(model))
    for cls in type(model).__mro__:  # a subclass takes what its parent takes
        if cls.__name__ in ROWS:
            return ROWS[cls.__name__](model.config, size, new)
    if hasattr(model, "config_name"):  # a diffusers model, without importing diffusers
        return from_signature(model, size, new)
    if parameters_of(model).keys().isdisjoint(TEXTS):
        raise no_example(model, "its forward takes no `input_ids`, and it is no diffusers model")
    return language_inputs(model, size, new, whole)
