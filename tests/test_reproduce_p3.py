"""The scripts behind docs/results/p3.md: the page is what they make of the committed Results, and they run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from p3_claims import beyond, claims, measured, peak, saved
from p3_page import page
from p3_results import BLOCKSKIP, LAST, LORA, Found, gain, read
from pages import FAILS, HOLDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "p3"


def with_similarities(found: Found, name: str, values: tuple[float, ...]) -> Found:
    """With other scores of one way."""
    changed = {
        group: [replace(way, similarities=values) if way.name == name else way for way in ways]
        for group, ways in found.groups.items()
    }
    return replace(found, groups=changed)


def test_the_page_is_made_from_the_results() -> None:
    assert page(read(RESULTS)) == RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_memory_of_flux_is_within_the_limits_that_readme_promises() -> None:
    found = read(RESULTS)
    assert peak(found, "half, patches") <= 11.5
    assert saved(found, "half, patches") >= 0.6
    small = found.memory["models"]["flux.1-dev"]["30%, patches"]
    assert max(small["training"]["total"], small["making"]["total"]) <= 6 * 2**30
    assert saved(found, "30%, patches") >= 0.8
    assert all(row["label"] == "estimated" for rows in found.memory["models"].values() for row in rows.values())


def test_ways_were_trained_with_three_seeds_and_cost_what_they_should() -> None:
    found = read(RESULTS)
    assert found.runs >= 3
    assert measured(found, BLOCKSKIP) >= 0.46
    assert all(len(way.similarities) == found.runs for ways in found.groups.values() for way in ways)
    whole, again = found.way(LAST), found.way(LAST + ", checkpointing")
    assert whole.similarities == again.similarities  # activations that are made again are the same
    assert again.peak < whole.peak < found.way(LORA).peak


def test_the_exact_way_is_as_good_as_lora_at_half_its_memory() -> None:
    """What README says and the defaults rest on."""
    found = read(RESULTS)
    ours = found.way(LAST + ", checkpointing")
    assert ours.similarity.value >= found.way(LORA).similarity.low
    assert measured(found, ours.name) >= 0.46
    assert gain(found.way("late blocks streamed"), found.way(BLOCKSKIP)).low > 0


def test_verdicts_follow_the_numbers() -> None:
    found = read(RESULTS)
    name = "BlockSkip's subject similarity is within the interval of LoRA's, or above"
    base = found.way(LORA)
    low = tuple(value - 0.5 for value in base.similarities)
    said = {}
    for what, values in (("equal", base.similarities), ("low", low)):
        changed = with_similarities(found, BLOCKSKIP, values)
        said[what] = {claim: verdict for claim, verdict, _ in claims(changed)}[name]
    assert said == {"equal": HOLDS, "low": FAILS}
    assert gain(with_similarities(found, BLOCKSKIP, low).way(BLOCKSKIP), base).value == pytest.approx(-0.5)


def test_staleness_is_told_from_the_missing_gradient() -> None:
    found = read(RESULTS)
    name = "Staleness is not what stored residuals lose by, the missing gradient is"
    better = tuple(value + 0.1 for value in found.way(BLOCKSKIP).similarities)
    changed = with_similarities(found, "residuals refreshed", better)
    assert {claim: verdict for claim, verdict, _ in beyond(changed)}[name] == FAILS


@pytest.mark.slow
def test_one_group_runs(tmp_path: Path) -> None:
    """A quick study of the late modes writes its scores and its pictures."""
    command = [sys.executable, str(ROOT / "reproduce" / "p3.py"), "late", "--output", str(tmp_path), "--quick"]
    subprocess.run(command, check=True, cwd=tmp_path)
    content = json.loads((tmp_path / "late.json").read_text())
    ways = {outcome["way"] for outcome in content["outcomes"]}
    assert {"as it was", "late blocks streamed", "residuals refreshed", "last half, exact"} <= ways
    assert (tmp_path / "late.png").stat().st_size > 1000
