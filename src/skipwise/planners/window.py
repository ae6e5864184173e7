"""Skip one run of consecutive blocks: the run whose input and output are most alike.

Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), which compares the
states n blocks apart; the control for the finding of "Skip to the Good Part" that spread skips hurt less.
"""

from skipwise.analysis.record import Analysis
from skipwise.planners.base import Allowance, Choice, planner


@planner("window")
def best_window(analysis: Analysis, stack: str, allowance: Allowance) -> Choice:
    """Of the longest runs that are allowed, the one over which the mean cosine is highest."""
    similarity = analysis.tensors[f"{stack}/similarity"]
    length = analysis.model.stacks[stack]
    runs = [range(a, b) for a in range(length) for b in range(a + 1, length + 1) if allowance.holds(range(a, b))]
    longest = max((len(run) for run in runs), default=0)
    scores = {run.start: float(similarity[run.start, run.stop]) for run in runs if len(run) == longest}
    if not scores:
        return Choice(())
    start = max(scores, key=lambda start: (scores[start], -start))
    return Choice(tuple(range(start, start + longest)), {"window_similarity": list(scores.values())})
