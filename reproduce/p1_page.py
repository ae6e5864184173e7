"""docs/results/p1.md from the Results and states in a folder; it computes no score of its own.

python reproduce/p1_page.py docs/results/p1 --page docs/results/p1.md
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import skipwise as sw
from skipwise.evaluation import Interval, Row, difference
from skipwise.files import write_atomically

KINDS = {"tiny-dllm": "native diffusion", "tiny-ar": "autoregressive", "tiny-ar2dllm": "AR-initialised diffusion"}
REAL = "smollm2-135m"


@dataclass(frozen=True)
class Study:
    """One model's Result and states."""

    label: str
    result: sw.Result
    states: dict[str, Any]

    def rows(self, method: str) -> dict[int, list[Row]]:
        """k -> rows of a method."""
        found: dict[int, list[Row]] = {}
        for row in self.result.rows:
            if row.method == method:
                found.setdefault(row.k, []).append(row)
        return found

    def row(self, method: str, k: int) -> Row | None:
        """The first row of a method at k."""
        return next(iter(self.rows(method).get(k, [])), None)

    def kept(self, method: str, k: int) -> float | None:
        """Mean retention, averaged over the plans of the method at k."""
        values = [row.mean_retention.value for row in self.rows(method).get(k, []) if row.mean_retention]
        return fmean(values) if values else None

    def third(self, name: str, part: int) -> float:
        """Mean over the first (0), middle (1) or last (2) third of the depth. Block 0 makes the stream: left out."""
        values = self.states["states"][name]
        size = len(values) // 3
        return fmean(values[max(1, part * size) : (part + 1) * size])

    def middle(self, name: str) -> float:
        """Mean over the boundary states that are neither embeddings nor the last."""
        return fmean(self.states["states"][name][1:-1])


def read(folder: Path) -> dict[str, Study]:
    """Label -> study, of every model that has both files."""
    found = {}
    for path in sorted(folder.glob("*.result.json")):
        label = path.name.removesuffix(".result.json")
        states = folder / f"{label}.states.json"
        if states.exists():
            found[label] = Study(label, sw.Result.load(path), json.loads(states.read_text(encoding="utf-8")))
    return found


def of_kind(studies: dict[str, Study], kind: str) -> list[Study]:
    """The seeds of one kind of model."""
    return [study for label, study in studies.items() if label.rpartition("-")[0] == kind]


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


def retention_over_seeds(studies: dict[str, Study]) -> str:
    """Method x k, mean and range over seeds, one table a kind."""
    parts = []
    methods = ("similarity", "window", "greedy", "greedy + linear stand-ins", "greedy + healing")
    for kind, name in KINDS.items():
        seeds = of_kind(studies, kind)
        if not seeds:
            continue
        ks = (2, 4, 5, 6, 8)
        rows = [[method, *(spread([study.kept(method, k) for study in seeds]) for k in ks)] for method in methods]
        parts.append(f"**{kind}** ({name}, {len(seeds)} seeds)\n\n" + table(["skipped of 24", *map(str, ks)], rows))
    return "\n\n".join(parts)


def retention_of_one(study: Study) -> str:
    """All plans of one model with confidence intervals."""
    rows = []
    for row in study.result.rows:
        if row.plan is None or row.method == "random":
            continue
        blocks = ", ".join(str(n) for numbers in row.plan.phases[0].skip.values() for n in numbers)
        cells = (f"{row.saved_block_flops:.1%}", f"{row.saved_all_in_flops:.1%}", shown(row.mean_retention), blocks)
        rows.append([row.method, str(row.k), *cells])
    for k, plans in study.rows("random").items():
        saved = (f"{plans[0].saved_block_flops:.1%}", f"{plans[0].saved_all_in_flops:.1%}")
        kept = spread([row.mean_retention.value for row in plans if row.mean_retention])
        rows.append([f"random, {len(plans)} plans, range", str(k), *saved, kept, ""])
    return table(["method", "k", "block FLOPs saved", "all-in saved", "retention (95%)", "blocks"], rows)


