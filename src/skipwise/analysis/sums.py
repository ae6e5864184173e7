"""Running sums: what every statistic here is made of. They add up over batches, denoising steps and processes."""

import torch
from torch import Tensor


class Sums:
    """Named totals in float64 on the CPU; their number and size do not depend on how many tokens went in."""

    def __init__(self, **shapes: tuple[int, ...]):
        self.totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def accumulate(self, **values: Tensor | float) -> None:
        """Add a value of the total's shape, or a number, to each named total."""
        for name, value in values.items():
            self.totals[name] += value.detach().cpu().double() if isinstance(value, Tensor) else value
