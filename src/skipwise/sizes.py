"""Amounts of memory as people write them."""

import re

from skipwise.errors import UserError

GIB = 2**30
UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10, "GB": 10**9, "MB": 10**6, "B": 1}


def parse_bytes(text: str) -> int:
    """`8GiB`, `900 MiB`, `12GB` -> bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not match or match[2].lower() not in units or not float(match[1]):
        raise UserError(f"{text!r} is no amount of memory; write a number and one of {', '.join(UNITS)}, such as 8GiB.")
    return round(float(match[1]) * units[match[2].lower()])


def show_bytes(amount: int) -> str:
    """`8 GiB`."""
    return f"{amount / GIB:.4g} GiB"
