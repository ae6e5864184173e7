"""Rules by which engines take a layer's kind from its position, and the nearest plan that keeps to one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

Change = tuple[int, int]  # how many other blocks are kept, and by how many places the kept ones moved


@dataclass(frozen=True)
class Pattern:
    """Every `period`-th layer is of one kind, the others of the other.

    key: the config's list with an entry a layer; marked: that kind's entry in it; setting_key: the config's number that
    gives the engine another period, "" where the engine has but this one.
    """

    key: str
    marked: Any
    period: int
    setting_key: str = ""

    def kinds(self, config: dict[str, Any]) -> list[bool]:
        """Of each layer whether it is of the marked kind."""
        return [entry == self.marked for entry in config.get(self.key) or ()]

    def fits(self, kinds: Sequence[bool], period: int) -> bool:
        """Whether every `period`-th layer and no other is of the marked kind."""
        return all(kind == _is_marked(number, period) for number, kind in enumerate(kinds))

    def describes(self, config: dict[str, Any]) -> bool:
        """Whether the engine finds these layers' kinds, by the period that it reads or by its own."""
        kinds, period = self.kinds(config), self.period
        if self.setting_key:
            period = config.get(self.setting_key, period)
        # a period that is longer than the model ends in an IndexError
        return self.fits(kinds, period) and (not self.setting_key or period <= len(kinds))

    def setting(self, config: dict[str, Any]) -> dict[str, int]:
        """What to write into config.json so that the engine finds these layers' kinds; {} where nothing helps."""
        kinds = self.kinds(config)
        if not self.setting_key or self.describes(config):
            return {}
        return next(({self.setting_key: period} for period in range(1, len(kinds) + 1) if self.fits(kinds, period)), {})

    def nearest(self, kinds: Sequence[bool], kept: Sequence[int]) -> list[int] | None:
        """The blocks to keep, as many as `kept` and as few others as can be, so that their kinds follow the rule.

        kinds: of the whole model's blocks. None when no choice of so many does.
        """
        periods = range(1, len(kept) + 1) if self.setting_key else [self.period]
        found = [choice for period in periods if (choice := _choose(tuple(kinds), tuple(kept), period)) is not None]
        return min(found, key=lambda choice: choice[0])[1] if found else None


def _is_marked(number: int, period: int) -> bool:
    return (number + 1) % period == 0


def _choose(kinds: tuple[bool, ...], kept: tuple[int, ...], period: int) -> tuple[Change, list[int]] | None:
    """(how far it is from `kept`, blocks) of the nearest choice of as many blocks that follow the rule."""
    wanted = set(kept)

    @cache
    def best(block: int, place: int) -> tuple[Change, tuple[int, ...]] | None:
        """The nearest way to fill the places from `place` on with blocks from `block` on."""
        if place == len(kept):
            return (0, 0), ()
        if block == len(kinds):
            return None
        ways = [best(block + 1, place)]
        if kinds[block] == _is_marked(place, period) and (rest := best(block + 1, place + 1)):
            (others, moved), blocks = rest
            ways.append(((others + (block not in wanted), moved + abs(block - kept[place])), (block, *blocks)))
        return min((way for way in ways if way), key=lambda way: way[0], default=None)

    found = best(0, 0)
    return (found[0], list(found[1])) if found else None
