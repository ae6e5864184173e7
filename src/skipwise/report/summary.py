"""What the numbers say, in plain words. Each rule is a small pure function; none of them flatters."""

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from skipwise.analysis.record import Analysis
from skipwise.evaluation.result import Interval, Result
from skipwise.report.rows import Point, methods, of_method, percent, points, spread, whole_row

# A block is called redundant when the stream after it points almost where it pointed before (cosine).
REDUNDANT = 0.98
KEEP = 0.9  # the papers' bar: nine tenths of the score


def baseline(result: Result) -> str:
    """What the whole model scores."""
    parts = []
    for task, score in whole_row(result).scores.items():
        shown = f"{score.value.value:.4g}" if score.metric == "perplexity" else percent(score.value.value)
        parts.append(f"{task} {shown} ({score.metric}, {score.examples} examples)")
    return f"Without a plan {result.name} scores: " + "; ".join(parts) + "."


def kept(result: Result, method: str) -> str:
    """How much of the score a method keeps, by number of skipped blocks."""
    found = of_method(result, method)
    parts = [f"k = {k}: {spread(point.retention)}" for k, point in found.items()]
    plans = max(len(point.rows) for point in found.values())
    how = "95% bootstrap interval" if plans == 1 else f"mean of {plans} plans, lowest and highest"
    return f"Retention with k blocks skipped by {method} ({how}): " + "; ".join(parts) + "."


def verdict(a: Point, control: Point) -> str:
    """Whether one plan is better than the control plans of the same k: only where their intervals separate."""
    mine, other = _certain(a), _certain(control)
    if mine.low > other.high:
        return "better"
    return "worse" if mine.high < other.low else "no different"


def _certain(point: Point) -> Interval:
    """From the lowest to the highest bound of any of the point's plans: error of measurement and choice of plan."""
    bounds = [row.mean_retention for row in point.rows if row.mean_retention]
    value = fmean(interval.value for interval in bounds)
    return Interval(value=value, low=min(i.low for i in bounds), high=max(i.high for i in bounds))


def against_random(result: Result, method: str) -> str:
    """Whether a method beats the random control, k by k."""
    mine, control = of_method(result, method), of_method(result, "random")
    shared = [k for k in mine if k in control]
    if not shared:
        return f"There is no random control for {method}, so nothing can be said of whether it chooses well."
    verdicts = {k: verdict(mine[k], control[k]) for k in shared}
    by = {word: [k for k in shared if verdicts[k] == word] for word in ("better", "worse", "no different")}
    if len(by["no different"]) == len(shared):
        return f"Choosing by {method} is no better than random, within the error, at any k tried."
    parts = [f"{word} than random at k = {_listed(ks)}" for word, ks in by.items() if ks and word != "no different"]
    if by["no different"]:
        parts.append(f"no different from random, within the error, at k = {_listed(by['no different'])}")
    return f"Choosing by {method} is " + ", ".join(parts) + "."


def _listed(ks: Sequence[int]) -> str:
    return ", ".join(map(str, ks))


def largest_saving(result: Result) -> str:
    """The largest saving among the plans tried that keeps nine tenths of the score, by the lower bound."""
    safe = [row for row in result.rows if row.mean_retention and row.mean_retention.low >= KEEP]
    if not any(row.mean_retention for row in result.rows):
        return "No retention was measured."
    if not safe:
        return "None of the plans tried keeps 90% of the score with certainty (lower end of the interval)."
    best = max(safe, key=lambda row: row.saved_block_flops)
    return (
        f"The largest saving that keeps 90% of the score (lower end of the interval) is {percent(best.saved_block_flops)} "
        f"of block FLOPs, {percent(best.saved_all_in_flops)} all-in: {best.method}, k = {best.k}, "
        f"retention {spread(best.mean_retention)}."
    )


def redundancy(analysis: Analysis) -> str:
    """Where the redundant blocks are, and whether they form the early plateau that the paper reports for dLLMs."""
    stack = max(analysis.model.stacks, key=lambda name: (f"{name}/similarity" in analysis.tensors, analysis.model.stacks[name]))
    similarity = analysis.successive_similarity(stack)
    redundant = [i for i, value in enumerate(similarity.tolist()) if value >= REDUNDANT]
    text = f"In {analysis.name}, {len(redundant)} of {len(similarity)} blocks leave the stream's direction nearly as it was "
    text += f"(cosine >= {REDUNDANT}); the mean cosine is {float(similarity.mean()):.3f}"
    if not redundant:
        return text + "."
    return text + f", and {_plateau(similarity)}."


def _plateau(similarity: Tensor) -> str:
    n = len(similarity)
    thirds = [similarity[: n // 3], similarity[n // 3 : n - n // 3], similarity[n - n // 3 :]]
    shares = [float((third >= REDUNDANT).float().mean()) for third in thirds]
    words = ", ".join(f"{percent(share, 0)} of the {which}" for share, which in zip(shares, ("first", "middle", "last"), strict=True))
    return f"they are {words} third of the depth"


def early_plateau(analysis: Analysis) -> bool:
    """Whether more than half of the first third of the blocks are redundant, and no later third has a larger share."""
    stack = max(analysis.model.stacks, key=lambda name: analysis.model.stacks[name])
    similarity = analysis.successive_similarity(stack) >= REDUNDANT
    n = len(similarity)
    shares = [float(part.float().mean()) for part in (similarity[: n // 3], similarity[n // 3 : n - n // 3], similarity[n - n // 3 :])]
    return shares[0] > 0.5 and shares[0] >= max(shares)


def papers_finding(analyses: Sequence[Analysis]) -> str | None:
    """Whether 'diffusion models have an early plateau of redundant blocks, autoregressive ones do not' shows here."""
    diffusion = [a for a in analyses if a.kind == "masked diffusion"]
    autoregressive = [a for a in analyses if a.kind == "autoregressive"]
    if not diffusion or not autoregressive:
        return None
    shows = all(map(early_plateau, diffusion)) and not any(map(early_plateau, autoregressive))
    text = "The paper's finding, an early plateau of redundant blocks in native diffusion models and none in autoregressive ones, "
    return text + ("shows in these models." if shows else "does not show in these models.")


CAVEAT = (
    "These are statements about the models on this page, one trained model each, not about kinds of models: that takes "
    "several seeds of every kind."
)


def summarize(results: Sequence[Result], analyses: Sequence[Analysis]) -> list[tuple[str, list[str]]]:
    """(heading, sentences): one group a model, then what concerns all of them."""
    groups = []
    for result in results:
        sentences = [baseline(result)]
        tried = [method for method in methods(result) if of_method(result, method)]
        sentences += [kept(result, method) for method in tried]
        sentences += [against_random(result, method) for method in tried if method != "random"]
        if points(result):
            sentences.append(largest_saving(result))
        sentences += [redundancy(a) for a in analyses if a.name == result.name]
        groups.append((result.name, sentences))
    finding = papers_finding(analyses)
    groups.append(("All models", ([finding] if finding else []) + [CAVEAT]))
    return groups
