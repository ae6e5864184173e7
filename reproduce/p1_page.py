"""docs/results/p1.md from the Results and states in a folder; it computes no score of its own.

python reproduce/p1_page.py docs/results/p1 --page docs/results/p1.md
"""

from statistics import fmean

from p1_claims import beyond, claims
from p1_results import KINDS, REAL, Study, of_kind, read
from pages import filled, shown, spread, table, write_page

from skipwise.evaluation import Interval, Row, difference


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
    """Greedy calibrated on one task or on all others, judged on each task; a table for each set of tasks."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for study in studies.values():
        tasks = tuple(label for label in study.result.rows[0].scores if "(" not in label)
        single = [row for row in study.result.rows if row.method.startswith("greedy on ")]
        for row in [study.row("greedy", single[0].k), *single] if single else []:
            if row is not None:
                name = row.method if " on " in row.method else "greedy on all"
                cells = [_marked(row, task) for task in tasks]
                tables.setdefault(tasks, []).append([study.label, name, str(row.k), *cells])
    return "\n\n".join(table(["model", "calibrated", "k", *tasks], rows) for tasks, rows in tables.items())


def _marked(row: Row, task: str) -> str:
    """Retention on a task: italic for the one the plan was calibrated on, bold for one it was not shown."""
    retention = row.scores[task].retention
    value = f"{retention.value:.3f}" if retention else "-"
    if row.method == f"greedy on {task} alone":
        return f"*{value}*"
    unseen = row.method == f"greedy on all but {task}" or row.method.endswith(" alone")
    return f"**{value}**" if unseen else value


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
    parts = {
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
    return filled("p1.md.in", parts)


if __name__ == "__main__":
    write_page(__doc__, lambda folder: page(read(folder)))
