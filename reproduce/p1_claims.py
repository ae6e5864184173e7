"""What of paper 1 holds at this scale, and what is ours beyond it: each claim's verdict follows from the numbers."""

from collections.abc import Callable
from statistics import fmean

from p1_results import KINDS, REAL, Study, of_kind
from pages import UNTESTED, Verdict, of_gains, shown, spread, verdict

from skipwise.evaluation import Interval, Row, difference


def claims(studies: dict[str, Study]) -> list[Verdict]:
    """Every claim of the paper that a small model can speak about, and those that it cannot."""
    dllm, ar, child = (of_kind(studies, kind) for kind in KINDS)
    checks: list[Callable[[], Verdict]] = [
        lambda: _plateau(dllm, ar),
        lambda: _recency_claim(dllm, ar, child, "recency", "states"),
        lambda: _recency_claim(dllm, ar, child, "attention_recency", "attention"),
        lambda: _initialisation(child, ar),
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


def _recency_claim(dllm: list[Study], ar: list[Study], child: list[Study], name: str, where: str) -> Verdict:
    """The paper does not say how it measures recency: by our index of states, and by that of attention."""
    groups = (dllm, ar, child)
    ours, theirs, initialised = ([fmean(s.states["states"][name][1:-1]) for s in group] for group in groups)
    return verdict(
        f"Native diffusion models have less recency bias than autoregressive ones (index of {where})",
        max(ours) < min(theirs),
        f"diffusion {spread(ours)}, autoregressive {spread(theirs)}, AR-initialised {spread(initialised)}",
    )


def _initialisation(child: list[Study], ar: list[Study]) -> Verdict:
    found: dict[str, list[float]] = {"parent": [], "native": [], "strangers": []}
    for study in child:
        for other, values in study.states["beside"].items():
            found["parent" if other.startswith("tiny-ar-") else "native"].append(fmean(values[1:]))
    for study in ar:
        found["strangers"] += [fmean(values[1:]) for values in study.states["beside"].values()]
    return verdict(
        "An AR-initialised diffusion model still represents text as its parent does (initialisation bias)",
        min(found["parent"]) > max(found["native"]),
        f"CKA of corresponding layers: with its parent {spread(list(found['parent']))}, with the native model of the "
        f"same seed {spread(list(found['native']))}; but two autoregressive models of other seeds have "
        f"{spread(list(found['strangers']))} already: it stays autoregressive, hardly more its own parent's child",
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


def _consecutive(every: list[Study]) -> Verdict:
    """Spread out in two ways: the blocks that greedy finds, and the most alike ones of which no two are neighbours."""
    together, greedy = ([study.kept(method, 6) for study in every] for method in ("window", "greedy"))
    apart = [(study.kept("window", 6), study.kept("similarity, no neighbours", 6)) for study in every]
    pairs = [(near, far) for near, far in apart if near is not None and far is not None]
    worse = sum((near or 0) < (far or 0) for near, far in zip(together, greedy, strict=True))
    worse_too = sum(near < far for near, far in pairs)
    return verdict(
        "Skipping consecutive layers hurts more than the same number spread out",
        worse == len(every) and worse_too == len(pairs),
        f"6 of 24: the most alike window {spread(together)}; spread out by greedy {spread(greedy)}, better in {worse} "
        f"of {len(every)}; spread out as the most alike blocks of which no two are neighbours "
        f"{spread([far for _, far in pairs])}, better in {worse_too} of {len(pairs)}: which blocks matters more",
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
    found = [_at_the_papers_saving(dllm, method) for method in ("greedy + linear stand-ins", "greedy + healing")]
    stand_ins = " + linear stand-ins"
    found.append(_scores_more(every, "greedy" + stand_ins, "similarity" + stand_ins, 5))
    for k in (4, 5, 6, 8):
        found += [_scores_more(every, "greedy", "similarity", k), _greedy_moves_less(every, k)]
    return found


def _at_the_papers_saving(dllm: list[Study], method: str) -> Verdict:
    """The smallest plan of each seed that saves what the paper saves, held against 90%."""
    smallest: dict[str, Row] = {}
    for study in dllm:
        rows = [row for plans in study.rows(method).values() for row in plans if row.saved_block_flops >= 0.1875]
        if rows:
            smallest[study.label] = min(rows, key=lambda row: row.saved_block_flops)
    evidence = "; ".join(
        f"{label} at {row.saved_block_flops:.1%}: {shown(row.mean_retention)}" for label, row in smallest.items()
    )
    holds = bool(smallest) and all(r.mean_retention and r.mean_retention.low >= 0.9 for r in smallest.values())
    return verdict(f"tiny-dllm keeps 90% at 18.75% of block FLOPs saved or more, {method}", holds, evidence)


def _scores_more(every: list[Study], first: str, second: str, k: int) -> Verdict:
    pairs = [(study.row(first, k), study.row(second, k)) for study in every]
    rows = [(a, b) for a, b in pairs if a and b]
    saved = fmean([a.saved_block_flops for a, _ in rows] or [k / 24])
    claim = f"{first[0].upper()}{first[1:]} beats {second} in exact match, {k} of 24 ({saved:.1%} of block FLOPs saved)"
    return of_gains(claim, [difference(a, b) for a, b in rows], "mean gain", 3)


def _greedy_moves_less(every: list[Study], k: int) -> Verdict:
    gains = [
        Interval(**entry["less_than_similarity"])
        for study in every
        for entry in study.states["moved"]
        if (entry["method"], entry["k"]) == ("greedy", k)
    ]
    claim = f"Greedy moves the predictions on test texts less than similarity does, {k} of 24"
    return of_gains(claim, gains, "KL is lower, in nats a token, by", 4)
