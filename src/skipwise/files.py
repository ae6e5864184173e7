"""Files are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from skipwise.errors import UserError


def write_atomically(path: str | Path, content: str) -> Path:
    """Write a text file through a temporary one beside it, so that a reader never sees half of it."""
    return write_bytes_atomically(path, content.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> Path:
    """`write_atomically` for bytes. Raises UserError when the folder cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # temporary files are private by default, results are not
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}. Choose a folder you can write to.") from error
    return path
