"""Does a skipped block cost anything? Time under a static plan / time of the model with those blocks deleted.

What is measured: one forward under `skip` against one of a copy whose blocks were really deleted, in turns in one
process, `--pairs` pairs after `--warmup`; the order within a pair alternates. The figure is the median of the pairs'
ratios with its 95% bootstrap interval; 1.00 means that a skipped block costs nothing. Entering and leaving the plan is
not in the ratio; entering is timed apart, once, in milliseconds.

    python benchmarks/skip_overhead.py                        # tiny-dllm, tiny-ar and a toy of Chroma (keeps places)
    python benchmarks/skip_overhead.py --model smollm2-135m
The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import json
import platform
import statistics
import time

import torch
from torch import nn

import skipwise as sw
from skipwise.benchmarking.timing import in_turns, ratio
from skipwise.blocks import find_contract
from skipwise.examples import Size, example_inputs
from skipwise.plan import Plan
from skipwise.versions import versions


def chroma() -> nn.Module:
    """A toy of Chroma, whose skipped blocks leave a pass-through in their place; large enough to time."""
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 4, "num_single_layers": 12, "num_attention_heads": 4, "attention_head_dim": 32}
    sizes |= {"approximator_num_channels": 16, "approximator_hidden_dim": 64, "approximator_layers": 1}
    return ChromaTransformer2DModel(in_channels=16, joint_attention_dim=64, axes_dims_rope=(8, 12, 12), **sizes).eval()


def deleted(model: nn.Module, stack: str, numbers: list[int]) -> nn.Module:
    """A copy without these blocks. Its outputs differ where a model minds block numbers; its work does not."""
    other = copy.deepcopy(model)
    blocks = other.get_submodule(stack)
    for number in sorted(numbers, reverse=True):
        del blocks[number]
    return other


def measure(name: str, model: nn.Module, pairs: int, warmup: int) -> dict[str, object]:
    """The ratio for one model, a quarter of its longest stack skipped."""
    model = copy.deepcopy(model)  # as the deleted one is: weights mapped from a file are read more slowly than copies
    contract = find_contract(model)
    stack = contract.main_stack
    numbers = list(range(1, contract.stacks[stack].length, 4))
    short, plan = deleted(model, stack, numbers), Plan.static(contract.shape, {stack: numbers})
    inputs = example_inputs(model, Size(tokens=64, image=16, text=32, batch=1))
    began = time.perf_counter()
    with sw.skip(model, plan), torch.no_grad():
        entered = time.perf_counter() - began
        calls = {"under": lambda: model(**inputs), "removed": lambda: short(**inputs)}
        seconds = in_turns(calls, pairs, warmup)
    kind = "pass-through in place" if contract.stacks[stack].in_place else "removed"
    return {
        "model": name,
        "skipped": f"{len(numbers)} of {contract.stacks[stack].length}",
        "how": kind,
        **ratio(seconds["under"], seconds["removed"]).rounded(4),
        "milliseconds": round(1000 * statistics.median(seconds["removed"]), 3),
        "entering_ms": round(1000 * entered, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a model that `skipwise.load` takes; repeat for several")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    settings = parser.parse_args()
    models = [(name, lambda name=name: sw.load(name)[0]) for name in settings.model or ("tiny-dllm", "tiny-ar")]
    if not settings.model:
        models.append(("chroma-toy", chroma))
    rows = []
    for name, build in models:
        rows.append(measure(name, build(), settings.pairs, settings.warmup))
        print("{model}: {skipped} skipped ({how}): {ratio} ({low} to {high})".format(**rows[-1]))
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({"rows": rows, "machine": machine, "versions": versions()}))


if __name__ == "__main__":
    main()
