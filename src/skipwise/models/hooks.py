"""Hooks on modules: whether there are any, and one kind that whoever does a module's work without it can serve, too."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Onlooker:
    """A hook behind a module that looks at what it was given and has made, and changes nothing.

    Who does a module's work without calling it can call such a hook all the same: as torch does one that is registered
    with keyword arguments, `look(module, args, kwargs, result)`.
    """

    def __init__(self, look: Callable[[nn.Module, tuple, dict[str, Any], Any], None]):
        self.look = look

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Look, and give nothing back that would take the result's place."""
        self.look(module, args, kwargs, result)


def watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
