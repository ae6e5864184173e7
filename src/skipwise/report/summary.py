"""What the numbers say, in plain words. Each rule is a small pure function; none of them flatters."""

from collections.abc import Sequence

from torch import Tensor

from skipwise.analysis.record import Analysis
from skipwise.evaluation.result import Interval, Result
from skipwise.report.rows import Point, methods, of_method, percent, points, spread, whole_row

# A block is called redundant when the stream after it points almost where it pointed before (cosine).
REDUNDANT = 0.98
SURE = 0.95  # what a schedule is to keep
KEEP = 0.9  # the papers' bar: nine tenths of the score


def baseline(result: Result) -> str:
    """What the whole model scores."""
    parts = []
    for task, score in whole_row(result).scores.items():
        shown = percent(score.value.value) if score.is_fraction else f"{score.value.value:.4g}"
        parts.append(f"{task} {shown} ({score.metric}, {score.examples} examples)")
    return f"Without a plan {result.name} scores: " + "; ".join(parts) + "."


def kept(result: Result, method: str) -> str:
    """How much of the score a method keeps, by number of skipped blocks."""
    found = of_method(result, method)
    parts = [f"k = {k}: {spread(point.retention)}" for k, point in found.items()]
    plans = max(len(point.rows) for point in found.values())
    how = "95% bootstrap interval" if plans == 1 else f"mean of {plans} plans, lowest and highest"
    return f"Retention with k blocks skipped by {method} ({how}): " + "; ".join(parts) + "."


def verdict(plan: Interval, control: Interval) -> str:
    """Whether a retention is better than another: only where their intervals separate."""
    if plan.low > control.high:
        return "better"
    return "worse" if plan.high < control.low else "no different"


def against_random(result: Result, method: str) -> str:
    """Whether a method beats the random plans of the same k: where it does so against more than half of them."""
    mine, control = of_method(result, method), of_method(result, "random")
    counts = {k: _verdicts(mine[k], control[k]) for k in mine if k in control}
    if not counts:
        return f"There is no random control for {method}, so nothing can be said of whether it chooses well."
    shown = [f"k = {k}: {c.count('better')} of {len(c)} beaten, {c.count('worse')} better" for k, c in counts.items()]
    detail = f" (random plans with an interval apart from that of {method}: {'; '.join(shown)})."
    better = [k for k, c in counts.items() if c.count("better") * 2 > len(c)]
    worse = [k for k, c in counts.items() if c.count("worse") * 2 > len(c)]
    if not better and not worse:
        return f"Choosing by {method} is no better than random at any k tried{detail}"
    level = [k for k in counts if k not in better and k not in worse]
    said = (("better than", better), ("worse than", worse), ("no different from", level))
    parts = [f"{word} most random plans at k = {_listed(ks)}" for word, ks in said if ks]
    return f"Choosing by {method} is {', '.join(parts)}{detail}"


def _verdicts(plan: Point, control: Point) -> list[str]:
    """The verdict of a method's plan against each random plan of the same k."""
    mine = plan.retention
    return [verdict(mine, row.mean_retention) for row in control.rows if mine and row.mean_retention]


def _listed(ks: Sequence[int]) -> str:
    return ", ".join(map(str, ks))


def largest_saving(result: Result) -> str:
    """The largest saving among the chosen plans that keeps nine tenths of the score, by the lower bound.

    Random plans are left out: the best of them is known only after the test.
    """
    chosen = [row for row in result.rows if row.mean_retention and row.method != "random"]
    if not chosen:
        return "No retention of a chosen plan was measured."
    safe = [row for row in chosen if row.mean_retention and row.mean_retention.low >= KEEP]
    if not safe:
        return "None of the plans tried keeps 90% of the score with certainty (lower end of the interval)."
    best = max(safe, key=lambda row: row.saved_block_flops)
    return (
        f"The largest saving that keeps 90% of the score (lower end of the interval) is "
        f"{percent(best.saved_block_flops)} of block FLOPs, {percent(best.saved_all_in_flops)} all-in: "
        f"{best.method}, k = {best.k}, retention {spread(best.mean_retention)}."
    )


