"""Configs of well-known models, in their official formats, so that estimates work offline and by name."""

import json
from importlib.resources import files
from typing import Any

from skipwise.errors import unknown


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(item.name.removesuffix(".json") for item in files(__name__).iterdir() if item.name.endswith(".json"))


def read(name: str) -> dict[str, Any]:
    """A preset's config as its config.json has it. Raises UserError, with the nearest name, for another."""
    if name not in names():
        raise unknown("preset", name, names())
    return json.loads((files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
