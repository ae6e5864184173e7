"""Planners: one row each. What all must do, then what each is for."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.analysis.record import Analysis
from skipwise.plan import ModelShape
from skipwise.planners import planner_names

STACK = "model.layers"
COSINES = [0.5, 0.9, 0.99, 0.98, 0.7, 0.97, 0.6, 0.95]

# name -> settings that it takes; adding a planner adds a row
ROWS: dict[str, list[dict[str, Any]]] = {
    "similarity": [{}, {"forbid_neighbours": True}],
    "random": [{}, {"seed": 3}],
}


def analysis(flops: list[float] | None = None) -> Analysis:
    n = len(COSINES)
    similarity = torch.eye(n + 1, dtype=torch.float64)
    for i, cosine in enumerate(COSINES):
        similarity[i, i + 1] = similarity[i + 1, i] = cosine
    tensors = {
        f"{STACK}/similarity": similarity,
        f"{STACK}/update_norm": torch.ones(n, dtype=torch.float64),
        f"{STACK}/block_flops": torch.tensor(flops or [2.0] * n, dtype=torch.float64),
    }
    shape = ModelShape(architecture="Toy", stacks={STACK: n, "small": 2}, hidden_size=8)
    return Analysis("toy", shape, "autoregressive", tensors, calibration={"sha256": "abc", "tokens": 9})


def blocks(plan: sw.Plan) -> list[int]:
    return list(plan.phases[0].skip.get(STACK, ()))


def test_every_planner_has_a_row() -> None:
    assert planner_names() == sorted(ROWS)


@pytest.mark.parametrize(("method", "settings"), [(m, s) for m, rows in ROWS.items() for s in rows])
def test_what_all_planners_do(method: str, settings: dict[str, Any]) -> None:
    plans = [sw.make_plan(analysis(), method, skip=k, **settings) for k in range(5)]
    assert [len(blocks(plan)) for plan in plans] == [0, 1, 2, 3, 4]
    assert all(set(blocks(a)) < set(blocks(b)) for a, b in pairwise(plans)), "larger plans contain smaller"
    assert plans[3] == sw.make_plan(analysis(), method, skip=3, **settings), "the same settings give the same plan"
    made_by = plans[3].made_by
    assert (made_by.method, made_by.settings) == (method, {"skip": 3} | settings)
    assert made_by.calibration == {"sha256": "abc", "tokens": 9}
    assert "torch" in made_by.versions


def test_similarity_takes_the_highest_cosine_first() -> None:
    assert blocks(sw.make_plan(analysis(), "similarity", skip=4)) == [2, 3, 5, 7]
    assert sw.make_plan(analysis(), skip=1).made_by.scores[STACK]["successive_similarity"] == COSINES


def test_similarity_without_neighbours() -> None:
    plan = sw.make_plan(analysis(), "similarity", skip=4, forbid_neighbours=True)
    assert blocks(plan) == [0, 2, 5, 7]
    with pytest.raises(sw.UserError, match="can give up at most 4 of 8 blocks, not 5"):
        sw.make_plan(analysis(), "similarity", skip=5, forbid_neighbours=True)


def test_random_depends_on_its_seed_alone() -> None:
    drawn = {tuple(blocks(sw.make_plan(analysis(), "random", skip=3, seed=seed))) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 0), (0.124, 0), (0.125, 1), (0.25, 2), (0.37, 2), (0.5, 4)])
def test_budget_is_never_exceeded(budget: float, expected: int) -> None:
    assert len(blocks(sw.make_plan(analysis(), budget=budget))) == expected


def test_budget_counts_flops_not_blocks() -> None:
    """The most similar block costs half of the stack."""
    uneven = analysis([1.0, 1.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert blocks(sw.make_plan(uneven, budget=0.4)) == []
    assert blocks(sw.make_plan(uneven, budget=0.5)) == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "similarty", "skip": 1}, r"Unknown planning method 'similarty'. Did you mean 'similarity'"),
        ({"skip": 9}, "Cannot skip 9 blocks: model.layers has 8. Choose 0 to 8"),
        ({"skip": -1}, "Cannot skip -1 blocks"),
        ({"budget": 1.0}, "budget=1.0 is not a fraction"),
        ({"skip": 1, "budget": 0.1}, "Give either skip"),
        ({}, "Give either skip"),
        ({"skip": 1, "stack": "model.layer"}, "Unknown stack 'model.layer'. Did you mean 'model.layers'"),
        ({"skip": 1, "seed": 3}, "Unknown setting of similarity 'seed'. Available: forbid_neighbours"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sw.UserError, match=message):
        sw.make_plan(analysis(), **settings)
