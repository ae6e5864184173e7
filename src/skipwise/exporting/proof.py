"""The proof of an export by running it, where what it is built of does not say enough.

Where blocks depend on their number, a checkpoint without the last of them leaves every other block its own. What is
left to go wrong is a forward that counts them all (`i == len(self.layers) - 1`), which no config shows.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipwise.errors import UserError
from skipwise.examples import Size, example_inputs
from skipwise.loading import load
from skipwise.plan import Plan
from skipwise.skipping import skip

SIZES = (Size(batch=2), Size(tokens=21, image=12))


def prove(source: str, folder: Path, plan: Plan, example: Mapping[str, Any] | None) -> None:
    """Raise UserError unless the export in `folder` gives, bit for bit, what the source gives under the plan.

    Both are loaded, one after the other. example: keyword arguments of one forward; made at two sizes when left out.
    """
    wanted = _outputs(source, plan, example)
    try:
        found = _outputs(str(folder), None, example)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise _refused(plan, f"what a checkpoint without the last of them holds does not run ({told})") from error
    if len(wanted) != len(found) or not all(map(_equal, wanted, found)):
        raise _refused(plan, "it counts its blocks, so that a checkpoint without the last of them is another model")


def _refused(plan: Plan, why: str) -> UserError:
    return UserError(f"{plan.model.architecture} cannot be exported: {why}; use the plan with `skip` instead.")


@torch.no_grad()
def _outputs(name: str, plan: Plan | None, example: Mapping[str, Any] | None) -> list[Tensor]:
    """What the model gives on every example: all tensors of its output by themselves, no caches and no lists."""
    model, _ = load(name)
    outputs = []
    with skip(model, plan, example) if plan else nullcontext():
        for inputs in [example_inputs(model, size) for size in SIZES] if example is None else [example]:
            result = model(**inputs)
            values = [result] if isinstance(result, Tensor) else _values(result)
            outputs += [value for value in values if isinstance(value, Tensor)]
    return outputs


def _values(result: Any) -> list[Any]:
    """The parts of a tuple, or of an output with names."""
    return list(result.values() if hasattr(result, "values") else result)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
