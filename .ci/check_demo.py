"""Check the demo's output, or exit with code 1 and every reason: python .ci/check_demo.py runs/demo."""

import sys
from collections.abc import Iterator
from pathlib import Path

from skipwise.errors import UserError
from skipwise.evaluation.result import Result, Row

MODELS = ("tiny-dllm", "tiny-ar")
METHODS = ("similarity", "random")
SKIPS = (1, 2, 3, 4, 6)
SMALLEST_REPORT = 20_000  # bytes


def problems(folder: Path) -> Iterator[str]:
    """All that is wrong with a demo's output folder."""
    report = folder / "report.html"
    if not report.is_file() or report.stat().st_size <= SMALLEST_REPORT:
        yield f"{report} is missing or not larger than {SMALLEST_REPORT} bytes"
    found = {path.stem.removeprefix("result-"): path for path in folder.glob("result-*.json")}
    for name in MODELS:
        if name not in found:
            yield f"there is no result-{name}.json in {folder}"
    for name, path in found.items():
        try:
            result = Result.load(path)
        except UserError as error:
            yield str(error)
            continue
        for problem in (*_baseline(result), *_plans(result)):
            yield f"{name}: {problem}"


def _baseline(result: Result) -> Iterator[str]:
    """The whole model solves every task."""
    whole = [row for row in result.rows if row.plan is None]
    if len(whole) != 1:
        yield f"{len(whole)} rows without a plan, not 1"
    for row in whole:
        exact = {task: score.value.value for task, score in row.scores.items() if score.metric == "exact match"}
        if not exact:
            yield "no task is scored by exact match"
        yield from (
            f"{task}: exact match {value} of the whole model" for task, value in exact.items() if not value >= 0.95
        )


def _plans(result: Result) -> Iterator[str]:
    """Every method has every number of skipped blocks, and its numbers are possible."""
    blocks = sum(result.model["stacks"].values())
    if blocks != 24:
        yield f"{blocks} blocks, not 24"
    planned = [row for row in result.rows if row.plan is not None]
    present = {(row.method, row.k) for row in planned}
    yield from (f"no row for {method} k={k}" for method in METHODS for k in SKIPS if (method, k) not in present)
    for row in planned:
        yield from (f"{row.method} k={row.k}: {problem}" for problem in _row(row))


def _row(row: Row) -> Iterator[str]:
    kept = {task: score.retention for task, score in row.scores.items() if score.metric == "exact match"}
    for what, retention in {**kept, "mean": row.mean_retention}.items():
        if retention is None or not 0 <= retention.value <= 1.1:
            yield f"retention {retention} ({what})"
    if row.k == 6 and not abs(row.saved_block_flops - 0.25) <= 1e-6:
        yield f"6 of 24 blocks save {row.saved_block_flops} of block FLOPs, not 0.25"
    if not 0 < row.saved_all_in_flops < row.saved_block_flops:
        yield f"saved all-in {row.saved_all_in_flops} is not between 0 and block {row.saved_block_flops}"


def main() -> None:
    """Check the folder that was given."""
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_demo.py FOLDER")
    found = list(problems(Path(sys.argv[1])))
    if found:
        sys.exit("\n".join(found))
    print(f"{sys.argv[1]}: as it should be")


if __name__ == "__main__":
    main()
