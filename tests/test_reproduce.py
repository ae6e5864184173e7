"""The scripts behind docs/results: the committed page is what they make of the committed Results, and they run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from p1_claims import claims
from p1_page import page
from p1_results import KINDS, REAL, Study, read
from pages import FAILS, HOLDS

import skipwise as sw

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "p1"


def test_the_page_is_made_from_the_results() -> None:
    assert page(read(RESULTS)) == RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_all_seeds_of_all_kinds_are_there_and_solve_their_tasks() -> None:
    studies = read(RESULTS)
    assert {f"{kind}-{seed}" for kind in KINDS for seed in (0, 1, 2)} | {REAL} == set(studies)
    for label, study in studies.items():
        if label != REAL:
            scores = study.result.rows[0].scores.values()
            assert min(score.value.value for score in scores) >= 0.95, label


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    """With the retention of one model changed, the claim that rests on it changes its verdict."""
    studies = read(RESULTS)
    before = {claim: found for claim, found, _ in claims(studies)}
    name = "A native diffusion model keeps more than 90% with 18.75% of layer FLOPs skipped by similarity"
    text = json.loads((RESULTS / "tiny-dllm-1.result.json").read_text())
    for row in text["rows"]:
        if row["method"] == "similarity" and row["k"] == 5:
            row["mean_retention"]["value"] = 0.2 if before[name] == HOLDS else 1.0
    result = tmp_path / "changed.json"
    result.write_text(json.dumps(text))
    changed = Study("tiny-dllm-1", sw.Result.load(result), studies["tiny-dllm-1"].states)
    after = {claim: found for claim, found, _ in claims({**studies, "tiny-dllm-1": changed})}
    if before[name] == HOLDS:
        assert after[name] == FAILS
    assert {claim for claim in before if before[claim] != after[claim]} <= {name}


@pytest.mark.slow
def test_one_study_runs(tmp_path: Path) -> None:
    """A quick study of one model writes a Result and its states."""
    for name in ("p1", "p1_states"):
        command = [sys.executable, str(ROOT / "reproduce" / f"{name}.py"), "tiny-ar", "--label", "tiny-ar-0"]
        subprocess.run([*command, "--output", str(tmp_path), "--quick"], check=True, cwd=tmp_path)
    study = read(tmp_path)["tiny-ar-0"]
    assert {"similarity", "window", "greedy", "random"} <= {row.method for row in study.result.rows}
    assert study.states["moved"]
