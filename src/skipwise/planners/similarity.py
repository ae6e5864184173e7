"""Skip the blocks whose input and output point the same way.

Source: "Skip to the Good Part" (arXiv 2603.07475): blocks are ranked once by the cosine similarity of the hidden state
before and after them, averaged over tokens and denoising steps; the most similar are skipped. The paper finds that
consecutive skips hurt more than spread ones, hence the option to forbid neighbours.
"""

from skipwise.analysis.record import Analysis
from skipwise.planners.base import Allowance, Choice, planner


@planner("similarity")
def by_similarity(analysis: Analysis, stack: str, allowance: Allowance, forbid_neighbours: bool = False) -> Choice:
    """Highest successive similarity first; with `forbid_neighbours`, never two adjacent blocks."""
    similarity = analysis.successive_similarity(stack)
    ranked = sorted(range(len(similarity)), key=lambda block: (-float(similarity[block]), block))
    order: list[int] = []
    for block in ranked:
        if not forbid_neighbours or not {block - 1, block + 1} & set(order):
            order.append(block)
    return Choice(allowance.take(order), {"successive_similarity": similarity.tolist()})
