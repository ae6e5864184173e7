"""`make reproduce-p2`: everything about paper 2 that fits on two cores in an hour and a quarter, and the page.

Studies the shipped models (seed 0), two at a time, searches the schedules of the pair that writes English, and makes
docs/results/p2.md from their Results and from those of seeds 1 and 2, which are kept in docs/results/p2. How those were
made: docs/results/p2/README.md.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from running import Run, run_script

STUDIES = (
    ("text", "tiny-text", "tiny-text-light", "--label", "tiny-text-0"),
    ("tasks", "tiny-dllm", "tiny-dllm-light", "--label", "tiny-dllm-0"),
)


def study(arguments: Sequence[str], output: Path, quick: bool) -> None:
    """Everything about one pair."""
    run_script("p2.py", *arguments, "--output", str(output), *(["--quick"] if quick else []))


def search(output: Path, quick: bool) -> None:
    """The exhaustive search, in two processes; one that was killed goes on where it was."""
    folder = Path("runs/p2-search-quick" if quick else "runs/p2-search")
    sizes: Sequence[str] = ("--samples", "2", "--confirm", "2", "--segments", "3") if quick else ("--confirm", "64")
    writing = ("--judge", "smollm2-135m", "--judge-dtype", "bfloat16", "--steps", "64")
    command = [sys.executable, "-m", "skipwise", "schedule", "search", "tiny-text", "--light", "tiny-text-light"]
    subprocess.run([*command, *writing, *sizes, "-o", str(folder)], check=True)
    for name in ("table", "result"):
        shutil.copyfile(folder / f"{name}.json", output / f"search.{name}.json")


def main() -> None:
    """Run the studies and the search, and write the page."""
    run = Run.asked(__doc__, "p2", "a few samples")
    run.output.mkdir(parents=True, exist_ok=True)
    run.two_at_a_time(study, STUDIES)
    search(run.output, run.quick)
    run.write_page("p2_page.py")


if __name__ == "__main__":
    main()
