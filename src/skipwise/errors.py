"""Errors that a user can mend: one line that names the value, what is legal and the next step."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(ValueError):
    """A mistake in what was asked for. The command line prints it as one line and exits with code 2."""


@contextmanager
def as_one_line() -> Iterator[None]:
    """Of a command: a user's mistake is one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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
