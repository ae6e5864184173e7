"""Self-scheduling: exact beside brute force, laws of the search, the front and what is chosen from it."""

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import skipwise as sw
from skipwise.blocks import find_contract, module_list
from skipwise.calibration import Batch, Calibration, Moment, Sample, Visited, by_commitment, divergence
from skipwise.cli import app
from skipwise.evaluation import Interval, Result, Row, Score
from skipwise.evaluation.tasks import ExactMatch
from skipwise.healing import fit_alone, fit_stand_ins
from skipwise.plan import ModelShape, Phase, Plan, Provenance
from skipwise.planners.greedy import Search
from skipwise.planners.grid import (
    Cell,
    Curve,
    Grid,
    Point,
    Savings,
    allocate,
    curves,
    improve,
    spans,
)
from skipwise.report.page import render
from skipwise.report.schedules import grid_figure
from skipwise.sampling.denoiser import denoising
from skipwise.scheduling.front import FrontSettings, find_front, front, pick
from skipwise.scheduling.scheduler import Scheduler
from skipwise.scheduling.visited import visit
from tests.tiny_models import ROWS

SHAPE = ModelShape(architecture="Toy", stacks={"blocks": 6}, hidden_size=8)
ENDS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def toy() -> Calibration:
    """A random LLaDA and six texts."""
    torch.manual_seed(1)
    samples = [Sample(tuple(torch.randint(4, 40, (12,)).tolist()), 3) for _ in range(6)]
    return Calibration(ROWS["llada"](), samples)


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


def random_curves(chance: random.Random, blocks: int = 4) -> list[Curve]:
    """Curves that are neither convex nor rising."""
    found = []
    for _ in ENDS:
        order = tuple(chance.sample(range(6), blocks))
        cells = [Cell(tuple(sorted(order[:k]))) for k in range(blocks + 1)] + [Cell(model="light")]
        harms = [0.0, *(chance.random() for _ in cells[1:])]
        found.append(Curve(tuple(map(Point, cells, harms)), order))
    return found


def saved(cell: Cell) -> float:
    return 0.45 if cell.model else len(cell.blocks) / 6.5


SAVINGS = Savings(lambda begin, end: end - begin, saved)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5])
def test_allocation_beside_brute_force(seed: int, budget: float) -> None:
    choices = random_curves(random.Random(seed))
    shares = [end - begin for begin, end in spans(ENDS)]
    everything = list(itertools.product(*(curve.points for curve in choices)))

    def harm(points: Sequence[Point]) -> float:
        return sum(share * point.harm for share, point in zip(shares, points, strict=True))

    def saving(points: Sequence[Point]) -> float:
        return sum(share * saved(point.cell) for share, point in zip(shares, points, strict=True))

    best = min(harm(points) for points in everything if saving(points) >= budget - 1e-9)
    grid = allocate(choices, ENDS, SAVINGS, budget)
    points = [next(p for p in c.points if p.cell == cell) for c, cell in zip(choices, grid.cells, strict=True)]
    assert harm(points) == pytest.approx(best)
    assert SAVINGS(grid) == pytest.approx(saving(points))
    assert SAVINGS(grid) >= budget - 1e-9, "it never takes more FLOPs than the budget leaves"


def test_a_budget_that_no_grid_meets() -> None:
    with pytest.raises(sw.UserError, match=r"No grid saves 90.0% of the FLOPs; the most is 61.5%"):
        allocate(random_curves(random.Random(0)), ENDS, SAVINGS, 0.9)


def test_one_segment_is_greedy(toy: Calibration) -> None:
    """Over the whole trajectory the nested orders and their harms are those of the planner."""
    stack = find_contract(toy.model).main_stack
    search = Search(toy, stack)
    order = list(search.order())
    (curve,) = curves(toy, stack, (1.0,))
    assert curve.order == tuple(order)
    assert [point.harm for point in curve.points] == [0.0, *search.costs]
    assert [point.cell.blocks for point in curve.points] == [tuple(sorted(order[:k])) for k in range(len(order) + 1)]
    (lazy,) = curves(toy, stack, (1.0,), at_once=1)
    assert lazy.points[1] == curve.points[1], "the first round tests all blocks"


