"""What the pages of both papers are made with: tables, means over seeds, verdicts, and the command line of a page."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean

from skipwise.evaluation import Interval
from skipwise.files import write_atomically

# A claim of the paper, and what is found here: (claim, verdict, evidence)
Verdict = tuple[str, str, str]
HOLDS, FAILS, UNTESTED = "holds", "does not hold at this scale", "not testable here"
ENOUGH = 3  # seeds that a claim about kinds of models needs


def verdict(claim: str, holds: bool, evidence: str, pairs: int = ENOUGH) -> Verdict:
    """A claim with what the numbers say; of too few pairs of models it says so."""
    said = HOLDS if holds else FAILS
    return claim, said if pairs >= ENOUGH else f"{said}; only {pairs} pair{'s' * (pairs > 1)} of models", evidence


def of_gains(claim: str, gains: list[Interval], what: str, digits: int) -> Verdict:
    """Holds when the mean over the models is above zero with its interval, and no model's interval is below zero."""
    mean = _mean(gains)
    above, below = sum(gain.low > 0 for gain in gains), sum(gain.high < 0 for gain in gains)
    evidence = (
        f"{what} {shown(mean, digits)}; of {len(gains)} models {above} have their interval above zero, "
        f"{len(gains) - above - below} around it, {below} below it; from {min(g.value for g in gains):.{digits}f} to "
        f"{max(g.value for g in gains):.{digits}f}"
    )
    return verdict(claim, mean.low > 0 and below == 0, evidence)


def _mean(gains: list[Interval]) -> Interval:
    """Mean of independent estimates for these very models; variances add up."""
    value, count = fmean(gain.value for gain in gains), len(gains)
    low = sum((gain.value - gain.low) ** 2 for gain in gains) ** 0.5 / count
    high = sum((gain.high - gain.value) ** 2 for gain in gains) ** 0.5 / count
    return Interval(value=value, low=value - low, high=value + high)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float | None], digits: int = 3) -> str:
    """Mean (lowest to highest) over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{fmean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def shown(interval: Interval | None, digits: int = 3) -> str:
    """Value (95% interval)."""
    if interval is None:
        return "-"
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def filled(name: str, parts: Mapping[str, str]) -> str:
    """The template of this name, such as "p1.md.in", with {{part}} replaced by the part's text."""
    template = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for part, text in parts.items():
        template = template.replace("{{" + part + "}}", text)
    return template


def write_page(what: str | None, page_of: Callable[[Path], str]) -> None:
    """The command line of a page: its text is made of the Results in a folder."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    given = parser.parse_args()
    write_atomically(given.page, page_of(given.results))
