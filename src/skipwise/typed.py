"""Settings are checked once, whoever gives them: every field of a dataclass is of its type, and every number finite."""

from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from skipwise.errors import UserError, unknown

_HOW = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)


def check_types(settings: Any) -> None:
    """Turn what can be into its field's type (2.0 into 2, "3" into 3), for a dataclass, which may be frozen.

    Raises UserError, in one line with the field, its value and what is legal, for anything else; of names out of a list
    (`Literal`) with the nearest.
    """
    for name, legal in _names(type(settings)).items():  # type: ignore[arg-type]
        if getattr(settings, name) not in legal:
            raise unknown(name, getattr(settings, name), [word for word in legal if word is not None])
    for name, (hint, adapter) in _adapters(type(settings)).items():  # type: ignore[arg-type]
        value = getattr(settings, name)
        if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
            raise UserError(f"{name}={value}: it takes no yes or no; give a value.")
        try:
            found = adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{name}={value!r}: {reason[0].lower()}{reason[1:]}.") from error
        if found is not value:
            object.__setattr__(settings, name, found)


@cache
def _adapters(cls: Any) -> dict[str, tuple[Any, TypeAdapter]]:
    hints = get_type_hints(cls)
    return {
        field.name: (hints[field.name], TypeAdapter(hints[field.name], config=_HOW))
        for field in fields(cls)
        if field.init and field.name not in _names(cls)
    }


@cache
def _names(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Field -> what it may be, of those that are one name out of a list, or None."""
    hints = get_type_hints(cls)
    found = {}
    for field in fields(cls):
        kinds = [hints[field.name], *get_args(hints[field.name])]
        legal = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if legal:
            found[field.name] = (*legal, *([None] if type(None) in kinds else []))
    return found