def test_what_a_segment_chose_is_judged_on_other_data(toy: Calibration) -> None:
    """Harms beside plain removal, of its own order and of that of the whole trajectory."""
    one, other = toy.halves()
    assert [*one.samples, *other.samples] == [toy.samples[i] for i in (0, 2, 4, 1, 3, 5)]
    contract = find_contract(toy.model)
    stack = contract.main_stack
    shared = tuple(Search(one, stack).order())
    for curve, (begin, end) in zip(curves(one, stack, (0.5, 1.0), judge=other), [(0.0, 0.5), (0.5, 1.0)], strict=True):
        cells = {
            tuple(sorted(order[:k]))
            for order in (shared, curve.order)
            for k in range(contract.stacks[stack].length + 1)
        }
        assert {point.cell.blocks for point in curve.points} == cells
        for point in curve.points[1:]:
            harms = []
            for batch in other.batches(begin, end):
                with torch.no_grad():
                    target = batch.predictions(toy.model)
                    with sw.skip(toy.model, Plan.static(contract.shape, {stack: point.cell.blocks})):
                        harms.append(divergence(target, batch.predictions(toy.model)))
            assert point.harm == pytest.approx(float(torch.cat(harms).mean()), rel=1e-4)


def test_a_block_that_does_nothing_is_not_missed(toy: Calibration) -> None:
    model = ROWS["llada"]()
    stack = find_contract(model).main_stack
    block = module_list(model, stack)[1]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn_out.weight", "ff_out.weight")):
                parameter.zero_()
    length = find_contract(model).stacks[stack].length
    searches = (Search(Calibration(model, toy.samples), stack, begin=a, end=b) for a, b in spans((0.5, 1.0)))
    found = torch.tensor([list(search.test((), range(length)).values()) for search in searches])
    assert found.shape == (2, length)
    assert (found[:, 1].abs() < 1e-6).all()
    assert (found[:, 0] > 1e-4).all()


def plain_commitment(batch: Batch, target: Tensor, found: Tensor) -> list[float]:
    """Row by row."""
    harms, begin = [], 0
    for row in batch.predicted:
        end = begin + int(row.sum())
        place = begin + int(found[begin:end].max(-1).values.argmax())
        harms.append(float(divergence(target[place : place + 1], found[place : place + 1])))
        begin = end
    return harms


def test_commitment_looks_where_the_cut_model_would_commit(toy: Calibration) -> None:
    batch = next(toy.batches())
    torch.manual_seed(0)
    target, found = (torch.randn(int(batch.predicted.sum()), 9).mul(3).log_softmax(-1) for _ in range(2))
    harms = by_commitment(batch, target, found)
    assert harms.shape == (len(batch.inputs),)
    ties = 1e-3 * float(divergence(target, found).mean())
    assert (harms - ties).tolist() == pytest.approx(plain_commitment(batch, target, found), abs=1e-5)
    assert float(by_commitment(batch, target, target).abs().max()) < 1e-6


def test_stand_ins_are_minded_while_blocks_are_chosen(toy: Calibration) -> None:
    """What `test` says of a block beside the model under a plan whose stand-ins were fitted for just these blocks."""
    stack = find_contract(toy.model).main_stack
    left = fit_alone(toy, stack, epochs=2)
    search = Search(toy, stack, left=left)
    plan = fit_stand_ins(Plan.static(find_contract(toy.model).shape, {stack: [1]}), toy, "linear")
    total = count = 0.0
    with torch.no_grad():
        for batch in toy.batches():
            target = batch.predictions(toy.model)
            with sw.skip(toy.model, plan):
                total += float(divergence(target, batch.predictions(toy.model)).sum())
            count += len(target)
    assert search.test((), [1])[1] == pytest.approx(total / count, rel=1e-3)
    both = search.test([0], [1])[1]
    assert both == pytest.approx(search.test([1], [0])[0], rel=1e-3), "the order of giving up does not matter"


