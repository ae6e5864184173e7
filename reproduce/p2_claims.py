"""What of paper 2 holds at this scale, and what is ours beyond it: each claim's verdict follows from the numbers."""

from collections.abc import Sequence
from statistics import fmean

from p2_results import SELF, STATIC, WRITING, Found, Pair, Solver, at_least, best, named, ratio, whole
from pages import HOLDS, UNTESTED, Verdict, of_gains, shown, spread, verdict

from skipwise.evaluation import Interval, Row, difference, perplexity_ratio
from skipwise.scheduling.importance import Curve, widths

MODEST = 1.1  # a modest loss: the perplexity rises by a tenth at most
SAVED = (0.167, 0.208, 0.25, 0.333)  # of all-in FLOPs: 4, 5, 6 and 8 of 24 blocks
EQUAL = 0.002  # savings that differ by less are equal
LENIENT = 0.03  # what others may save less and still be compared with
OTHERS = ("first", "last", "middle", "spread")


def claims(found: Found) -> list[Verdict]:
    """Every claim of the paper."""
    pairs = found.pairs
    made = []
    if pairs:
        made = [
            _hump(pairs, "kl", "KL(heavy, light)"),
            _hump(pairs, "loss_gap", "The difference of the losses"),
            _sandwich_best(pairs),
            _saving(pairs),
            _diversity(pairs),
            _prefix(pairs),
        ]
        made += _searched(found)
    large = "Generative perplexity under GPT-2 large on OpenWebText and LM1B at L=1024, T=1000"
    made.append((large, UNTESTED, "needs the official weights and a GPU; docs/reproduce.md has the commands"))
    return made


def _hump(pairs: Sequence[Pair], curve: Curve, what: str) -> Verdict:
    """The middle third is above both others, intervals and all."""
    thirds = [[_third(pair, part, curve) for pair in pairs] for part in range(3)]
    holds = all(max(early.high, late.high) < middle.low for early, middle, late in zip(*thirds, strict=True))
    names = ("early", "middle", "late")
    parts = (f"{name} {', '.join(map(shown, values))}" for name, values in zip(names, thirds, strict=True))
    claim = f"{what} is largest in the middle of the trajectory"
    return verdict(claim, holds, f"nats a token: {'; '.join(parts)}", len(pairs))


def _third(pair: Pair, part: int, curve: Curve) -> Interval:
    """The total of a third of the trajectory; its bins are independent, so that their squares add up."""
    importance, begin, end = pair.importance, part / 3, (part + 1) / 3
    bins = list(zip(widths(importance.bins, begin, end), getattr(importance.token, curve), strict=True))
    value = importance.total(begin, end, curve)
    low = sum((width * (one.value - one.low)) ** 2 for width, one in bins) ** 0.5
    high = sum((width * (one.high - one.value)) ** 2 for width, one in bins) ** 0.5
    return Interval(value=value, low=value - low, high=value + high)


def _sandwich_best(pairs: Sequence[Pair]) -> Verdict:
    better = {other: [ratio(p.placements, "sandwich", other) for p in pairs] for other in OTHERS}
    holds = all(one.high < 1 for ratios in better.values() for one in ratios)
    parts = "; ".join(f"to {other} {', '.join(shown(one) for one in ratios)}" for other, ratios in better.items())
    claim = "At 25% light steps the sandwich is the best placement"
    return verdict(claim, holds, f"perplexity of the sandwich in relation {parts}", len(pairs))


def _saving(pairs: Sequence[Pair]) -> Verdict:
    ratios = [ratio(p.placements, "sandwich") for p in pairs]
    rows = [named(p.placements, "sandwich") for p in pairs]
    block, all_in = (fmean(getattr(row, f"saved_{what}_flops") for row in rows) for what in ("block", "all_in"))
    light = [ratio(p.placements, "all light") for p in pairs]
    evidence = (
        f"saves {block:.1%} of block FLOPs, {all_in:.1%} all-in; perplexity in relation to the heavy model "
        f"{', '.join(map(shown, ratios))}; the light model alone: {', '.join(map(shown, light))}"
    )
    claim = "Sandwich, 25% light steps: 16.7% of block FLOPs saved at a modest loss of perplexity (a tenth at most)"
    return verdict(claim, all(one.high < MODEST for one in ratios), evidence, len(pairs))


def _diversity(pairs: Sequence[Pair]) -> Verdict:
    label = f"{WRITING} (token entropy)"
    changes = [
        named(p.placements, "sandwich").scores[label].value.value - whole(p.placements).scores[label].value.value
        for p in pairs
    ]
    evidence = f"change of the token entropy of a sample, nats: {spread(list(changes))}"
    claim = "The sandwich keeps the diversity (token entropy within 0.1 nats)"
    return verdict(claim, all(abs(change) < 0.1 for change in changes), evidence, len(pairs))


def _prefix(pairs: Sequence[Pair]) -> Verdict:
    ratios = [ratio(p.prefix, "sandwich") for p in pairs]
    light = [ratio(p.prefix, "all light") for p in pairs]
    evidence = f"in relation to the heavy model: sandwich {', '.join(map(shown, ratios))}; light alone "
    evidence += ", ".join(map(shown, light))
    claim = "Continuing a given prefix, the sandwich loses modestly too (a tenth at most)"
    return verdict(claim, all(one.high < MODEST for one in ratios), evidence, len(pairs))


