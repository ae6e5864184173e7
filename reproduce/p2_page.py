"""docs/results/p2.md from the Results in a folder; it computes no score of its own.

python reproduce/p2_page.py docs/results/p2 --page docs/results/p2.md
"""

from collections.abc import Sequence
from pathlib import Path

from p2_claims import beyond, claims
from p2_results import WRITING, Found, Pair, Solver, read, whole
from pages import filled, shown, spread, table, write_page

import skipwise as sw
from skipwise.evaluation import Row
from skipwise.files import write_bytes_atomically
from skipwise.report.figures import image_bytes
from skipwise.report.schedules import draw_front

METRICS = {"": "generative perplexity", " (token entropy)": "token entropy, nats", " (distinct-2)": "distinct-2"}


def importance(pairs: Sequence[Pair]) -> str:
    """Losses and KL by eighths of the trajectory, mean and range over pairs."""
    head = ["progress", "loss heavy", "loss light", "light - heavy", "KL(heavy, light)", "KL(light, heavy)"]
    rows = []
    for part in range(8):
        begin, end = part / 8, (part + 1) / 8
        curves = ("heavy_loss", "light_loss", "loss_gap", "kl", "reverse_kl")
        values = ([8 * p.importance.total(begin, end, curve) for p in pairs] for curve in curves)
        rows.append([f"{begin:.3f} to {end:.3f}", *(spread(list(v)) for v in values)])
    return table(head, rows)


def written(results: Sequence[sw.Result]) -> str:
    """Scores of every plan on text: of one pair with intervals, of several the mean and range of the ratio too."""
    rows = []
    for first in results[0].rows:
        same = [next(r for r in result.rows if r.method == first.method) for result in results]
        cells = [_score(same, WRITING + suffix) for suffix in METRICS]
        kept = "-" if first.plan is None else _kept(same)
        rows.append([first.method, *_saved(first), *cells, kept])
    return table(["schedule", "block FLOPs saved", "all-in saved", *METRICS.values(), "perplexity kept"], rows)


def _saved(row: Row) -> tuple[str, str]:
    return ("-", "-") if row.plan is None else (f"{row.saved_block_flops:.1%}", f"{row.saved_all_in_flops:.1%}")


def _score(rows: Sequence[Row], label: str) -> str:
    values = [row.scores[label].value for row in rows]
    digits = 3 if values[0].value < 20 else 1
    return shown(values[0], digits) if len(values) == 1 else spread([value.value for value in values], digits)


def _kept(rows: Sequence[Row]) -> str:
    kept = [row.mean_retention for row in rows if row.mean_retention]
    return shown(kept[0]) if len(kept) == 1 else spread([one.value for one in kept])


def front(result: sw.Result) -> str:
    """All plans of a front, by what they save; of text with the token entropy."""
    label = WRITING + " (token entropy)"
    text = label in whole(result).scores
    rows = []
    for row in sorted((r for r in result.rows if r.plan is not None), key=lambda r: (r.saved_all_in_flops, r.method)):
        saved = (f"{row.saved_all_in_flops:.1%}", f"{row.saved_block_flops:.1%}")
        entropy = [f"{row.scores[label].value.value:.3f}"] if text else []
        rows.append([row.method, *saved, f"{row.seconds:.1f}", shown(row.mean_retention), *entropy, _grid(row)])
    head = ["method", "all-in FLOPs saved", "block FLOPs saved", "seconds", "kept (95%)"]
    return table([*head, *(["token entropy"] if text else []), "blocks left out, by phase"], rows)


def _front_of(one: Solver | Pair) -> str:
    picture = f"![Score kept against all-in FLOPs saved, {one.label}](p2/{one.label}.front.svg)"
    return f"### {one.label}\n\n{picture}\n\n{front(one.front)}"


def _grid(row: Row) -> str:
    assert row.plan is not None
    parts = []
    for phase in row.plan.phases:
        skipped = sum(map(len, phase.skip.values()))
        parts.append(f"{phase.until:.2g}: {phase.model or skipped}")
    return ", ".join(parts)


def lights(results: Sequence[sw.Result]) -> str:
    """Schedules of a light model of exact tasks, mean and range over seeds."""
    rows = []
    for first in results[0].rows[1:]:
        same = [next(r for r in result.rows if r.method == first.method) for result in results]
        rows.append([first.method, *_saved(first), _kept(same)])
    return table(["schedule", "block FLOPs saved", "all-in saved", "kept"], rows)


def search(found: Found) -> str:
    """The best of the exhaustive search and what became of them on fresh examples."""
    if found.search is None or found.search_result is None:
        return "The search has not been run."
    rows = []
    for row in found.search["rows"][:12]:
        kept = f"{row['retention']:.3f}" if row["retention"] is not None else "-"
        rows.append([str(row["rank"]), row["segments"], str(row["examples"]), kept, row["dropped"] or "", _fresh(row)])
    head = ["rank", "schedule", "samples", "kept in the search", "dropped", "kept on fresh samples (95%)"]
    sandwich = [row.mean_retention for row in found.search_result.rows if row.method == "sandwich"]
    tail = "".join(f"\n\nThe sandwich on the same fresh samples: {shown(kept)}." for kept in sandwich)
    return table(head, rows) + tail


def _fresh(row: dict) -> str:
    name = "confirmed retention"
    if name not in row:
        return "-"
    return f"{row[name]:.3f} ({row[f'{name} low']:.3f} to {row[f'{name} high']:.3f})"


def facts(result: sw.Result) -> str:
    """What the scores of a text Result depend on."""
    return "; ".join(f"{key}: {value}" for key, value in result.settings[WRITING].items() if key != "settings")


def page(found: Found) -> str:
    """The whole page's text."""
    pairs, solvers = found.pairs, found.solvers
    parts = {
        "claims": table(["claim of the paper", "here", "what was found"], claims(found)),
        "beyond": table(["beyond the paper", "here", "what was found"], beyond(found)),
        "pairs": _counted(len(pairs), "pair"),
        "solvers": _counted(len(solvers), "model"),
        "importance": importance(pairs) if pairs else "-",
        "placements": written([pair.placements for pair in pairs]) if pairs else "-",
        "prefix": written([pair.prefix for pair in pairs]) if pairs else "-",
        "facts": facts(pairs[0].placements) if pairs else "-",
        "prefix_facts": facts(pairs[0].prefix) if pairs else "-",
        "search": search(found),
        "lights": lights([solver.placements for solver in solvers]) if solvers else "-",
        "fronts": "\n\n".join(_front_of(one) for one in (*solvers, *pairs)),
        "baseline": ", ".join(_baseline(solver) for solver in solvers),
    }
    return filled("p2.md.in", parts)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _baseline(solver: Solver) -> str:
    scores = [score.value.value for task, score in whole(solver.front).scores.items() if "(" not in task]
    return f"{solver.label} {min(scores):.3f}"


def draw(folder: Path, found: Found) -> None:
    """The front of every model, as an .svg beside its Result."""
    for one in (*found.solvers, *found.pairs):
        picture = image_bytes(draw_front(one.front, "flops"), "svg")
        write_bytes_atomically(folder / f"{one.label}.front.svg", picture)


def _drawn(folder: Path) -> str:
    found = read(folder)
    draw(folder, found)
    return page(found)


if __name__ == "__main__":
    write_page(__doc__, _drawn)
