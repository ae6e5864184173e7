"""How much memory does fine-tuning an image DiT take? Paper 3's tricks, each alone and together: estimates, no weights.

One LoRA training step of the full-size model is played on fake tensors (`skipwise.finetuning.memory`): the transformer
alone, bfloat16 weights, rank 16 on attention projections, batch 1. "half" and "30%" train that share of the blocks, by
number, in the middle of their order. Reductions are against ordinary LoRA on pictures of 512 px, without and with
gradient checkpointing. Every figure is an estimate of what torch's allocator hands out; the device needs more.

    python benchmarks/memory_finetune.py                          # the tables, in Markdown
    python benchmarks/memory_finetune.py --model flux.1-dev -o docs/results/memory.json
The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import time
from pathlib import Path
from typing import Any

from skipwise.files import write_atomically
from skipwise.finetuning.memory.estimate import Estimator, MemoryEstimate
from skipwise.finetuning.memory.fitting import Place, consecutive
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.report.memory import markdown
from skipwise.sizes import GIB
from skipwise.versions import versions

MODELS = ("flux.1-dev", "sd3-medium", "sana-1.6b")
ALL, CHECKPOINTED = "LoRA on all blocks", "LoRA, checkpointing"
# name -> share of the blocks that are trained, in per cent, and settings besides pictures of 512 px
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    ALL: (100, {}),
    CHECKPOINTED: (100, {"checkpointing": True}),
    "patches alone": (100, {"patch": 256}),
    "patches, checkpointing": (100, {"patch": 256, "checkpointing": True}),
    "half the blocks alone": (50, {}),
    "half, patches": (50, {"patch": 256}),
    "half, patches, checkpointing": (50, {"patch": 256, "checkpointing": True}),
    "half, patches, late frozen": (50, {"patch": 256, "late": "frozen"}),
    "half, patches, late streamed": (50, {"patch": 256, "late": "streamed"}),
    "last half, patches": (50, {"patch": 256, "late": "none"}),
    "last half, checkpointing": (50, {"checkpointing": True, "late": "none"}),
    "30%, patches": (30, {"patch": 256}),
    "30%, patches, checkpointing": (30, {"patch": 256, "checkpointing": True}),
    "30%, patches, checkpointing, 8-bit": (30, {"patch": 256, "checkpointing": True, "optimiser": "adamw8bit"}),
    "LoRA, autocast as CUDA's": (100, {"precision": "autocast"}),
    "half, patches, autocast as CUDA's": (50, {"patch": 256, "precision": "autocast"}),
    "LoRA, pure bfloat16": (100, {"precision": "pure"}),
}


def rows_of(estimator: Estimator) -> dict[str, MemoryEstimate]:
    sizes = estimator.block_bytes("bfloat16")
    total = sum(map(len, sizes.values()))
    rows = {}
    for name, (percent, changes) in VARIANTS.items():
        place: Place = "end" if changes.get("late") == "none" else "middle"
        train = consecutive(sizes, total * percent // 100, place)
        rows[name] = estimator.estimate(FinetuneSettings(**{"late": "residual", **changes}), train)
    return rows


def table(name: str, estimator: Estimator, rows: dict[str, MemoryEstimate]) -> str:
    first = next(iter(rows.values()))
    encoders = ", ".join(f"{part} {size / GIB:.2f}" for part, size in first.text_encoders.items())
    return (
        f"### {name} (estimated, GiB)\n\n{markdown(rows, ALL, CHECKPOINTED)}\n"
        f"Before the training: encoding of pictures {first.encoding.total / GIB:.2f} on the device; text encoders, on "
        f"the host, {encoders}. Stored residuals a draw: {rows['half, patches'].record / 2**20:.2f} MiB with half the "
        f"blocks at 256 px, {rows['half the blocks alone'].record / 2**20:.2f} MiB at 512 px.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"preset or folder; by default {', '.join(MODELS)}")
    parser.add_argument("-o", "--output", type=Path, help="a .json file; the tables go beside it as .md")
    options = parser.parse_args()
    began, content, tables = time.perf_counter(), {}, []
    for name in options.model or MODELS:
        estimator = Estimator(name)
        rows = rows_of(estimator)
        content[name] = {variant: row.to_json() for variant, row in rows.items()}
        tables.append(table(name, estimator, rows))
        print(tables[-1], flush=True)
    result = {
        "label": "estimated",
        "unit": "bytes",
        "models": content,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }
    if options.output:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
        write_atomically(options.output.with_suffix(".md"), "\n".join(tables))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
