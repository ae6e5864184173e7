"""What `dtype=` and `device=` mean, in every function and on every command that takes them."""

import torch

from skipwise.errors import UserError, unknown
from skipwise.loading.classes import DTYPES

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Dtype = torch.dtype | str | None
Device = torch.device | str | int | None


def read_dtype(dtype: Dtype) -> torch.dtype | None:
    """The dtype that is meant: one of DTYPES by name, as torch's own, or short ("bf16"); None or "auto" is None.

    Raises UserError for any other.
    """
    name = dtype_name(dtype)
    return None if name is None else DTYPES[name]


def dtype_name(dtype: Dtype) -> str | None:
    """As `read_dtype`, its name among DTYPES."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise unknown("dtype", str(dtype), DTYPES)
    return name


def read_device(device: Device) -> torch.device | None:
    """The device that is meant, which this machine has; None is None.

    Raises UserError for what is no device that weights can be on, and for one that is not here.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"device={str(device)!r} is no device; use {_legal()}, or leave it out.") from error
    if not _is_here(found):
        raise UserError(f"There is no device {str(found)!r} for weights on this machine; use {_legal()}.")
    return found


def _is_here(device: torch.device) -> bool:
    accelerator, count = _accelerator()
    if device.type == "cpu":
        return True
    return device.type == accelerator and (device.index or 0) < count


def _accelerator() -> tuple[str | None, int]:
    """Its type, such as cuda, and how many there are."""
    if not torch.accelerator.is_available():
        return None, 0
    found = torch.accelerator.current_accelerator()
    return (found.type, torch.accelerator.device_count()) if found else (None, 0)


def _legal() -> str:
    accelerator, count = _accelerator()
    if accelerator is None:
        return "cpu (torch finds no GPU here; if there is one, its driver and a build of torch for it are needed)"
    return f"cpu, or {accelerator} ({accelerator}:0{f' to {accelerator}:{count - 1}' if count > 1 else ''})"
