"""Does the estimate of a fine-tuning's memory hold on a GPU? Full-size FLUX.1-dev with random weights, LoRA steps.

For each variant the model is set up on the device, `--warmup` steps are taken, then `--steps` are timed, one by one.
Measured are torch.cuda.max_memory_allocated (what the estimate is of), max_memory_reserved (what the allocator took
from the device) and the median seconds of a step. Residuals are zeros of the right shape: reading them from a disk is
not in the time. A variant that does not fit is told so.

    python benchmarks/gpu/flux_finetune_memory.py -o docs/results/gpu/flux-finetune-memory.json
    python benchmarks/gpu/flux_finetune_memory.py --tiny          # a tiny FLUX, also without a GPU
On the CPU what is held is counted by torch's profiler, and FLUX takes more than is estimated, which is for CUDA: the
CPU's RMSNorm is made of many ops, which save float32 copies. The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipwise.files import write_atomically
from skipwise.finetuning.memory.estimate import Estimator
from skipwise.finetuning.memory.fitting import consecutive
from skipwise.finetuning.memory.simulation import Stage
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.loading import build_skeleton, load_skeleton
from skipwise.presets import read
from skipwise.versions import versions

MODEL = "flux.1-dev"
TINY = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12], "joint_attention_dim": 64, "pooled_projection_dim": 32}  # fmt: skip
# name -> share of the blocks that are trained, in per cent, and settings besides pictures of 512 px
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA": (100, {}),
    "LoRA, autocast": (100, {"precision": "autocast"}),
    "LoRA, checkpointing": (100, {"checkpointing": True}),
    "BlockSkip half, 512 px": (50, {}),
    "BlockSkip half, 256 px": (50, {"patch": 256}),
    "BlockSkip half, 256 px, autocast": (50, {"patch": 256, "precision": "autocast"}),
    "BlockSkip half, 256 px, checkpointing": (50, {"patch": 256, "checkpointing": True}),
    "BlockSkip half, 256 px, late frozen": (50, {"patch": 256, "late": "frozen"}),
    "BlockSkip 30%, 256 px": (30, {"patch": 256}),
    "BlockSkip 30%, 256 px, checkpointing": (30, {"patch": 256, "checkpointing": True}),
}


def skeleton(tiny: bool) -> nn.Module:
    return build_skeleton(read(MODEL) | TINY, "tiny") if tiny else load_skeleton(MODEL)


def on_cuda(stage: Stage, settings: FinetuneSettings, train: Any, warmup: int, steps: int) -> dict[str, Any]:
    """Peak bytes by torch's allocator, and seconds of a step."""
    torch.cuda.empty_cache()
    seconds = []
    for number, _ in enumerate(stage.run(settings, train, warmup + steps)):
        torch.cuda.synchronize()
        now = time.perf_counter()
        if number == 0:
            torch.cuda.reset_peak_memory_stats()
        elif number > warmup:
            seconds.append(now - before)  # noqa: F821 (of the round before)
        before = time.perf_counter()  # noqa: F841
    peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return peaks | {"seconds_a_step": round(statistics.median(seconds), 4)}


def on_cpu(stage: Stage, settings: FinetuneSettings, train: Any, warmup: int, steps: int) -> dict[str, Any]:
    """Peak bytes by the profiler's events, and seconds of a step under it."""
    began, held, peak = time.perf_counter(), 0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in stage.run(settings, train, warmup + steps):
            pass
    seconds = (time.perf_counter() - began) / (warmup + steps)
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return {"peak_bytes": peak, "reserved_bytes": None, "seconds_a_step": round(seconds, 4)}


def row(estimator: Estimator, stage: Stage, percent: int, changes: dict[str, Any], options: Any) -> dict[str, Any]:
    settings = FinetuneSettings(**{"late": "residual", **changes})
    sizes = estimator.block_bytes(settings.dtype)
    train = consecutive(sizes, sum(map(len, sizes.values())) * percent // 100, "middle")
    estimated = estimator.estimate(settings, train).training.total
    measure = on_cuda if stage.device == "cuda" else on_cpu
    try:
        measured = {"label": "measured", **measure(stage, settings, train, options.warmup, options.steps)}
        ratio = round(estimated / measured["peak_bytes"], 4)
    except torch.cuda.OutOfMemoryError as error:
        measured, ratio = {"label": "did not fit", "error": str(error).splitlines()[0]}, None
    return {
        "estimated_bytes": estimated,
        "estimated_to_measured": ratio,
        "settings": changes,
        "train": train,
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny FLUX instead of the full size")
    parser.add_argument("--variant", action="append", choices=sorted(VARIANTS), help="by default all")
    parser.add_argument("--warmup", type=int, default=2, help="steps before any is timed, at least 1")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="a .json file, written after every variant")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("the full size needs a GPU with room for 32 GiB; without one, use --tiny")
    torch.manual_seed(0)
    estimator = Estimator(skeleton(options.tiny))
    stage = Stage(skeleton(options.tiny), estimator.size, fake=False, device=device)
    result: dict[str, Any] = {
        "model": f"{MODEL} ({'tiny' if options.tiny else 'full size'}, random weights)",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python {' '.join(sys.argv)}",
        "versions": versions() | {"cuda": torch.version.cuda},
        "rows": {},
    }
    for name in options.variant or VARIANTS:
        result["rows"][name] = done = row(estimator, stage, *VARIANTS[name], options)
        measured = done.get("peak_bytes")
        shown = f"{measured / 2**30:.3f} GiB, {done['seconds_a_step']} s a step" if measured else done["label"]
        print(f"{name}: {shown}; estimated {done['estimated_bytes'] / 2**30:.3f} GiB", flush=True)
        if options.output:
            write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
