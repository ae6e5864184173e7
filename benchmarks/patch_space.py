"""Crop before the VAE or in latent space? The error of latent crops, and the time that they save.

What is measured, on every picture of a folder and at noise levels spread over 0..1: the latents of the cropped picture
(the VAE runs once a draw: exact) against the crop of the picture's latents (the VAE runs once a picture). The error is
the root mean square of their difference over that of the exact latents: 0 is the same, 1.4 unrelated. For scale,
`half_pixel` is the error of the exact latents when the picture is moved by half a latent pixel. Times are medians in
milliseconds, each after one call that is not counted; the ratio is that of one draw, exact over latent, when a picture
is drawn from `--draws` times, its one pass of the VAE counted.

    python benchmarks/patch_space.py PIPELINE --images FOLDER --resolution 512
The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipwise.finetuning.families import family_of
from skipwise.finetuning.family import Family
from skipwise.finetuning.images import Picture, read_pictures
from skipwise.finetuning.patches import PatchSchedule, crop_latents, crop_pixels, sample_patch
from skipwise.finetuning.pipelines import load_pipeline
from skipwise.versions import versions


def distance(one: Tensor, other: Tensor) -> float:
    """Relative root mean square."""
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def milliseconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def measure(family: Family, pipeline: Any, pixels: Tensor, settings: argparse.Namespace) -> list[dict[str, float]]:
    """One row a noise level."""
    schedule = schedule_of(settings)
    size, resolution = (pixels.shape[-1], pixels.shape[-2]), settings.resolution
    whole = family.encode_pixels(pipeline, pixels)
    moved = pixels.roll(family.scale // 2, dims=-1)
    rows = []
    for level in torch.linspace(0, 1, settings.levels).tolist():
        patch = sample_patch(schedule, size, level, settings.seed, str(level))
        exact, beside = (family.encode_pixels(pipeline, crop_pixels(at, patch, resolution)) for at in (pixels, moved))
        latent = crop_latents(whole, patch, resolution, family.scale)
        errors = {"error": distance(latent, exact), "half_pixel": distance(beside, exact)}
        rows.append({"t": level, "side": patch.side} | errors)
    return rows


def timings(family: Family, pipeline: Any, pixels: Tensor, settings: argparse.Namespace) -> dict[str, float]:
    """Of one exact draw, of the whole picture, of one latent draw; the largest crop."""
    size, resolution = (pixels.shape[-1], pixels.shape[-2]), settings.resolution
    patch = sample_patch(schedule_of(settings), size, 1.0, settings.seed)
    whole = family.encode_pixels(pipeline, pixels)
    times = {
        "exact_ms": milliseconds(lambda: family.encode_pixels(pipeline, crop_pixels(pixels, patch, resolution))),
        "whole_ms": milliseconds(lambda: family.encode_pixels(pipeline, pixels)),
        "latent_ms": milliseconds(lambda: crop_latents(whole, patch, resolution, family.scale)),
    }
    return times | {"ratio": times["exact_ms"] / (times["latent_ms"] + times["whole_ms"] / settings.draws)}


def schedule_of(settings: argparse.Namespace) -> PatchSchedule:
    """The one asked for."""
    return PatchSchedule(settings.schedule, settings.smallest, settings.largest)


def whole_tokens(picture: Picture, multiple: int) -> Tensor:
    """Pixels (1, 3, height, width), cut on the right and below to what the model takes."""
    pixels = picture.pixels()[None]
    height, width = (side - side % multiple for side in pixels.shape[-2:])
    return pixels[..., :height, :width]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder or hub id of a pipeline that can be fine-tuned")
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--resolution", type=int, default=512, help="pixels that crops are resized to")
    parser.add_argument("--schedule", default="linear", help="linear, cosine or step")
    parser.add_argument("--smallest", type=float, default=0.5, help="pixels, or up to 1 a fraction of the short side")
    parser.add_argument("--largest", type=float, default=1.0, help="likewise")
    parser.add_argument("--levels", type=int, default=5, help="noise levels a picture")
    parser.add_argument("--draws", type=int, default=100, help="crops a picture that its one encoding serves")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    pictures = read_pictures(settings.images, settings.resolution)
    pipeline = load_pipeline(settings.pipeline)
    family = family_of(pipeline)
    family.check_resolution(pipeline.transformer, settings.resolution)
    pixels = [whole_tokens(picture, family.multiple(pipeline.transformer)) for picture in pictures]
    rows = [row for one in pixels for row in measure(family, pipeline, one, settings)]
    for t in sorted({row["t"] for row in rows}):
        same = [row for row in rows if row["t"] == t]
        side, error, half = (statistics.mean(row[key] for row in same) for key in ("side", "error", "half_pixel"))
        print(f"t {t:.2f}: side {side:.0f}, error {error:.3f}, by half a latent pixel {half:.3f}")
    times = timings(family, pipeline, pixels[0], settings)
    print("exact {exact_ms:.2f} ms, latent {latent_ms:.2f} ms: {ratio:.1f} times".format(**times))
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result = {"pipeline": settings.pipeline, "rows": rows, "times": times, "machine": machine, "versions": versions()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
