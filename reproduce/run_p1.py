"""`make reproduce-p1`: everything about paper 1 that fits on two cores in an hour, and the page that shows it.

Studies the shipped models (seed 0) and SmolLM2-135M, two at a time, and makes docs/results/p1.md from their Results and
from those of seeds 1 and 2, which are kept in docs/results/p1. How those were made: docs/results/p1/README.md.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skipwise.files import user_cache

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "p1"
# model -> models to hold its states beside; those that take longest come first
STUDIES = {
    "smollm2-135m": (),
    "tiny-ar2dllm": ("tiny-ar", "tiny-dllm"),
    "tiny-dllm": ("tiny-ar",),
    "tiny-ar": (),
}


def study(model: str, output: Path, quick: bool) -> None:
    """Retention and states of one model."""
    label = model if model.startswith("smollm2") else f"{model}-0"
    common = ["--label", label, "--output", str(output), *(["--quick"] if quick else [])]
    beside = [word for other in STUDIES[model] for word in ("--beside", other, f"{other}-0")]
    for script, more in (("p1.py", []), ("p1_states.py", beside)):
        subprocess.run([sys.executable, str(HERE / script), model, *common, *more], check=True)


def main() -> None:
    """Run the studies and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the Results")
    parser.add_argument("--page", type=Path, default=RESULTS.with_suffix(".md"))
    parser.add_argument("--quick", action="store_true", help="a few small plans, to see that it runs")
    given = parser.parse_args()
    if given.quick and given.output == RESULTS:
        given.output = Path("runs/p1-quick")
    began = time.monotonic()
    models = [m for m in STUDIES if m != "smollm2-135m" or (user_cache() / m / "config.json").exists()]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(study, model, given.output, given.quick) for model in models]:
            done.result()
    minutes = f"after {(time.monotonic() - began) / 60:.0f} minutes"
    if given.quick:
        print(f"all studies ran {minutes}; a quick run has too few plans for the page")
        return
    page = ["p1_page.py", str(given.output), "--page", str(given.page)]
    subprocess.run([sys.executable, str(HERE / page[0]), *page[1:]], check=True)
    print(f"{given.page} written {minutes}")


if __name__ == "__main__":
    main()
