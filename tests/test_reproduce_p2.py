"""The scripts behind docs/results/p2.md: the page is what they make of the committed Results, and they run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from p2_claims import beyond, claims
from p2_page import page
from p2_results import TASKS, TEXT, best, read, whole
from pages import FAILS, HOLDS

import skipwise as sw
from skipwise.evaluation import Interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "p2"


def test_the_page_is_made_from_the_results() -> None:
    assert page(read(RESULTS)) == RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_the_shipped_models_were_studied_and_solve_their_tasks() -> None:
    found = read(RESULTS)
    assert f"{TEXT}-0" in {pair.label for pair in found.pairs}
    assert {f"{TASKS}-{seed}" for seed in (0, 1, 2)} == {solver.label for solver in found.solvers}
    for solver in found.solvers:
        assert min(score.value.value for score in whole(solver.front).scores.values()) >= 0.95
    assert found.search is not None
    assert len(found.search["rows"]) == 28


def test_text_results_say_what_they_depend_on() -> None:
    for pair in read(RESULTS).pairs:
        for result in (pair.placements, pair.prefix, pair.front):
            facts = result.settings["writing"]
            assert {"judge", "noise_dtype", "samples", "end_of_text", "sampler", "steps", "seed"} <= set(facts)
            assert all(row.scores["writing"].examples == facts["samples"] for row in result.rows)
            assert all("writing (token entropy)" in row.scores for row in result.rows)


def test_verdicts_follow_the_numbers() -> None:
    """Whether self-scheduling keeps 95% at 25% saved hangs on the retention of its own rows alone."""
    found = read(RESULTS)
    name = "Exact tasks: self-scheduling saves 25% of all-in FLOPs or more and keeps 95%"
    before = {claim: said for claim, said, _ in beyond(found)}
    worse = Interval(value=0.5, low=0.4, high=0.6)
    solver = found.solvers[0]
    rows = tuple(
        row.model_copy(update={"mean_retention": worse}) if row.method.startswith("grid") else row
        for row in solver.front.rows
    )
    changed = replace(solver, front=solver.front.model_copy(update={"rows": rows}))
    after = {claim: said for claim, said, _ in beyond(replace(found, solvers=[changed, *found.solvers[1:]]))}
    assert after[name] == FAILS
    if before[name] == HOLDS:
        assert before[name] != after[name]
    assert best(changed.front, ("grid",), 0.17).mean_retention == worse  # type: ignore[union-attr]


def test_one_pair_is_said_to_be_one_pair() -> None:
    found = read(RESULTS)
    few = replace(found, pairs=found.pairs[:1])
    said = [verdict for claim, verdict, _ in claims(few) if "KL(heavy, light)" in claim]
    assert said
    assert all("only 1 pair of models" in verdict for verdict in said)


@pytest.mark.slow
def test_one_study_runs(tmp_path: Path) -> None:
    """A quick study of the exact tasks writes its Results."""
    command = [sys.executable, str(ROOT / "reproduce" / "p2.py"), "tasks", "tiny-dllm", "tiny-dllm-light"]
    subprocess.run([*command, "--label", "tiny-dllm-0", "--output", str(tmp_path), "--quick"], check=True, cwd=tmp_path)
    (solver,) = read(tmp_path).solvers
    assert {"grid", "static", "greedy"} <= {row.method for row in solver.front.rows}
    assert {"sandwich", "all light"} <= {row.method for row in solver.placements.rows}
    assert sw.Result.load(tmp_path / "tiny-dllm-0.front.json").rows[0].plan is None
