"""`make reproduce-p2`: everything about paper 2 that fits on two cores in an hour and a quarter, and the page.

Studies the shipped models (seed 0), two at a time, searches the schedules of the pair that writes English, and makes
docs/results/p2.md from their Results and from those of seeds 1 and 2, which are kept in docs/results/p2. How those were
made: docs/results/p2/README.md.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "p2"
STUDIES = (
    ("text", "tiny-text", "tiny-text-light", "--label", "tiny-text-0"),
    ("tasks", "tiny-dllm", "tiny-dllm-light", "--label", "tiny-dllm-0"),
)


def study(arguments: Sequence[str], output: Path, quick: bool) -> None:
    """Everything about one pair."""
    more = ["--output", str(output), *(["--quick"] if quick else [])]
    subprocess.run([sys.executable, str(HERE / "p2.py"), *arguments, *more], check=True)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the Results")
    parser.add_argument("--page", type=Path, default=RESULTS.with_suffix(".md"))
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that it runs")
    given = parser.parse_args()
    if given.quick and given.output == RESULTS:
        given.output, given.page = Path("runs/p2-quick"), Path("runs/p2-quick.md")
    given.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(study, each, given.output, given.quick) for each in STUDIES]:
            done.result()
    search(given.output, given.quick)
    page = ["p2_page.py", str(given.output), "--page", str(given.page)]
    subprocess.run([sys.executable, str(HERE / page[0]), *page[1:]], check=True)
    print(f"{given.page} written after {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