def paired(studies: dict[str, Study]) -> str:
    """Greedy against similarity: scores in pairs, and how far each moves the predictions."""
    rows = []
    for study in studies.values():
        for k in (3, 4, 5, 6, 8):
            greedy, similarity = study.row("greedy", k), study.row("similarity", k)
            if greedy is None or similarity is None:
                continue
            moved = {(e["method"], e["k"]): e for e in study.states["moved"]}
            ours, theirs = moved[("greedy", k)], moved[("similarity", k)]
            less = Interval(**ours["less_than_similarity"])
            exact = any(score.outcomes for score in greedy.scores.values())
            gain = shown(difference(greedy, similarity)) if exact else "-"
            saved = f"{greedy.saved_block_flops:.1%}"
            rows.append(
                [
                    study.label,
                    str(k),
                    saved,
                    gain,
                    f"{theirs['kl']['value']:.4f}",
                    f"{ours['kl']['value']:.4f}",
                    shown(less, 4),
                ]
            )
    head = [
        "model",
        "k",
        "saved",
        "greedy - similarity, exact match",
        "KL similarity",
        "KL greedy",
        "difference of KL (95%)",
    ]
    return table(head, rows)


def other_tasks(studies: dict[str, Study]) -> str:
    """Greedy calibrated on one task or on all others, judged on each task."""
    rows = []
    for study in studies.values():
        own = [row for row in study.result.rows if row.method.startswith(("greedy on", "greedy"))]
        tasks = [label for label in study.result.rows[0].scores if "(" not in label]
        k = next((row.k for row in own if " on " in row.method), None)
        for row in own:
            if row.k != k or "+" in row.method:
                continue
            cells = []
            for task in tasks:
                retention = row.scores[task].retention
                value = f"{retention.value:.3f}" if retention else "-"
                seen = task in row.method and "alone" in row.method
                unseen = row.method == f"greedy on all but {task}"
                cells.append(f"*{value}*" if seen else f"**{value}**" if unseen else value)
            rows.append([study.label, row.method if " on " in row.method else "greedy on all", str(k), *cells])
    if not rows:
        return ""
    width = max(len(row) for row in rows)
    parts = []
    for size in sorted({len(row) for row in rows}, reverse=True):
        chosen = [row for row in rows if len(row) == size]
        labels = {row[0] for row in chosen}
        tasks = [t for t in studies[next(iter(labels))].result.rows[0].scores if "(" not in t]
        parts.append(table(["model", "calibrated", "k", *tasks], chosen))
    del width
    return "\n\n".join(parts)


def depth(studies: dict[str, Study]) -> str:
    """States by depth: cosine of a block's input and output, with and without outliers, update norm, CKA."""
    rows = []
    for kind in KINDS:
        seeds = of_kind(studies, kind)
        for name in ("similarity", "similarity_without_outliers", "cka", "update_norm"):
            if seeds:
                rows.append([kind, name, *(spread([study.third(name, part) for study in seeds]) for part in (0, 1, 2))])
    if REAL in studies:
        rows += [
            [REAL, name, *(spread([studies[REAL].third(name, part)]) for part in (0, 1, 2))]
            for name in ("similarity", "similarity_without_outliers", "cka", "update_norm")
        ]
    return table(["model", "statistic of successive states", "first third", "middle third", "last third"], rows)


def recency(studies: dict[str, Study]) -> str:
    """Recency index of states and of attention, and how early the lens agrees."""
    rows = []
    for kind in KINDS:
        if seeds := of_kind(studies, kind):
            rows.append(_recency_row(kind, seeds))
    if REAL in studies:
        rows.append(_recency_row(REAL, [studies[REAL]]))
    return table(
        ["model", "recency of states", "recency of attention", "depth at which the lens agrees with 90%"], rows
    )


def _recency_row(name: str, seeds: list[Study]) -> list[str]:
    attention = [
        fmean(s.states["states"]["attention_recency"]) for s in seeds if "attention_recency" in s.states["states"]
    ]
    agreed = []
    for study in seeds:
        lens = study.states["states"].get("lens_agreement", [])
        agreed.append(next((i / (len(lens) - 1) for i, value in enumerate(lens) if value >= 0.9), None))
    return [name, spread([s.middle("recency") for s in seeds]), spread(list(attention)), spread(agreed, 2)]


def beside(studies: dict[str, Study]) -> str:
    """CKA of corresponding layers of two models."""
    groups: dict[str, list[list[float]]] = {}
    for label, study in studies.items():
        for other, values in study.states["beside"].items():
            pair = f"{label.rpartition('-')[0]} and {other.rpartition('-')[0]}"
            same = label.rpartition("-")[2] == other.rpartition("-")[2]
            groups.setdefault(pair + ("" if same else ", other seed"), []).append(values)
    rows = []
    for pair, runs in groups.items():
        thirds = [[fmean(v[1 + part * 8 : 9 + part * 8]) for v in runs] for part in range(3)]
        rows.append([pair, *(spread(list(values)) for values in thirds)])
    return table(["models", "first third", "middle third", "last third"], rows)