def test_local_search_finds_a_planted_optimum_and_never_worsens() -> None:
    choices = [Curve((Point(Cell(), 0.0),), tuple(range(6))) for _ in ENDS]
    goal = Grid(ENDS, (Cell((0, 1, 2)), Cell((1,)), Cell((3, 4))))
    begin = Grid(ENDS, (Cell((0, 1)), Cell((1, 2, 3)), Cell((3, 4))))
    asked: list[Grid] = []

    def evaluate(grids: Sequence[Grid]) -> list[float]:
        asked.extend(grids)
        return [
            -float(sum(len(set(a.blocks) ^ set(b.blocks)) for a, b in zip(g.cells, goal.cells, strict=True)))
            for g in grids
        ]

    budget = 0.2
    found = improve(begin, choices, evaluate, SAVINGS, budget, trials=300, seed=1)
    assert found.quality > evaluate([begin])[0] + 1
    assert all(SAVINGS(grid) >= budget - 1e-9 for grid in asked)
    assert found.tried <= 300
    assert found == improve(begin, choices, evaluate, SAVINGS, budget, trials=300, seed=1), "the same seed"
    worse = improve(goal, choices, evaluate, SAVINGS, budget, trials=40)
    assert (worse.grid, worse.quality) == (goal, 0.0)
    assert improve(goal, choices, evaluate, SAVINGS, budget, trials=1).tried == 1


def test_equal_neighbours_are_one_phase() -> None:
    plan = Grid(ENDS, (Cell((1, 2)), Cell((1, 2)), Cell(model="light"))).plan(SHAPE, "blocks")
    assert plan.phases == (Phase(until=0.5, skip={"blocks": (1, 2)}), Phase(until=1.0, model="light"))
    assert Grid((1.0,), (Cell(),)).plan(SHAPE, "blocks").phases == (Phase(),)


def test_moments_are_what_the_sampler_ran(tiny: tuple[nn.Module, Any]) -> None:
    model, tokenizer = tiny
    tasks = [ExactMatch(name, "calibration", 3, 0, 2) for name in ("chain", "addition")]
    visited = visit(model, tokenizer, tasks)
    mask = model.config.mask_token_id
    assert len(visited.samples) == 3 * 3 + 3 * 4, "a row a prompt and step"
    for moment in visited.samples:
        length = len(moment.ids) - 9
        assert moment.ids.count(mask) == length - round(moment.progress * length)
    batches = list(visited.batches(0.5, 1.0))
    assert sum(len(batch.inputs) for batch in batches) == 3 * 1 + 3 * 2
    assert all(torch.equal(batch.predicted, batch.inputs == mask) for batch in batches)
    assert visited.share(0, 1) == pytest.approx(1)
    assert visited.share(0.5, 1) == pytest.approx((3 * 12 + 6 * 13) / (9 * 12 + 12 * 13))
    assert len(visit(model, tokenizer, tasks, most=5).samples) <= 5
    with pytest.raises(sw.UserError, match="nothing is denoised"):
        visit(*sw.load("tiny-ar"), tasks)


def row(method: str, saved: float, value: float, seconds: float = 1.0, plan: Plan | None = None) -> Row:
    kept = Interval(value=value, low=value - 0.02, high=value + 0.02)
    whole = method == "whole model"
    made_by = Provenance(method=method)
    phases = (Phase(until=0.5, skip={"blocks": (0, 1)}), Phase(skip={"blocks": (2,)}))
    return Row(
        plan=None if whole else plan or Plan(model=SHAPE, phases=phases, made_by=made_by),
        method=method,
        k=2,
        saved_block_flops=saved,
        saved_all_in_flops=saved,
        seconds=seconds,
        scores={"sort": Score(metric="exact match", value=kept, examples=9, retention=None if whole else kept)},
        mean_retention=None if whole else kept,
    )


def result_of(*rows: Row) -> Result:
    return Result(
        name="toy",
        kind="masked diffusion",
        model=SHAPE.model_dump(),
        rows=(row("whole model", 0.0, 1.0, seconds=2.0), *rows),
        device="cpu",
        dtype="float32",
        seeds={"examples": 0},
        date="2026-01-01",
    )


