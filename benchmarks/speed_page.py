"""docs/results/speed.md from docs/results/speed.json alone (benchmarks/speed.py).

python benchmarks/speed_page.py docs/results/speed.json -o docs/results/speed.md
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from skipwise.files import write_atomically

Row = dict[str, Any]

INTRO = """# How fast decoding is
Made by `make bench` ({command}) on {device}, {threads} threads, {date}, in {minutes} minutes; {versions}.
{quick}
Every row is two things on the same weights and prompts, run in turns in one process. *Times as fast* is the median
over the pairs of plain seconds / our seconds, with its 95% bootstrap interval (of fewer than 6 pairs the extremes).
*Equal* is the share of new tokens that are the same, place by place. The official loops are transcriptions of what the
official code does, costs included ([benchmarks/official_loops.py](../../benchmarks/official_loops.py)).
"""
ABOUT = {
    "zoo": "## The embedded models against the official loops\n"
    "In one thread. Batches of task prompts, greedy, one token a step. *Same tokens* is `compat=` where our default is "
    "not the same.",
    "shapes": "## Published vocabularies against the official loops\n"
    "Random weights, 8 blocks of width 512, in float32. Fewer steps than tokens, or the official loops would take "
    "hours; what a step costs does not depend on how many tokens it commits.",
    "exact": "## What each exact trick brings alone\n"
    "All of them but one, against all. Noise of candidates alone is drawn up to the last of them, as a generator "
    "cannot be wound forward. The tasks' answers have no end of text: for the last row a digit was taken for it.",
    "plan": "## Under a plan\n"
    "The LLaDA shape without 2 of its 8 blocks, against the same mode with all. *Seconds left* is what is left of the "
    "time, beside what is left of the FLOPs by formula: of the blocks, of a forward with the head at every position, "
    "and all-in of the forwards as they happened.",
    "modes": "## Approximations against exact decoding\n"
    "One token a step in exact decoding. With random weights equal tokens say nothing about a trained model.",
    "others": "## What else has to be quick",
}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def interval(row: Row) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}, {row['pairs']})"


def percent(part: float) -> str:
    return f"{100 * part:.1f}%"


def place(row: Row) -> list[str]:
    length = f"{row['prompt']} + {row['gen']}{', padded' if row['padded'] else ''}"
    return [row["model"], str(row["batch"]), length, str(row["steps"])]


PLACE = ["model", "batch", "tokens", "steps"]


def compared(rows: Sequence[Row]) -> str:
    """plain and ours, side by side."""
    head = [*PLACE, "plain", "ours", "plain, s", "ours, s", "times as fast (interval, pairs)", "equal"]
    keys = ("plain", "ours", "plain_seconds", "our_seconds")
    return table(
        head, [[*place(row), *(row[key] for key in keys), interval(row), percent(row["equal_tokens"])] for row in rows]
    )


def planned(rows: Sequence[Row]) -> str:
    """Seconds beside FLOPs."""
    head = [*PLACE, "mode", "all, s", "6 of 8, s", "seconds left", "block FLOPs left", "all-in left", "as happened"]
    lines = []
    for row in rows:
        mode = row["ours"].removesuffix(", 6 of 8")
        left = [row["left_block_flops"], row["left_all_in_flops"], row["left_flops_as_happened"]]
        seconds = f"{percent(1 / row['ratio'])} ({percent(1 / row['high'])} to {percent(1 / row['low'])})"
        lines.append(
            [*place(row), mode, row["plain_seconds"], row["our_seconds"], seconds, *(percent(part) for part in left)]
        )
    return table(head, lines)


def rest(rows: Sequence[Row]) -> str:
    """One figure each, below which less is better."""
    lines = []
    for row in rows:
        counted = "evaluated" in row
        more = f"{row['skip']} of {row['blocks']} blocks" if counted else f"{row['texts']} texts"
        figure = f"{row['ratio']:.3f}" if counted else interval(row)
        lines.append([row["what"], row["model"], more, figure])
    return table(["what", "model", "", "ratio"], lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "zoo": compared,
    "shapes": compared,
    "exact": compared,
    "plan": planned,
    "modes": compared,
    "others": rest,
}


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    quick = "A trial run (`--quick`): small models and single pairs, **no measurement**.\n" if result["quick"] else ""
    if result["clock"] == "cpu":
        quick += "Seconds are CPU seconds of the process, on a machine that did other things.\n"
    facts = {key: machine[key] for key in ("device", "threads", "date", "command")}
    parts = [INTRO.format(**facts, minutes=result["minutes"], versions=versions, quick=quick)]
    parts += [f"{ABOUT[name]}\n\n{TABLES[name](rows)}\n" for name, rows in result["sections"].items() if rows]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what speed.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page, a .md file")
    options = parser.parse_args()
    write_atomically(options.output, page(json.loads(options.result.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
