"""What the commands `make reproduce-p1` to `-p3` have in common. Imports no torch: the studies need the memory."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"

Study = TypeVar("Study")


@dataclass(frozen=True)
class Run:
    """Where Results and their page go; a quick run only shows that everything runs."""

    output: Path
    page: Path
    quick: bool
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def asked(cls, what: str | None, paper: str, quickly: str) -> "Run":
        """From the command line. Where nothing else is said, a quick run leaves docs/results as it is."""
        results = RESULTS / paper
        parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output", type=Path, default=results, help="folder of the Results")
        parser.add_argument("--page", type=Path, default=results.with_suffix(".md"))
        parser.add_argument("--quick", action="store_true", help=f"{quickly}, to see that it runs")
        given = parser.parse_args()
        if given.quick and given.output == results:
            given.output, given.page = Path(f"runs/{paper}-quick"), Path(f"runs/{paper}-quick.md")
        return cls(given.output, given.page, given.quick)

    def two_at_a_time(self, study: Callable[[Study, Path, bool], None], studies: Iterable[Study]) -> None:
        """Make all studies, one a core; the first error is raised when those under way are done."""
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(study, each, self.output, self.quick) for each in studies]:
                done.result()

    def write_page(self, script: str) -> None:
        """Have the page written."""
        run_script(script, str(self.output), "--page", str(self.page))
        print(f"{self.page} written {self.after}")

    @property
    def after(self) -> str:
        """How long it took so far."""
        return f"after {(time.monotonic() - self.began) / 60:.0f} minutes"


def run_script(name: str, *arguments: str) -> None:
    """Run a script of this folder in a process of its own."""
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True)