def _searched(found: Found) -> list[Verdict]:
    if found.search is None or found.search_result is None:
        return []
    best_found = found.search["rows"][0]
    ranks = {row["segments"]: row["rank"] for row in found.search["rows"]}
    segments = len(best_found["segments"])
    sandwich = "L" + "H" * (segments - 2) + "L"
    evidence = (
        f"of {len(ranks)} schedules with two of {segments} segments light {best_found['segments']} came first, the "
        f"sandwich {sandwich} is number {ranks[sandwich]}; best five: {', '.join(list(ranks)[:5])}"
    )
    claim = "The exhaustive search puts light segments at both ends"
    ends = best_found["segments"]
    return [verdict(claim, ends[0] == ends[-1] == "L", evidence, 1)]


def beyond(found: Found) -> list[Verdict]:
    """What skipwise adds: the model as its own light model."""
    made: list[Verdict] = []
    if found.solvers:
        for methods, what in _RIVALS:
            made += [_above(found.solvers, saved, methods, what) for saved in SAVED]
        made.append(_target(found.solvers))
        made.append(_light_is_enough(found.solvers))
    if found.pairs:
        made += [_text(found.pairs, methods, what) for methods, what in _RIVALS]
        made.append(_text_target(found.pairs))
    return made


_RIVALS = ((STATIC, "the best static skip"), (("light ",), "the best placement of the trained light model"))


def _above(solvers: Sequence[Solver], saved: float, methods: Sequence[str], what: str) -> Verdict:
    """Self-scheduled plans that save so much, in pairs with the best of others that save so much or a little less."""
    claim = f"Exact tasks: self-scheduling lies above {what} at {saved:.1%} of all-in FLOPs saved or more"
    gains, kept = [], []
    for solver in solvers:
        ours, theirs = best(solver.front, SELF, saved - EQUAL), best(solver.front, methods, saved - LENIENT)
        if ours is None or theirs is None:
            return verdict(claim, False, "not all were found", len(solvers))
        gains.append(difference(ours, theirs))
        kept.append((_kept(ours), _kept(theirs)))
    _, said, evidence = of_gains(claim, gains, "mean gain in exact match", 3)
    evidence = f"keeps {spread([a for a, _ in kept])} against {spread([b for _, b in kept])}; {evidence}"
    return verdict(claim, said == HOLDS, evidence, len(solvers))


def _kept(row: Row) -> float:
    return row.mean_retention.value if row.mean_retention else 0.0


def _target(solvers: Sequence[Solver]) -> Verdict:
    """25% of all-in FLOPs at 95% of the score, by the lower end of the interval."""
    rows = [best(solver.front, SELF, 0.25) for solver in solvers]
    known = [row for row in rows if row is not None and row.mean_retention]
    holds = len(known) == len(solvers) and all(row.mean_retention.low >= 0.95 for row in known if row.mean_retention)
    parts = [f"{row.saved_all_in_flops:.1%} saved: {shown(row.mean_retention)}" for row in known]
    most = []
    for solver in solvers:
        safe = [row for row in _selfs(solver) if row.mean_retention and row.mean_retention.low >= 0.95]
        most.append(max((row.saved_all_in_flops for row in safe), default=0.0))
    evidence = f"{'; '.join(parts)}; the most that is saved at 95% or more: {', '.join(f'{one:.1%}' for one in most)}"
    claim = "Exact tasks: self-scheduling saves 25% of all-in FLOPs or more and keeps 95%"
    return verdict(claim, holds, evidence, len(solvers))


def _selfs(solver: Solver) -> list[Row]:
    return [row for row in at_least(solver.front.rows, 0.0) if row.method in SELF]


def _light_is_enough(solvers: Sequence[Solver]) -> Verdict:
    """Whether the trained light model makes scheduling pointless."""
    rows = [named(solver.placements, "all light") for solver in solvers]
    saved = fmean(row.saved_all_in_flops for row in rows)
    evidence = f"alone it keeps {spread([_kept(row) for row in rows])} and saves {saved:.0%} of all-in FLOPs"
    claim = "Exact tasks: the light model alone does not keep 95%, so that there is something to schedule"
    return verdict(claim, all(_kept(row) < 0.95 for row in rows), evidence, len(solvers))


def _text(pairs: Sequence[Pair], methods: Sequence[str], what: str) -> Verdict:
    saved, ratios = 0.17, []
    claim = f"English: self-scheduling lies above {what} at {saved:.0%} of all-in FLOPs saved or more"
    for pair in pairs:
        ours, theirs = best(pair.front, SELF, saved - EQUAL), best(pair.front, methods, saved - LENIENT)
        if ours is None or theirs is None:
            return verdict(claim, False, "not all were found", len(pairs))
        ratios.append((ours, theirs))
    found = [perplexity_ratio(ours, theirs, WRITING) for ours, theirs in ratios]
    evidence = f"perplexity in relation to theirs {', '.join(map(shown, found))}; keeps "
    evidence += f"{spread([_kept(a) for a, _ in ratios])} against {spread([_kept(b) for _, b in ratios])}"
    return verdict(claim, all(one.high < 1 for one in found), evidence, len(pairs))


def _text_target(pairs: Sequence[Pair]) -> Verdict:
    rows = [best(pair.front, SELF, 0.24) for pair in pairs]
    known = [row for row in rows if row is not None and row.mean_retention]
    holds = len(known) == len(pairs) and all(row.mean_retention.low >= 0.95 for row in known if row.mean_retention)
    evidence = "; ".join(f"{row.saved_all_in_flops:.1%} saved: {shown(row.mean_retention)}" for row in known)
    return verdict(
        "English: self-scheduling saves 24% of all-in FLOPs or more and keeps 95%",
        holds,
        evidence,
        len(pairs),
    )
