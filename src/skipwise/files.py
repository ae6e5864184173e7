"""Files are written whole or not at all."""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from skipwise.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def write_atomically(path: str | Path, content: str) -> Path:
    """Write a text file through a temporary one beside it, so that a reader never sees half of it."""
    return write_bytes_atomically(path, content.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> Path:
    """`write_atomically` for bytes. Raises UserError when the folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)  # temporary files are private by default, results are not
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}. Choose a folder you can write to.") from error
    return path


def read_model(kind: type[Model], path: str | Path, form: str, command: str) -> Model:
    """Read a file of the format `form` that holds one object as JSON. Raises UserError, in one line, for anything else.

    command: what makes such a file, for the message.
    """
    try:
        return kind.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, problem["loc"])) if problem else ""
        reason = f"{where}: {problem['msg']}".removeprefix(": ") if problem else str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable {form} file: {reason}. Make one with `{command}`.") from error


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


def user_cache() -> Path:
    """Where fetched models are kept: $SKIPWISE_CACHE, or ~/.cache/skipwise."""
    return Path(os.environ.get("SKIPWISE_CACHE") or Path.home() / ".cache" / "skipwise")
