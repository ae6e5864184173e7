"""Held-out English text that comes with the package: three public-domain excerpts (README.md here)."""

from importlib.resources import files
from typing import Literal

from skipwise.errors import unknown


def names() -> list[str]:
    """Names of the documents, sorted."""
    return sorted(item.name.removesuffix(".txt") for item in files(__name__).iterdir() if item.name.endswith(".txt"))


def documents(split: Literal["calibration", "test"]) -> dict[str, str]:
    """name -> text: the first third of each document is for calibration, the rest for testing; none is in both."""
    if split not in ("calibration", "test"):
        raise unknown("split", split, ("calibration", "test"))
    return {name: _part((files(__name__) / f"{name}.txt").read_text(encoding="utf-8"), split) for name in names()}


def _part(text: str, split: str) -> str:
    border = text.index("\n\n", len(text) // 3)
    return text[:border] if split == "calibration" else text[border:].strip()
