"""Dynamic patch sampling: the crop of the training picture grows with the noise (DiT-BlockSkip, arXiv 2603.20755).

At high noise a model decides the layout and sees nearly the whole picture; at low noise it draws details and sees a
small window. Every crop is resized to one fixed training resolution, so the number of tokens is the same for all. The
paper's text leaves the schedule's form open: the three below are ours. Sizes are (width, height) in pixels.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.errors import UserError, unknown

Kind = Literal["linear", "cosine", "step"]


@dataclass(frozen=True)
class PatchSchedule:
    """The crop's side by the noise level t: `smallest` at t = 0, `largest` at t = 1, never falling between.

    kind: "linear"; "cosine", flat at both ends; "step", the one below t = 0.5 and the other from there on.
    smallest, largest: pixels, or, where at most 1, a fraction of the picture's short side. No crop is larger than the
    picture. Raises UserError for an unknown kind, and for limits that are not positive or in the wrong order.
    """

    kind: Kind = "linear"
    smallest: float = 0.5
    largest: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("patch schedule", self.kind, get_args(Kind))
        same_unit = (self.smallest <= 1) == (self.largest <= 1)
        if not self.smallest > 0 or not self.largest > 0 or (same_unit and self.smallest > self.largest):
            raise UserError(
                f"Patches from {self.smallest} to {self.largest} are no range; give a smallest and a largest side, "
                "in pixels or, up to 1, as a fraction of the picture's short side."
            )

    def side(self, t: float, size: tuple[int, int], at_least: int = 1) -> int:
        """The side in pixels at noise level t (0..1) in a picture of this size; at_least where the picture allows."""
        short = min(size)
        low, high = (limit * short if limit <= 1 else limit for limit in (self.smallest, self.largest))
        side = round(low + (max(low, high) - low) * self._growth(t))
        return min(max(side, at_least, 1), short)

    def _growth(self, t: float) -> float:
        if self.kind == "linear":
            return t
        return (1 - math.cos(math.pi * t)) / 2 if self.kind == "cosine" else float(t >= 0.5)


@dataclass(frozen=True)
class Patch:
    """A square of `side` pixels whose upper left corner is at (left, top) of the picture."""

    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Place:
    """Where the tokens of a crop lie in the grid of the whole picture, for models that can be told.

    Row i is at top + i * step, column j at left + j * step, in tokens of that grid. Place() is its corner.
    """

    left: float = 0.0
    top: float = 0.0
    step: float = 1.0


def sample_patch(
    schedule: PatchSchedule,
    size: tuple[int, int],
    t: float,
    *key: int | str,
    mask: Tensor | None = None,
    at_least: int = 1,
) -> Patch:
    """The patch of one draw: its side by the schedule, its centre uniform over the places that keep it inside.

    key: what identifies the draw, such as the seed, the picture's hash and the step. The same key gives the same patch
    on every machine; torch's own generators are not touched.
    mask: (height, width), not negative, of the subject: the centre is drawn from it, and moved where the patch would
    leave the picture. A mask of zeros is as none.
    at_least: smallest side in pixels, such as the training resolution, below which a crop only gets blurred.
    """
    side = schedule.side(t, size, at_least)
    room = (size[0] - side, size[1] - side)  # how far the corner can go
    generator = keyed_generator(*key)
    if mask is not None and bool(mask.any()):
        centre = _draw_from(mask, generator)
        left, top = (min(max(at - side // 2, 0), most) for at, most in zip(centre, room, strict=True))
    else:
        left, top = (int(torch.randint(most + 1, (), generator=generator)) for most in room)
    return Patch(left, top, side)


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by what identifies a draw, whatever was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw_from(mask: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """(column, row) with probability proportional to the mask."""
    weights = mask.double()
    row = int(torch.multinomial(weights.sum(1), 1, generator=generator))  # by rows: multinomial has a size limit
    return int(torch.multinomial(weights[row], 1, generator=generator)), row


def crop_pixels(picture: Tensor, patch: Patch, resolution: int) -> Tensor:
    """The patch of a picture (..., channels, height, width), resized with antialiasing to `resolution` pixels square.

    For the crop before the VAE: exact, and one pass of the VAE for every draw.
    """
    window = picture[..., patch.top : patch.top + patch.side, patch.left : patch.left + patch.side]
    return _resized(window, resolution)


def crop_latents(latents: Tensor, patch: Patch, resolution: int, scale: int) -> Tensor:
    """The same from the latents (..., channels, height / scale, width / scale) of the whole picture.

    patch and resolution in pixels, `scale` pixels a latent pixel; the patch is moved to whole latent pixels. One pass
    of the VAE for all draws, but resized latents are not the latents of a resized picture: benchmarks/patch_space.py.
    """
    height, width = latents.shape[-2:]
    side = min(max(round(patch.side / scale), 1), height, width)
    top, left = min(round(patch.top / scale), height - side), min(round(patch.left / scale), width - side)
    return _resized(latents[..., top : top + side, left : left + side], resolution // scale)


def _resized(window: Tensor, side: int) -> Tensor:
    if window.shape[-2:] == (side, side):
        return window.clone()
    flat = window.reshape(-1, 1, *window.shape[-2:])
    small = F.interpolate(flat, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.reshape(*window.shape[:-2], side, side)


def place_in_picture(patch: Patch, size: tuple[int, int], tokens: int, grid: int) -> Place:
    """Where the crop's `tokens` x `tokens` tokens are when the picture's short side is `grid` tokens long.

    Centres of tokens are mapped to centres, so that the whole of a square picture with tokens == grid is Place().
    """
    unit = grid / min(size)  # tokens of the grid a pixel
    step = patch.side * unit / tokens
    shift = (step - 1) / 2
    return Place(patch.left * unit + shift, patch.top * unit + shift, step)