# A claim of the paper, and what is found here: (claim, verdict, evidence)
Verdict = tuple[str, str, str]
HOLDS, FAILS, UNTESTED = "holds", "does not hold at this scale", "not testable here"


def verdict(claim: str, holds: bool, evidence: str) -> Verdict:
    """A claim with what the numbers say."""
    return claim, HOLDS if holds else FAILS, evidence


def claims(studies: dict[str, Study]) -> list[Verdict]:
    """Every claim of the paper that a small model can speak about, and those that it cannot."""
    dllm, ar, child = (of_kind(studies, kind) for kind in KINDS)
    checks: list[Callable[[], Verdict]] = [
        lambda: _plateau(dllm, ar),
        lambda: _recency_claim(dllm, ar),
        lambda: _initialisation(studies, child, dllm, ar),
        lambda: _plateau_of_retention(dllm),
        lambda: _fragile(ar, studies.get(REAL)),
        lambda: _consecutive(dllm + ar + child),
        lambda: _like_its_parent(child, dllm, ar),
    ]
    found = [check() for check in checks]
    found.append(
        (
            "GSM8K, MATH500, HumanEval and MBPP scores of LLaDA-8B, Dream-7B and Qwen2.5-7B",
            UNTESTED,
            "needs their weights and a GPU; docs/reproduce.md has the commands and their cost",
        )
    )
    return found


def _plateau(dllm: list[Study], ar: list[Study]) -> Verdict:
    ours, theirs = ([s.third("similarity", 0) for s in group] for group in (dllm, ar))
    return verdict(
        "Native diffusion models have plateaus of near-identical early layers, autoregressive ones do not",
        min(ours) > max(theirs) and min(ours) > 0.98,
        f"cosine of successive states in the first third: diffusion {spread(ours)}, autoregressive {spread(theirs)}",
    )


def _recency_claim(dllm: list[Study], ar: list[Study]) -> Verdict:
    ours, theirs = ([s.middle("recency") for s in group] for group in (dllm, ar))
    return verdict(
        "Native diffusion models have less recency bias than autoregressive ones",
        max(ours) < min(theirs),
        f"recency of states: diffusion {spread(ours)}, autoregressive {spread(theirs)}",
    )


def _initialisation(studies: dict[str, Study], child: list[Study], dllm: list[Study], ar: list[Study]) -> Verdict:
    parent, native = [], []
    for study in child:
        seed = study.label.rpartition("-")[2]
        parent.append(fmean(study.states["beside"][f"tiny-ar-{seed}"][1:]))
        native.append(fmean(study.states["beside"][f"tiny-dllm-{seed}"][1:]))
    return verdict(
        "An AR-initialised diffusion model still represents text as its parent does (initialisation bias)",
        min(parent) > max(native),
        f"CKA of corresponding layers: with its parent {spread(parent)}, with the native model {spread(native)}",
    )


def _plateau_of_retention(dllm: list[Study]) -> Verdict:
    values = [study.kept("similarity", 5) for study in dllm]
    return verdict(
        "A native diffusion model keeps more than 90% with 18.75% of layer FLOPs skipped by similarity",
        all(value is not None and value > 0.9 for value in values),
        f"5 of 24 blocks (20.8%): {spread(values)}",
    )


def _fragile(ar: list[Study], real: Study | None) -> Verdict:
    values = [study.kept("similarity", 2) for study in ar]
    known = [value for value in values if value is not None]
    evidence = f"tiny-ar with 2 of 24 skipped keeps {spread(values)}"
    if real:
        evidence += f"; SmolLM2-135M with 2 of 30 keeps {spread([real.kept('similarity', 2)])} of its token accuracy"
    return verdict("Autoregressive models keep only 35 to 75% after 2 layers are skipped", max(known) < 0.75, evidence)


def _consecutive(all_studies: list[Study]) -> Verdict:
    together, apart = [], []
    for study in all_studies:
        near, far = study.kept("window", 6), study.kept("greedy", 6)
        if near is not None and far is not None:
            together.append(near)
            apart.append(far)
    return verdict(
        "Skipping consecutive layers hurts more than the same number spread out",
        all(a < b for a, b in zip(together, apart, strict=True)),
        f"6 of 24: the most alike window {spread(list(together))}, greedy {spread(list(apart))}; "
        f"the window is worse in {sum(a < b for a, b in zip(together, apart, strict=True))} of {len(apart)} models",
    )


