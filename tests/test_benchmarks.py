"""Benchmarks are not timed here, but they must start: each says what it would do."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
BENCHMARKS = [path for path in sorted(FOLDER.rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_starts(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its imports hold and its options are described."""
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert "usage:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `speed.py --quick` writes."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    run("speed.py", "--quick", "-o", str(path))
    return path


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests themselves
    command = [sys.executable, FOLDER / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_speed_compares_what_gives_the_same_tokens(quick: Path) -> None:
    """Every section has rows; what claims the official loop's tokens has them; a quarter of the blocks is a quarter."""
    sections = json.loads(quick.read_text(encoding="utf-8"))["sections"]
    assert all(sections[name] for name in ("zoo", "shapes", "exact", "plan", "modes", "others"))
    for row in (*sections["zoo"], *sections["shapes"], *sections["exact"], *sections["modes"]):
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["our_seconds"], rel=0.05)
    same = [row for row in (*sections["zoo"], *sections["shapes"]) if row["ours"] == "same tokens"]
    assert {row["plain"] for row in same} == {f"official {name} loop" for name in ("llada", "dream", "mdlm")}
    # ties of confidence go by position here, and by torch's top-k there
    least = {"official llada loop": 0.9}
    assert all(row["equal_tokens"] >= least.get(row["plain"], 1) for row in (*same, *sections["exact"]))
    assert all(row["left_block_flops"] == pytest.approx(0.75) for row in sections["plan"])
    assert all(row["evaluated"] < row["naive"] for row in sections["others"] if "naive" in row)


@pytest.mark.slow
def test_the_page_is_made_of_the_json_alone(quick: Path, tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    run("speed_page.py", str(quick), "-o", str(page))
    text, result = page.read_text(encoding="utf-8"), json.loads(quick.read_text(encoding="utf-8"))
    assert "no measurement" in text
    for row in (*result["sections"]["zoo"], *result["sections"]["shapes"]):
        assert f"| {row['plain_seconds']} | {row['our_seconds']} |" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 * 6 + sum(
        map(len, result["sections"].values())
    )


@pytest.mark.slow
def test_the_gpu_script_runs_tiny(tmp_path: Path) -> None:
    """Every contender without and with the plan; exact decoding gives the official loop's tokens, plan or not."""
    path = tmp_path / "llada8b.json"
    out = run("gpu/llada8b.py", "--tiny", "--rounds", "1", "-o", str(path))
    result = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(out.splitlines()[-1]) == result
    (workload,) = result["workloads"]
    rows = workload["rows"]
    assert {"official loop", "ours, exact", "official loop + plan", "ours, exact + plan"} <= set(rows)
    assert rows["ours, exact"]["equal_to_official"] == 1
    assert rows["ours, exact + plan"]["equal_to_official"] == rows["official loop + plan"]["equal_to_official"] < 1
    for name, row in rows.items():
        assert row["forwards"] >= 16
        assert 0 < row["share_of_matrix_rate"] < 2
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"], rel=0.01), name
