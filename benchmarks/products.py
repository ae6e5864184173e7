"""Linear maps by torch's default library and by oneDNN (skipwise.models.linear), in turns, on this CPU.

Seconds are the median of each; a ratio above 1 means that oneDNN is quicker. Where `skipwise` takes it is marked. The
third way is oneDNN with a weight that it has packed before (skipwise.models.heads): packed_ratio is what that adds.

    python benchmarks/products.py             # as many threads as torch takes
    OMP_NUM_THREADS=1 python benchmarks/products.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.benchmarking.machine import machine
from skipwise.models import heads, linear

ROWS = (1, 8, 32, 256)
SHAPES = ((64, 160), (96, 384), (512, 512), (512, 1536), (1024, 4096), (512, 126464))  # inputs, outputs


def seconds(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def compare(rows: int, inputs: int, outputs: int, pairs: int) -> dict[str, float]:
    """One shape."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    packed = heads.packed(weight)
    ways = (
        lambda: F.linear(x, weight),
        lambda: linear.by_onednn(x, weight, None),
        lambda: linear.by_onednn(x, packed, None),
    )
    took = [[seconds(way) for way in ways] for _ in range(pairs + 3)][3:]
    default, onednn, third = (statistics.median(column) for column in zip(*took, strict=True))
    rate = 2e-9 * rows * inputs * outputs
    found = {"rows": rows, "inputs": inputs, "outputs": outputs, "default_seconds": default, "onednn_seconds": onednn}
    found |= {"packed_seconds": third, "ratio": default / onednn, "packed_ratio": onednn / third}
    return found | {"default_gflops": rate / default, "onednn_gflops": rate / onednn}


def main() -> None:
    """Print a line a shape, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21, help="of every shape")
    options = parser.parse_args()
    found = []
    with torch.inference_mode():
        for inputs, outputs in SHAPES:
            for rows in ROWS:
                row = compare(rows, inputs, outputs, options.pairs)
                taken = linear.PREFERRED and rows * inputs * outputs >= linear.WORTH * torch.get_num_threads()
                found.append(row | {"taken": taken})
                rates = "{default_gflops:.0f} and {onednn_gflops:.0f} GFLOP/s, {ratio:.2f}; packed {packed_ratio:.2f}"
                print(
                    f"{rows} x ({inputs} to {outputs}): {rates.format(**row)}{', taken' if taken else ''}", flush=True
                )
    print(json.dumps({"machine": machine(torch.device("cpu")).model_dump(), "rows": found}))


if __name__ == "__main__":
    main()
