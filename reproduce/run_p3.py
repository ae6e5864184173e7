"""`make reproduce-p3`: memory tables and everything about paper 3 that fits on two cores in half an hour, and the page.

Estimates the memory of FLUX.1-dev, SD3-medium and SANA-1.6B, fine-tunes tiny-dit in every way with three seeds, and
makes docs/results/p3.md. Other tiny-dits than the shipped one: docs/results/p3/README.md.
"""

import json
import subprocess
import sys
from pathlib import Path

from running import HERE, Run, run_script

from skipwise.files import write_atomically

GROUPS = ("late", "tricks", "schedules", "rules")
BENCHMARKS = HERE.parent / "benchmarks"
SUBJECT = HERE.parent / "src" / "skipwise" / "zoo" / "subject_pictures" / "images"


def study(group: str, output: Path, quick: bool) -> None:
    """All ways of one group."""
    run_script("p3.py", group, "--output", str(output), *(["--quick"] if quick else []))


def measure(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def crop(output: Path) -> None:
    """Crops before the autoencoder against crops of latents, on tiny-dit."""
    printed = measure("patch_space.py", "tiny-dit", "--images", str(SUBJECT), "--resolution", "32")
    write_atomically(output / "crops.json", json.dumps(json.loads(printed.splitlines()[-1]), indent=1) + "\n")


def main() -> None:
    """Estimate, train, judge, and write the page."""
    run = Run.asked(__doc__, "p3", "a few steps")
    run.output.mkdir(parents=True, exist_ok=True)
    measure("memory_finetune.py", "-o", str(run.output / "memory.json"))
    crop(run.output)
    run.two_at_a_time(study, GROUPS)
    run.write_page("p3_page.py")


if __name__ == "__main__":
    main()