def _like_its_parent(child: list[Study], dllm: list[Study], ar: list[Study]) -> Verdict:
    rows = {name: [s.kept("similarity", 6) for s in group] for name, group in (("a", child), ("d", dllm), ("r", ar))}
    means = {name: fmean([v for v in values if v is not None]) for name, values in rows.items()}
    return verdict(
        "The AR-initialised model tolerates skipping as its parent does, not as a native model does",
        abs(means["a"] - means["r"]) < abs(means["a"] - means["d"]),
        f"6 of 24 by similarity: child {spread(rows['a'])}, parent {spread(rows['r'])}, native {spread(rows['d'])}",
    )


def beyond(studies: dict[str, Study]) -> list[Verdict]:
    """What is ours: planners, stand-ins and healing at the paper's saving."""
    dllm = of_kind(studies, "tiny-dllm")
    every = [study for kind in KINDS for study in of_kind(studies, kind)]
    found = []
    for method in ("greedy + linear stand-ins", "greedy + healing"):
        rows = [row for study in dllm for plans in study.rows(method).values() for row in plans]
        enough = [row for row in rows if row.saved_block_flops >= 0.1875 and row.mean_retention]
        smallest = {}
        for study in dllm:
            own = [row for row in enough if row in [r for plans in study.rows(method).values() for r in plans]]
            if own:
                smallest[study.label] = min(own, key=lambda row: row.saved_block_flops)
        evidence = "; ".join(
            f"{label} at {row.saved_block_flops:.1%}: {shown(row.mean_retention)}" for label, row in smallest.items()
        )
        holds = bool(smallest) and all(r.mean_retention and r.mean_retention.low >= 0.9 for r in smallest.values())
        found.append(verdict(f"tiny-dllm keeps 90% at 18.75% of block FLOPs saved, {method}", holds, evidence))
    for k in (4, 5, 6, 8):
        wins, ties, losses = 0, 0, 0
        for study in every:
            a, b = study.row("greedy", k), study.row("similarity", k)
            if a is None or b is None:
                continue
            gain = difference(a, b)
            wins, losses = wins + (gain.low > 0), losses + (gain.high < 0)
            ties += gain.low <= 0 <= gain.high
        found.append(
            verdict(
                f"Greedy beats similarity in exact match with {k} of 24 blocks skipped ({k / 24:.1%})",
                wins > 0 and losses == 0 and wins >= ties,
                f"interval above zero in {wins} models, around it in {ties}, below it in {losses}",
            )
        )
        closer = [
            Interval(**entry["less_than_similarity"])
            for study in every
            for entry in study.states["moved"]
            if (entry["method"], entry["k"]) == ("greedy", k)
        ]
        found.append(
            verdict(
                f"Greedy moves the predictions on test texts less than similarity, {k} of 24",
                all(gain.low > 0 for gain in closer),
                f"KL is lower by {spread([gain.value for gain in closer], 4)} nats a token; interval above zero in "
                f"{sum(gain.low > 0 for gain in closer)} of {len(closer)} models",
            )
        )
    return found


def accuracy(studies: dict[str, Study]) -> str:
    """Scores of the whole models."""
    rows = []
    for study in studies.values():
        scores = {task: score for task, score in study.result.rows[0].scores.items() if "(" not in task}
        told = ", ".join(f"{task} {score.value.value:.3f}" for task, score in scores.items())
        rows.append([study.label, study.result.kind, str(next(iter(scores.values())).examples), told])
    return table(["model", "kind", "examples a task", "score of the whole model"], rows)


def page(studies: dict[str, Study]) -> str:
    """The whole page."""
    template = (Path(__file__).parent / "p1.md.in").read_text(encoding="utf-8")
    found = {
        "accuracy": accuracy(studies),
        "claims": table(["claim of the paper", "here", "what was found"], claims(studies)),
        "beyond": table(["beyond the paper", "here", "what was found"], beyond(studies)),
        "depth": depth(studies),
        "recency": recency(studies),
        "beside": beside(studies),
        "seeds": retention_over_seeds(studies),
        "paired": paired(studies),
        "other_tasks": other_tasks(studies),
        "singles": "\n\n".join(
            f"### {label}\n\n{retention_of_one(study)}"
            for label, study in studies.items()
            if label.endswith("-0") or label == REAL
        ),
    }
    for name, text in found.items():
        template = template.replace("{{" + name + "}}", text)
    return template


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    given = parser.parse_args()
    write_atomically(given.page, page(read(given.results)))


if __name__ == "__main__":
    main()
