"""How much memory a run takes, and how much there is."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

ALLOCATOR = "the peak of torch's CUDA allocator, weights included"
GROWTH = "how much higher the process's resident memory stood at its peak than before the run, weights not included"


@dataclass
class Peak:
    """Filled when the `with` ends; None where it cannot be told."""

    bytes: int | None = None


def memory_is(device: torch.device) -> str:
    """What is measured on this device, in words."""
    return ALLOCATOR if device.type == "cuda" else GROWTH


@contextmanager
def measuring_peak(device: torch.device) -> Iterator[Peak]:
    """The peak of what runs inside: of torch's allocator on CUDA, else of the process's resident memory."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    _give_back()
    resettable = _reset_peak()
    before = _status("VmRSS") if resettable else _largest()
    yield peak
    after = _status("VmHWM") if resettable else _largest()
    if before is not None and after is not None:
        peak.bytes = max(0, after - before)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a model could take on this device now; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = _field(Path("/proc/meminfo"), "MemAvailable")
    limit = Path("/sys/fs/cgroup/memory.max")
    if found is not None and limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found = min(found, int(text) - used)
    return found


def _give_back() -> None:
    """Let the C library return what it holds but does not use, so that it is counted when it is used again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Set the highest resident memory back to what is resident now (Linux). Whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    now, highest = _status("VmRSS"), _status("VmHWM")
    return now is not None and highest is not None and highest <= now + 2**20


def _status(name: str) -> int | None:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> int | None:
    """Bytes of a line such as `VmRSS:  1234 kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _largest() -> int:
    """The highest resident memory of the process so far, which cannot be set back."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