def test_front_is_what_nothing_beats() -> None:
    a, b, c = row("grid", 0.2, 0.99, 1.6), row("grid", 0.3, 0.96, 1.4), row("static", 0.3, 0.9, 1.2)
    worse, tie = row("greedy", 0.1, 0.98, 1.9), row("static", 0.3, 0.96, 1.9)
    result = result_of(worse, a, b, tie, c)
    assert front(result) == [a, b], "of equal rows the first"
    assert front(result, "seconds") == [a, b, c]
    assert front(result_of(row("grid", -0.1, 0.99), row("grid", 0.0, 1.0))) == [], "the whole model beats both"
    assert front(result_of(row("grid", 0.0, 1.01))) != [], "better than the whole model"


def test_pick_takes_the_cheapest_that_keeps_enough() -> None:
    cheap, sure, dear = row("grid", 0.4, 0.96), row("grid", 0.3, 0.975), row("static", 0.1, 1.0)
    result = result_of(dear, sure, cheap)
    assert pick(result) == sure.plan, "0.96 - 0.02 is not certain"
    assert pick(result, by="value") == cheap.plan
    assert pick(result, keep=0.9) == cheap.plan
    better = row("grid", 0.3, 0.98, plan=Plan.static(SHAPE, {"blocks": [3]}, Provenance(method="grid")))
    assert pick(result_of(sure, better)) == better.plan, "of equal cost the better"
    with pytest.raises(sw.UserError, match=r"No plan keeps 99.9% of the score with certainty; the nearest is static"):
        pick(result, keep=0.999)
    with pytest.raises(sw.UserError, match="has no plan with a retention"):
        pick(result_of())
    with pytest.raises(sw.UserError, match=r"keep=1\.5 is no fraction"):
        pick(result, keep=1.5)


def test_the_page_shows_fronts_and_grids() -> None:
    result = result_of(row("grid", 0.2, 0.99, 1.6), row("grid", 0.3, 0.96, 1.4), row("static", 0.3, 0.9, 1.2))
    page = render([result], [])
    assert page == render([result], []), "no names or dates of the moment"
    assert "toy: retention of every schedule against all-in FLOPs saved, one colour a method" in page
    assert "toy: retention of every schedule against measured seconds" in page
    grids = re.findall(r'alt="Grid of blocks by progress for grid: (.*?) of all-in FLOPs saved', page)
    assert grids == ["20.0%", "30.0%"]
    assert "grid: saves up to 20.0% of all-in FLOPs with 95% of the score kept" in page
    assert "static: none of its plans keeps 95%" in page
    schedule = Plan(model=SHAPE, phases=(Phase(until=0.5, model="light"), Phase()), made_by=Provenance(method="x"))
    assert grid_figure(schedule) != grid_figure(Plan(model=SHAPE))


def test_a_scheduler_keeps_the_budget_and_its_stand_ins_fit_their_phases(tiny: tuple[nn.Module, Any]) -> None:
    model, tokenizer = tiny
    tasks = [ExactMatch("chain", "calibration", 4, 0, 4)]
    visited = visit(model, tokenizer, tasks)
    plan = Scheduler(model, tokenizer, visited, tasks, (0.5, 1.0), "linear", trials=3, deepest=0.4).plan(0.2)
    fitted = fit_stand_ins(plan.model_copy(update={"stand_ins": None, "phases": bare(plan)}), visited, epochs=1)
    mine, theirs = plan.stand_in_tensors(), fitted.stand_in_tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)
    ids = torch.tensor([tokenizer("c7+5*3-1=")["input_ids"]])
    stats = sw.generate(model, ids, plan=plan, gen_length=3, stop_at_eos=False).stats
    assert 0.2 - 1e-6 <= 1 - stats.all_in_flops / stats.whole_all_in_flops < 0.4
    assert plan.made_by.scores["model.layers"]["grids_tried"] == 3


def bare(plan: Plan) -> tuple[Phase, ...]:
    return tuple(phase.model_copy(update={"stand_in": None}) for phase in plan.phases)


