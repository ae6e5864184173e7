"""Files and folders are there whole or not at all, and are replaced whole: a reader finds the older or the newer.

What is being written lies beside its place under a name that begins with `PARTIAL`, and is renamed at the end. Its
writer holds a lock on it, which the system frees when that process ends, however it ends: what lies there unlocked was
left by a writer that was killed, and the next writer in that folder removes it.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from skipwise.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing that could be somebody's is removed
    fcntl = None  # type: ignore[assignment]

Model = TypeVar("Model", bound=BaseModel)
PARTIAL = ".skipwise-partial-"


def write_atomically(path: str | Path, content: str) -> Path:
    """Write a text file, or replace it, so that nobody reads half of it. Raises UserError as `replacing`."""
    return write_bytes_atomically(path, content.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> Path:
    """`write_atomically` for bytes."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file to write, which takes the place of `path` when the `with` ends well, and vanishes otherwise.

    A symbolic link is followed. Raises UserError when the file cannot be written, and for what is no regular file.
    """
    path = Path(path)
    try:
        target = output_file(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(target.parent) as partial:
            yield partial
            partial.chmod(0o644)  # temporary files are private by default, results are not
            os.replace(partial, target)
    except OSError as error:
        raise unwritable(path, error) from error


def output_file(path: str | Path) -> Path:
    """Where a file of this name lies, or will. Raises UserError for a folder, a pipe, a device."""
    path = Path(path)
    try:
        found = Path(os.path.realpath(path)) if path.is_symlink() else path
        if found.exists() and not found.is_file():
            what = "a folder" if found.is_dir() else "no ordinary file"
            raise UserError(f"{path} is {what}; give the name of a file, one to make or to replace.")
    except OSError as error:
        raise unwritable(path, error) from error
    return found


@contextmanager
def partial_file(folder: Path) -> Iterator[Path]:
    """An empty file in the folder, for its caller to fill and to rename; what is not renamed is removed."""
    remove_partials(folder)
    with _held(lambda: _made_file(folder)) as partial:
        yield partial


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """`partial_file` for an empty folder."""
    remove_partials(folder)
    with _held(lambda: Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))) as partial:
        yield partial


@contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """One writer at a time in the folder, of those who ask so; where the system has no locks, as many as there are.

    One that is being made is its writer's, who holds it already.
    """
    if fcntl is None or folder.name.startswith(PARTIAL):
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left in the folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError), _unheld(left):
            _remove(left)


def put(new: Path, target: Path) -> None:
    """Rename a whole file or folder to `target`, where another one may lie, which is removed.

    For a moment there is none: the caller says where a reader finds the new one then.
    """
    with partial_folder(target.parent) as aside:
        if target.exists():
            target.rename(aside / "old")
        try:
            new.rename(target)
        except OSError:
            (aside / "old").rename(target)
            raise


def _made_file(folder: Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=PARTIAL, dir=folder)
    os.close(descriptor)
    return Path(name)


@contextmanager
def _held(make: Callable[[], Path]) -> Iterator[Path]:
    """What `make` made, locked, and removed at the end unless it was renamed."""
    partial, lock = _made_and_locked(make)
    try:
        yield partial
    finally:
        _remove(partial)
        if lock is not None:
            os.close(lock)


def _made_and_locked(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """What `make` made, and the lock on it; made again where another writer removed it before it was locked."""
    while True:
        partial = make()
        if fcntl is None:
            return partial, None
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # some network disks have no locks: nobody can hold this one, nor remove it
                fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():
                return partial, lock
            os.close(lock)


@contextmanager
def _unheld(path: Path) -> Iterator[None]:
    """A lock on what nobody holds. Raises BlockingIOError where its writer still lives."""
    if fcntl is None:
        raise BlockingIOError(f"{path} may be held: this system has no locks of this kind")
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> UserError:
    """What is raised where the system does not let a file or folder be written."""
    return UserError(f"Cannot write {path}: {error.strerror or error}. Choose a folder you can write to.")


def read_model(kind: type[Model], path: str | Path, form: str, command: str) -> Model:
    """Read a file of the format `form` that holds one object as JSON. Raises UserError, in one line, for anything else.

    command: what makes such a file, for the message.
    """
    try:
        return parse_model(kind, path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable {form} file: {reason_of(error)}. Make one with `{command}`."
        ) from error


def parse_model(kind: type[Model], path: str | Path) -> Model:
    """The object in a JSON file. Raises OSError or ValueError, of which `reason_of` makes words, for anything else."""
    return kind.model_validate(read_json(path))


def read_json(path: str | Path | Traversable) -> Any:
    """What a JSON file holds. Raises OSError or ValueError, and nothing else, for a file that cannot be read."""
    return parse_json((Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The value in a text. Raises ValueError, and nothing else, for one that holds none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, on one line: of what pydantic says, the first field."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")


def write_state(path: str | Path, state: dict[str, Any]) -> Path:
    """`write_atomically` for the state of a training run, to be read with `torch.load(path, weights_only=True)`."""
    import torch  # most of those who write files have no need of it

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return write_bytes_atomically(path, buffer.getvalue())


def check_writable(folder: str | Path) -> Path:
    """Make the folder, or raise UserError before any work is done that could not be kept."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(
            f"Cannot write in {folder}: {error.strerror or error}. Choose a folder you can write to."
        ) from error


def check_output(path: str | Path) -> Path:
    """Raise UserError, before any work is done, when no file of this name could be written."""
    output_file(path)
    check_writable(Path(path).parent)
    return Path(path)


def user_cache() -> Path:
    """Where fetched models are kept: $SKIPWISE_CACHE, or ~/.cache/skipwise."""
    return Path(os.environ.get("SKIPWISE_CACHE") or Path.home() / ".cache" / "skipwise")
