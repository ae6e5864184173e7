"""Two ways to decode, timed in turns in one process, and the row that says which was quicker.

The figure is the median over the pairs of plain seconds / our seconds, above 1 when ours is faster, with its 95%
bootstrap interval (of fewer than 6 pairs the extremes); beside it the share of new tokens that are equal. The first
pair is not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from official_loops import LOOPS
from torch import Tensor, nn

import skipwise as sw
from skipwise.benchmarking.timing import in_turns, ratio, timed
from skipwise.sampling import FAMILIES

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One way to decode: its name, and a call that gives (batch, length)."""

    name: str
    call: Callable[[], Tensor]


@dataclass(frozen=True)
class Prompts:
    """input_ids (batch, prompt) and, where rows are padded on the left, their mask."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Turns:
    """How often two things are measured, how often before that, and by which clock."""

    pairs: int
    warmup: int
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def of(cls, options: argparse.Namespace, pairs: int, warmup: int = 1) -> "Turns":
        """`pairs`, unless another number was asked for."""
        clock = time.process_time if options.cpu_time else time.perf_counter
        return cls(options.pairs or pairs, warmup, clock)


def compare(plain: Run, ours: Sequence[Run], turns: Turns, facts: Row) -> Iterator[Row]:
    """A row for each of ours, all in the same rounds as `plain`; `facts` are what they have in common."""
    tokens = {}

    def run(which: Run) -> None:
        tokens[which.name] = which.call()[:, facts["prompt"] :]

    calls = {which.name: partial(run, which) for which in (plain, *ours)}
    seconds = in_turns(calls, turns.pairs, turns.warmup, partial(timed, clock=turns.clock))
    for name in (which.name for which in ours):
        row = {
            **facts,
            "plain": plain.name,
            "ours": name,
            **ratio(seconds[plain.name], seconds[name]).rounded(),
            "plain_seconds": round(statistics.median(seconds[plain.name]), 4),
            "our_seconds": round(statistics.median(seconds[name]), 4),
            "equal_tokens": round(float((tokens[plain.name] == tokens[name]).double().mean()), 4),
        }
        yield row


def said(row: Row) -> str:
    """A row in one line."""
    if "ours" in row:
        return "{model}, {batch} x {prompt}+{gen}: {ours} {ratio} times as fast as {plain}".format(**row)
    return "{model}: {ratio}, {what}".format(**row)


def official(model: nn.Module, family: str, prompts: Prompts, settings: dict[str, Any]) -> Run:
    """The official loop."""
    chosen = FAMILIES[family].settings(**settings)
    return Run(f"official {family} loop", lambda: LOOPS[family](model, prompts.ids, prompts.mask, chosen))


def ours(name: str, model: nn.Module, prompts: Prompts, **settings: Any) -> Run:
    """`skipwise.generate`."""
    settings = {"stop_at_eos": False, **settings}
    call = partial(sw.generate, model, prompts.ids, attention_mask=prompts.mask, **settings)
    return Run(name, lambda: call().sequences)


def facts_of(name: str, prompts: Prompts, gen: int, steps: int) -> Row:
    batch, prompt = prompts.ids.shape
    padded = prompts.mask is not None
    return {"model": name, "batch": batch, "prompt": prompt, "gen": gen, "steps": steps, "padded": padded}