def test_end_to_end(tmp_path: Path, tiny: tuple[nn.Module, Any]) -> None:
    """Front, page, choice and generation by the command line; what was evaluated is what is read back."""
    folder, chosen = tmp_path / "front", tmp_path / "plan.json"
    sizes = {"moments": 12, "calibrate": 4, "examples": 6, "trials": 2, "segments": 2, "budgets": 0.1, "task": "chain"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["schedule", "front", "tiny-dllm", *options, "-o", str(folder)])
    assert done.exit_code == 0, done.output
    result = Result.load(folder / "result.json")
    methods = [row.method for row in result.rows]
    assert methods == [
        "whole model", "grid", "grid + linear stand-ins", "static", "static + linear stand-ins", "greedy",
    ]  # fmt: skip
    assert all(row.saved_all_in_flops >= 0.1 - 1e-6 for row in result.rows[1:])
    assert "Grid of blocks by progress" in (folder / "page.html").read_text() or not front(result)
    assert len(list((folder / "plans").glob("*.json"))) == 5
    model, tokenizer = tiny
    again = sw.evaluate(model, tokenizer, ["chain"], [row.plan for row in result.rows[1:]], examples=6)
    assert [row.scores for row in again.rows] == [row.scores for row in result.rows], "stand-ins are found"
    command = ["plan", "--front", str(folder / "result.json"), "--keep", "0.01", "--estimate", "-o", str(chosen)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    plan = Plan.load(chosen)
    assert plan.made_by == pick(result, 0.01, "value").made_by
    assert plan.stand_in_tensors().keys() == pick(result, 0.01, "value").stand_in_tensors().keys()
    with denoising(model, plan) as denoiser:
        measured = ExactMatch("chain", "test", 6, 0, 250).run(denoiser, tokenizer)[0]
    row = next(row for row in result.rows if row.plan and row.plan.made_by == plan.made_by)
    assert measured.value == row.scores["chain"].value.value


def test_a_light_model_is_a_cell_and_a_placement(tiny: tuple[nn.Module, Any]) -> None:
    model, tokenizer = tiny
    shape = find_contract(model).shape
    light = sw.load("tiny-dllm")[0]
    stack = module_list(light, "model.layers")
    light.model.layers = nn.ModuleList(list(stack)[:8])
    settings = FrontSettings(budgets=(0.1,), segments=2, stand_in=None, moments=12, trials=0, examples=4)
    result = find_front(model, tokenizer, ["chain"], settings, light="lighter", others={"lighter": light}, examples=4)
    methods = [row.method for row in result.rows]
    assert methods[:5] == ["whole model", "grid", "static", "grid + light", "greedy"]
    assert re.fullmatch(r"light (first|last|middle|sandwich|spread)", methods[5])
    placed = result.rows[5].plan
    assert placed is not None
    assert {phase.model for phase in placed.phases} == {None, "lighter"}
    visited = visit(model, tokenizer, [ExactMatch("chain", "calibration", 4, 0, 4)])
    for curve in curves(visited, "model.layers", (0.5, 1.0), light={"whole": model}, most=1):
        assert curve.points[1] == Point(Cell(model="whole"), 0.0), "a model that is the same does no harm"
    assert shape == placed.model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--keep", "0.9"], "Give ANALYSIS"),
        (["plan", "folder", "--keep", "0.9"], "name it with --front"),
        (["plan", "folder", "--front", "x.json"], "leave out ANALYSIS"),
        (["plan", "--front", "x.json", "--skip", "3", "--set", "a=1"], "leave out --skip, --set"),
        (["plan", "--front", "missing.json"], "missing.json is not a readable"),
        (["schedule", "front", "tiny-dllm", "--budgets", "a,b"], "--budgets a,b are no numbers"),
        (["schedule", "front", "tiny-dllm", "--budgets", "1.2"], "A budget of 1.2 is no fraction"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, sw.UserError)
    assert message in str(done.exception)


def test_a_visited_part_without_forwards_skips_nothing(toy: Calibration) -> None:
    mask = toy.model.config.mask_token_id
    visited = Visited(toy.model, [Moment((5, 6, mask, mask), 0, 0.0)] * 2)
    stack = find_contract(toy.model).main_stack
    first, second = curves(visited, stack, (0.5, 1.0), by_commitment)
    assert len(first.points) > 1
    assert second == Curve((Point(Cell(), 0.0),))
