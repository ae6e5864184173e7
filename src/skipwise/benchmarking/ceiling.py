"""What a machine can do at most, measured: FLOP a second of matrix products, bytes a second of memory."""

import time
from collections.abc import Callable, Iterable

import torch

from skipwise.benchmarking.result import Ceiling
from skipwise.models.linear import PREFERRED, product

# rows and columns of square products that reach the rate, and bytes that no cache holds
SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}
BYTES = {"cuda": 2**31, "cpu": 2**28}
SECONDS = 0.4  # that each thing is repeated for


def measure_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> Ceiling:
    """The best that was seen on `device`, at a model's dtype; every candidate is repeated for `seconds`."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    rates = {size: matrix_rate(device, dtype, size, seconds) for size in SIZES[kind]}
    best = max(rates, key=rates.__getitem__)
    speeds = bandwidths(device, BYTES[kind], seconds)
    fastest = max(speeds, key=speeds.__getitem__)
    return Ceiling(
        dtype=str(dtype).removeprefix("torch."),
        matrix_flops=rates[best],
        matrix_size=best,
        bandwidth=speeds[fastest],
        bandwidth_by="copy" if fastest == "copy" else "read",
    )


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """FLOP a second of a product of two square matrices, by torch's way or, if that is quicker, by ours on CPUs."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    ways: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and PREFERRED:
        ways.append(lambda: product(a, b))
    return 2 * size**3 / min(_best(way, device, seconds / len(ways)) for way in ways)


def bandwidths(device: torch.device, amount: int, seconds: float) -> dict[str, float]:
    """Bytes a second of copying (read and written) and of adding up (read) `amount` bytes."""
    source = torch.ones(amount // 4, device=device)
    target = torch.empty_like(source)
    return {
        "copy": 2 * amount / _best(lambda: target.copy_(source), device, seconds),
        "read": amount / _best(source.sum, device, seconds),
    }


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls that `seconds` allow, at least three of them."""
    return min(took for took in _times(call, device, seconds))


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> Iterable[float]:
    call()  # the first one sets up
    ends, count = time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < ends:
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        yield time.perf_counter() - began
        count += 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
