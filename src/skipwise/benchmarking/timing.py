"""Times of several things measured in turns, so that what else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 6  # pairs below which an interval is from the smallest to the largest: there is nothing to resample


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of pairs, and its interval: bootstrapped to 95%, or the extremes of a few pairs."""

    value: float
    low: float
    high: float
    pairs: int

    def rounded(self, digits: int = 3) -> dict[str, float]:
        """`ratio`, `low`, `high`, `pairs`, for a row of JSON."""
        return {
            "ratio": round(self.value, digits),
            "low": round(self.low, digits),
            "high": round(self.high, digits),
            "pairs": self.pairs,
        }


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    began = clock()
    call()
    return clock() - began


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 0,
    measure: Callable[[Callable[[], Any]], float] = timed,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds` rounds, by its name; the order alternates from round to round.

    warmup: rounds before, not in the result. measure: calls it and says what it took, by default by the clock.
    on_round: told each round's number before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        if on_round is not None:
            on_round(number)
        for name in list(calls)[:: 1 if number % 2 else -1]:
            took = measure(calls[name])
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> Ratio:
    """Of two things measured in the same rounds, pair by pair."""
    ratios = np.asarray(over) / np.asarray(under)
    if len(ratios) < FEWEST:
        low, high = ratios.min(), ratios.max()
    else:
        draws = np.random.default_rng(seed).integers(len(ratios), size=(2000, len(ratios)))
        low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
