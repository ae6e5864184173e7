"""What the native modules ask of an official config.json before they translate it."""

from collections.abc import Iterable, Mapping
from typing import Any

from skipwise.errors import UserError


def check_official(
    kind: str, official: Mapping[str, Any], needed: Iterable[str], only: Mapping[str, Any] | None = None
) -> None:
    """Raise UserError for a key that is needed and missing, or set to what the module does not implement.

    only: key -> the one value that is implemented; a missing key or None is taken as that value.
    """
    for key, supported in (only or {}).items():
        if official.get(key) not in (supported, None):
            raise UserError(f"{kind} config has {key}={official[key]!r}; skipwise implements only {key}={supported!r}.")
    missing = [key for key in needed if key not in official]
    if missing:
        raise UserError(f"{kind} config lacks {', '.join(missing)}; is this an official {kind} config.json?")
