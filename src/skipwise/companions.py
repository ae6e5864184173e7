"""A JSON file and the files or folders that it names beside it, replaced together.

No system renames two things at once. So a companion is written under its name and its sum first; then the JSON file,
which says the sum, is replaced; then the companion takes the plain name. Whoever reads takes the one with the sum that
the JSON file says, wherever it lies: at every moment that is the older pair or the newer one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from skipwise.files import folder_held, output_file, partial_folder, put, unwritable, write_atomically

DIGITS = 12  # of the sum, in a name


@dataclass(frozen=True)
class Beside:
    """A file or folder beside a JSON file: its name, its sum as hex digits, what writes it at a new path, and what
    tells the sum of one that is there (None: it is not there, or cannot be read).
    """

    name: str
    sum: str
    write: Callable[[Path], object]
    sum_of: Callable[[Path], str | None]


def write_together(path: str | Path, content: str, beside: Sequence[Beside], names: Sequence[str]) -> Path:
    """Write a JSON file with its companions, or replace them, so that no crash leaves one without the other.

    names: those that companions of this file may have; what killed writers have left under them is removed.
    Raises UserError for what cannot be written.
    """
    path = Path(path)
    output_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_held(path.parent):
            with _written(path.parent, beside):
                write_atomically(path, content)
            for companion in beside:
                _settle(path.parent, companion)
            _clear(path.parent, names)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def find_companion(folder: Path, name: str, sum: str, sum_of: Callable[[Path], str | None]) -> Path:
    """Where the companion with this sum lies; where it would lie, if there is none with it, or no sum is known."""
    if not sum:
        return folder / name
    aside = _aside(folder, name, sum)
    return aside if aside.exists() and sum_of(folder / name) != sum else folder / name


def _aside(folder: Path, name: str, sum: str) -> Path:
    return folder / f"{name}.{sum[:DIGITS]}"


@contextmanager
def _written(folder: Path, beside: Sequence[Beside]) -> Iterator[None]:
    """The companions in place under their sums; gone again when what follows fails."""
    made = []
    try:
        for companion in beside:
            aside = _aside(folder, companion.name, companion.sum)
            if companion.sum_of(folder / companion.name) == companion.sum or aside.exists():
                continue  # there already, whole: such names come by renaming alone
            with partial_folder(folder) as work:
                companion.write(work / "new")
                (work / "new").rename(aside)
            made.append(aside)
        yield
    except BaseException:
        for aside in made:
            _drop(aside)
        raise


def _settle(folder: Path, companion: Beside) -> None:
    """Give the companion its plain name."""
    aside = _aside(folder, companion.name, companion.sum)
    if aside.exists():
        put(aside, folder / companion.name)


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove what lies there under one of the names and a sum."""
    left = re.compile(rf"({'|'.join(map(re.escape, names))})\.[0-9a-f]{{{DIGITS}}}")
    for path in folder.iterdir():
        if left.fullmatch(path.name):
            _drop(path)


def _drop(path: Path) -> None:
    with partial_folder(path.parent) as work:
        path.rename(work / "old")
