"""What forwards of one generation need not find out each anew."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Workspace:
    """Of a model while nothing of it changes. kept: what its forwards leave for those behind them, by name.

    Of the last forward, narrowed: whether it ran the last block at the wanted positions alone; known_flops: of what it
    took from those before.
    """

    kept: dict[Any, Any] = field(default_factory=dict)
    narrowed: bool = False
    known_flops: int = 0

    def keep(self, name: Any, make: Callable[[], Any]) -> Any:
        """What is kept under the name; made when it is first asked for."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]
