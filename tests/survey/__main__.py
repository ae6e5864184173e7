"""Try every class of the installed transformers and diffusers: docs/results/models.json, and docs/models.md from it.

    python -m tests.survey                # all that are not tried yet; where it was stopped, it goes on
    python -m tests.survey --again NAME   # these classes anew

One process at a time takes a share of the classes; where it hangs on one for longer than `--limit` seconds or dies,
that class is noted and the next process goes on behind it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from skipwise.files import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, WORK = ROOT / "docs/results/models.json", ROOT / "docs/models.md", ROOT / "runs/models"
SHARE = 40  # classes a process: libraries keep what they have built


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="classes to try anew")
    parser.add_argument("--limit", type=int, default=240, help="seconds that one class may take")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        return work(given.worker)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in given.again:
        (WORK / f"{name}.json").unlink(missing_ok=True)
    try_all(given.limit)
    gather()


def work(names: list[str]) -> None:
    """In a process of its own: try these classes, and write a file for each."""
    from tests.survey.checks import tried

    for name in names:
        (WORK / "now").write_text(name)
        write_atomically(WORK / f"{name}.json", json.dumps(tried(name)))


def try_all(limit: int) -> None:
    """Run processes until every class has its file."""
    from tests.survey.classes import classes

    names = [name for found in classes().values() for name in found]
    while left := [name for name in names if not (WORK / f"{name}.json").exists()]:
        print(f"{len(names) - len(left)} of {len(names)} classes", flush=True)
        share = left[:SHARE]
        (WORK / "now").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", "tests.survey", "--worker", *share], cwd=ROOT)
        stopped = watch(process, limit)
        now = (WORK / "now").read_text() if (WORK / "now").exists() else share[0]
        if stopped and not (WORK / f"{now}.json").exists():
            write_atomically(WORK / f"{now}.json", json.dumps({"untried": stopped}))


def watch(process: subprocess.Popen, limit: int) -> str | None:
    """Wait for a process, and kill it when its class takes longer than the limit; why it ended early, or None."""
    last, since = "", time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = (WORK / "now").read_text() if (WORK / "now").exists() else ""
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > limit:
            process.kill()
            process.wait()
            return f"did not end within {limit} s"
    return f"its process ended with {process.returncode}" if process.returncode else None


def gather() -> None:
    """The results of all classes in one file, and the page."""
    from tests.survey.classes import classes
    from tests.survey.page import page, versions

    found = {
        group: {name: json.loads((WORK / f"{name}.json").read_text()) for name in names}
        for group, names in classes().items()
    }
    results = {"versions": versions(), "classes": found}
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomically(PAGE, page(results))
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