def schedules(result: Result) -> list[str]:
    """For plans that change along the trajectory: what each kind can save and still keep, and whether one kind wins."""
    rows = [row for row in result.rows if row.plan is not None and row.mean_retention]
    sentences = []
    for method in dict.fromkeys(row.method for row in rows):
        safe = [row for row in rows if row.method == method and row.mean_retention and row.mean_retention.low >= SURE]
        if not safe:
            sentences.append(f"{method}: none of its plans keeps 95% of the score (lower end of the interval).")
            continue
        best = max(safe, key=lambda row: row.saved_all_in_flops)
        sentences.append(
            f"{method}: saves up to {percent(best.saved_all_in_flops)} of all-in FLOPs with 95% of the score kept "
            f"(lower end of the interval); there it keeps {spread(best.mean_retention)}."
        )
    return sentences


def redundancy(analysis: Analysis) -> str:
    """Where the redundant blocks are, and whether they form the early plateau that the paper reports for dLLMs."""
    similarity = analysis.successive_similarity(analysis.main_stack)
    redundant = [i for i, value in enumerate(similarity.tolist()) if value >= REDUNDANT]
    text = (
        f"In {analysis.name}, {len(redundant)} of {len(similarity)} blocks leave the stream's direction nearly as it "
    )
    text += f"was (cosine >= {REDUNDANT}); the mean cosine is {float(similarity.mean()):.3f}"
    if not redundant:
        return text + "."
    return text + f", and {_plateau(similarity)}."


def _plateau(similarity: Tensor) -> str:
    named = zip(_shares(similarity), ("first", "middle", "last"), strict=True)
    return f"they are {', '.join(f'{percent(share, 0)} of the {which}' for share, which in named)} third of the depth"


def _shares(similarity: Tensor) -> list[float]:
    """The share of redundant blocks in each third of the depth."""
    n = len(similarity)
    thirds = (similarity[: n // 3], similarity[n // 3 : n - n // 3], similarity[n - n // 3 :])
    return [float((third >= REDUNDANT).float().mean()) for third in thirds]


def early_plateau(analysis: Analysis) -> bool:
    """Whether more than half of the first third of the blocks are redundant, and no later third has a larger share."""
    shares = _shares(analysis.successive_similarity(analysis.main_stack))
    return shares[0] > 0.5 and shares[0] >= max(shares)


def papers_finding(analyses: Sequence[Analysis]) -> str | None:
    """Whether 'diffusion models have an early plateau of redundant blocks, autoregressive ones do not' shows here."""
    diffusion = [a for a in analyses if a.kind == "masked diffusion"]
    autoregressive = [a for a in analyses if a.kind == "autoregressive"]
    if not diffusion or not autoregressive:
        return None
    shows = all(map(early_plateau, diffusion)) and not any(map(early_plateau, autoregressive))
    text = "The paper's finding, an early plateau of redundant blocks in native diffusion models and none in "
    return text + "autoregressive ones, " + ("shows in these models." if shows else "does not show in these models.")


CAVEAT = (
    "These are statements about the models on this page, one trained model each, not about kinds of models: that takes "
    "several seeds of every kind."
)


def summarize(results: Sequence[Result], analyses: Sequence[Analysis]) -> list[tuple[str, list[str]]]:
    """(heading, sentences): one group a model, then what concerns all of them."""
    groups = []
    layered = [analysis for analysis in analyses if analysis.get(analysis.main_stack, "similarity") is not None]
    for result in results:
        if any(row.plan is not None and not row.plan.is_static for row in result.rows):
            groups.append((result.name, [baseline(result), *schedules(result)]))
            continue
        sentences = [baseline(result)]
        tried = [method for method in methods(result) if of_method(result, method)]
        sentences += [kept(result, method) for method in tried]
        sentences += [against_random(result, method) for method in tried if method != "random"]
        if points(result):
            sentences.append(largest_saving(result))
        sentences += dict.fromkeys(redundancy(a) for a in layered if a.name == result.name)
        groups.append((result.name, sentences))
    finding = papers_finding(layered)
    groups.append(("All models", ([finding] if finding else []) + [CAVEAT]))
    return groups
