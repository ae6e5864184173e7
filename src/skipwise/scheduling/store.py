"""A search on disk: what it is of, and one line for every finished trial, so that a killed search goes on.

FOLDER/search.json    what trials depend on: models by checksum, tasks, dtype; written once
FOLDER/trials.jsonl   a line a trial, appended and synced as it finishes
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from skipwise.errors import UserError
from skipwise.files import check_writable, parse_json, read_json, write_atomically
from skipwise.identity import flat
from skipwise.scheduling.trials import Outcome, Trial, Work
from skipwise.versions import versions

FORMAT = "skipwise-search/1"


class Store:
    """The folder of a search, held by one process at a time; use it in a `with`.

    Raises UserError when another process holds it, and when its trials are of another model or other settings.
    """

    def __init__(self, folder: str | Path, work: Work):
        self.folder = check_writable(folder)
        self.identity = work.identity()
        self._lock = _locked(self.folder)
        try:
            self._check(work)
            self.known = self._read()
            self._file = (self.folder / "trials.jsonl").open("ab")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._lock.close()

    def get(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial that has been run, under whatever label."""
        return self.known.get(trial.key(self.identity))

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Keep an outcome; when this returns, it is on the disk."""
        key = trial.key(self.identity)
        line = {
            "key": key,
            "label": trial.label,
            "plan": trial.plan and [phase.model_dump() for phase in trial.plan.phases],
            "begin": trial.begin,
            "end": trial.end,
            "outcome": outcome.to_json(),
        }
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known[key] = outcome

    def _check(self, work: Work) -> None:
        path = self.folder / "search.json"
        if not path.exists():
            names = {"model": work.model, "others": work.others}
            content = {"format": FORMAT, "identity": self.identity, "names": names, "versions": versions()}
            write_atomically(path, json.dumps(content, indent=1) + "\n")
            return
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}. Choose another folder.") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT} file. Choose another folder.")
        before, now = flat(found["identity"]), flat(self.identity)
        for what in sorted({*before, *now}):
            if before.get(what) != now.get(what):
                raise UserError(
                    f"{self.folder} holds a search with {what} = {_short(before.get(what))}, this one has "
                    f"{_short(now.get(what))}; they cannot be mixed. Choose another folder."
                )

    def _read(self) -> dict[str, Outcome]:
        """The trials on disk. A last line that was cut short, as its writer was killed, is cut off."""
        path = self.folder / "trials.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        known, good = {}, 0
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut short")
                row = parse_json(line)
                known[row["key"]] = Outcome.from_json(row["outcome"])
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise UserError(f"Line {number} of {path} is damaged; delete that line and start again.") from error
                os.truncate(path, good)
            good += len(line)
        return known


def _locked(folder: Path) -> IO[bytes]:
    """A file whose lock the system frees when this process ends, however it ends."""
    import fcntl  # not on Windows, where the command line must load nevertheless

    file = (folder / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"Another search is running in {folder}; wait for its end, or choose another folder."
        ) from error
    return file


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
