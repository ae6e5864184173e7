"""Errors that a user can mend: one line that names the value, what is legal and the next step."""

import difflib
import importlib
import os
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn


class UserError(ValueError):
    """A mistake in what was asked for. The command line prints it as one line and exits with code 2."""


@contextmanager
def as_one_line() -> Iterator[None]:
    """Of a command: every end is one line on stderr. A user's mistake, or a machine that cannot, exits with code 2; a
    fault of ours with code 1, and the line says which file holds the traceback.
    """
    try:
        with _notes():
            yield
    except (UserError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        reason = "there is not enough memory." if isinstance(error, MemoryError) else str(error)
        _end(reason, 2)
    except KeyboardInterrupt:
        _end("stopped.", 130)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        if kind == "OutOfMemoryError":
            _end(f"there is not enough memory on the device: {told}", 2)
        _end(f"a fault in skipwise ({kind}: {told}); please report it with {_traceback_file()}", 1)


def _end(line: str, code: int) -> NoReturn:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def _traceback_file() -> str:
    """Where the traceback of the error that is being handled, and the command, are written to."""
    command = " ".join(map(shlex.quote, sys.argv))
    with tempfile.NamedTemporaryFile("w", prefix="skipwise-fault-", suffix=".txt", delete=False) as file:
        file.write(f"{command}\n{traceback.format_exc()}")
    return file.name


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings as one line each, without the line of code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def unknown(kind: str, value: object, legal: Iterable[str]) -> UserError:
    """The error for a name that is none of `legal`, with the nearest match."""
    names = sorted(legal)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {kind} {value!r}.{hint} Available: {', '.join(names) or 'none'}.")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"This needs {package}, which is not installed. Install it with: pip install 'skipwise[{extra}]'"
        ) from error
