"""Planners: one row each. What all must do, then what each is for."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.analysis.record import Analysis
from skipwise.blocks import find_contract
from skipwise.calibration import Calibration, Sample
from skipwise.plan import ModelShape
from skipwise.planners import needs_model, planner_names
from tests.deleted import deleted
from tests.tiny_models import ROWS as ROWS_OF_MODELS

STACK = "model.layers"
COSINES = [0.5, 0.9, 0.99, 0.98, 0.7, 0.97, 0.6, 0.95]

# name -> settings that it takes; adding a planner adds a row
ROWS: dict[str, list[dict[str, Any]]] = {
    "similarity": [{}, {"forbid_neighbours": True}],
    "random": [{}, {"seed": 3}],
    "window": [{}],
    "greedy": [{}, {"forbid_neighbours": True}],
}
NESTED = {"similarity", "random", "greedy"}  # a larger plan contains the smaller; a window may move


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


@pytest.fixture(scope="module")
def toy() -> Calibration:
    """A random Llama of 8 blocks and three texts."""
    model = ROWS_OF_MODELS["llama"]()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 8
    torch.manual_seed(0)
    samples = [Sample(tuple(range(4 + i, 14 + i)), 3) for i in range(3)]
    return Calibration(type(model)(config).eval(), samples)


@pytest.mark.parametrize(("method", "settings"), [(m, s) for m, rows in ROWS.items() for s in rows])
def test_what_all_planners_do(method: str, settings: dict[str, Any], toy: Calibration) -> None:
    def plan_of(skip: int) -> sw.Plan:
        return sw.make_plan(analysis(), method, skip=skip, calibration=toy, **settings)

    plans = [plan_of(skip) for skip in range(5)]
    assert [len(blocks(plan)) for plan in plans] == [0, 1, 2, 3, 4]
    if method in NESTED:
        assert all(set(blocks(a)) < set(blocks(b)) for a, b in pairwise(plans)), "larger plans contain smaller"
    if settings.get("forbid_neighbours"):
        assert all(b - a > 1 for a, b in pairwise(blocks(plans[4])))
    assert plans[3] == plan_of(3), "the same settings give the same plan"
    assert len(blocks(sw.make_plan(analysis(), method, budget=0.26, calibration=toy, **settings))) == 2
    made_by = plans[3].made_by
    assert (made_by.method, made_by.settings) == (method, {"skip": 3} | settings)
    assert made_by.calibration == (toy.facts if needs_model(method) else {"sha256": "abc", "tokens": 9})
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


def test_window_is_the_most_alike_run() -> None:
    similarity = torch.full((9, 9), 0.1, dtype=torch.float64)
    similarity[2, 5], similarity[5, 8] = 0.9, 0.8
    toy = analysis()
    toy.tensors[f"{STACK}/similarity"] = similarity
    assert blocks(sw.make_plan(toy, "window", skip=3)) == [2, 3, 4]
    uneven = analysis([1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    uneven.tensors[f"{STACK}/similarity"] = similarity
    assert blocks(sw.make_plan(uneven, "window", budget=3 / 16)) == [5, 6, 7], "a run with the dear block is too much"


def test_greedy_beside_plain_removal(toy: Calibration) -> None:
    """Each round's choice and its KL are those of deleting every block in turn and comparing the outputs."""
    plan = sw.make_plan(analysis(), "greedy", skip=3, calibration=toy)
    model, gone, costs = toy.model, set(), []
    batches = list(toy.batches())

    def predict(network: Any) -> torch.Tensor:
        with torch.no_grad():
            rows = [network(b.inputs, use_cache=False).logits[b.predicted] for b in batches]
        return torch.cat(rows).log_softmax(-1)

    target = predict(model)
    for _ in range(3):
        kl = {}
        for block in set(range(8)) - gone:
            found = predict(deleted(model, STACK, gone | {block}))
            kl[block] = float((target.exp() * (target - found)).sum(-1).mean())
        best = min(kl, key=lambda block: kl[block])
        gone.add(best)
        costs.append(kl[best])
    assert blocks(plan) == sorted(gone)
    assert plan.made_by.scores[STACK]["kl"] == pytest.approx(costs, rel=1e-4)


def test_greedy_tests_all_blocks_for_half_of_the_evaluations(toy: Calibration) -> None:
    from skipwise.planners.greedy import Search

    search = Search(toy, STACK)
    ran: list[int] = []
    blocks = toy.model.model.layers
    handles = [block.register_forward_hook(lambda *_, number=i: ran.append(number)) for i, block in enumerate(blocks)]
    next(search.order())
    for handle in handles:
        handle.remove()
    naive = 8 * 7 * len(search.batches)
    assert len(ran) == search.evaluated == (7 + 28) * len(search.batches) < 0.63 * naive


@pytest.mark.parametrize("name", ["llada", "dream", "mdlm", "gemma3", "gpt2", "qwen3"])
def test_greedy_on_other_architectures(name: str) -> None:
    """Resuming behind a block gives what deleting it and all before it, on its input, would: checked by the choice."""
    model = ROWS_OF_MODELS[name]()
    calibration = Calibration(model, [Sample(tuple(range(4 + i, 14 + i)), 3) for i in range(3)], seed=1)
    stack = find_contract(model).main_stack
    length = find_contract(model).stacks[stack].length
    shape = find_contract(model).shape
    tensors = {f"{stack}/block_flops": torch.ones(length, dtype=torch.float64)}
    plan = sw.make_plan(Analysis("m", shape, "any", tensors), "greedy", skip=1, calibration=calibration)
    kl = []
    for block in range(length):
        total = 0.0
        for batch in calibration.batches():
            with torch.no_grad():
                target = model(batch.inputs).logits[batch.predicted].log_softmax(-1)
                with sw.skip(model, sw.Plan.static(shape, {stack: [block]})):
                    found = model(batch.inputs).logits[batch.predicted].log_softmax(-1)
            total += float((target.exp() * (target - found)).sum())
        kl.append(total)
    assert plan.phases[0].skip[stack] == (min(range(length), key=lambda i: kl[i]),)


def test_greedy_says_what_it_needs() -> None:
    with pytest.raises(sw.UserError, match=r"greedy runs the model; give calibration=Calibration.of"):
        sw.make_plan(analysis(), "greedy", skip=1)
    with pytest.raises(sw.UserError, match="none has two tokens"):
        Calibration.of(*sw.load("tiny-dllm"), ["7"])


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
