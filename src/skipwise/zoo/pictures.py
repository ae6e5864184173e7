"""Captioned pictures for tiny-dit: a coloured garment on a coloured background, composed from a seed.

A `Scene` says everything that is in a picture, so that captions are true by construction and what a prompt asks for
can be measured exactly. The pictures are composites, not photographs: garments of Fashion-MNIST, scaled, coloured and
pasted on a procedural background, with a soft edge.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from skipwise.zoo.garments import Split, garments

SIDE = 64

# class number in Fashion-MNIST -> word; its shirts look like its tops, so they are left out
GARMENTS = {
    0: "t-shirt",
    1: "trousers",
    2: "pullover",
    3: "dress",
    4: "coat",
    5: "sandal",
    7: "sneaker",
    8: "bag",
    9: "boot",
}
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 220, 60),
    "green": (50, 140, 60),
    "cyan": (70, 205, 215),
    "blue": (30, 80, 205),
    "purple": (120, 45, 160),
    "pink": (245, 150, 195),
    "white": (245, 245, 245),
    "black": (28, 28, 32),
}
TEXTURES = ("plain", "striped", "dotted")
SIDES = {"small": (24, 30), "medium": (36, 44), "large": (50, 58)}  # of a garment, in pixels; medium goes unsaid
OPENINGS = ("", "a photo of", "a picture of")
PERIOD = 12  # of stripes and dots of a background, in pixels
SHADE = 0.8  # brightness of a background's second shade, which covers less than half of it

Size = Literal["small", "medium", "large"]
Texture = Literal["plain", "striped", "dotted"]


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `index` is the garment's number in its split, `x` and `y` its place, 0..1 of what is free.

    second: the garment has horizontal stripes of this colour too; chequered: squares, which no drawn scene has.
    phase: of the background's texture, in pixels.
    """

    index: int
    garment: str
    colour: str
    background: str
    second: str | None = None
    chequered: bool = False
    texture: Texture = "plain"
    size: Size = "medium"
    side: int = 40
    x: float = 0.5
    y: float = 0.5
    phase: int = 0


@dataclass(frozen=True)
class Picture:
    """`pixels` (64, 64, 3) uint8, and `mask` (64, 64) float32: how much of each pixel is the garment."""

    pixels: np.ndarray
    mask: np.ndarray

    @property
    def image(self) -> Image.Image:
        """The picture as Pillow has it."""
        return Image.fromarray(self.pixels)


def draw_scene(random: np.random.Generator, split: Split = "train", striped: float = 0.2) -> Scene:
    """A scene at random: colours that differ, `striped` of the garments so, half of the backgrounds plain."""
    _, labels = garments(split)
    index = int(random.integers(len(labels)))
    while int(labels[index]) not in GARMENTS:
        index = int(random.integers(len(labels)))
    colour, background, second = (str(name) for name in random.permutation(list(COLOURS))[:3])
    size: Size = ("medium", "small", "large")[int(random.choice(3, p=(0.5, 0.2, 0.3)))]
    return Scene(
        index=index,
        garment=GARMENTS[int(labels[index])],
        colour=colour,
        background=background,
        second=second if random.random() < striped else None,
        texture=TEXTURES[int(random.choice(3, p=(0.5, 0.25, 0.25)))],  # type: ignore[arg-type]
        size=size,
        side=int(random.integers(SIDES[size][0], SIDES[size][1] + 1)),
        x=float(random.random()),
        y=float(random.random()),
        phase=int(random.integers(PERIOD)),
    )


def compose(scene: Scene, split: Split = "train") -> Picture:
    """The picture of a scene."""
    grey = garments(split)[0][scene.index]
    bright = np.asarray(Image.fromarray(grey).resize((scene.side, scene.side), Image.Resampling.BICUBIC), np.float32)
    mask = np.zeros((SIDE, SIDE), np.float32)
    light = np.zeros((SIDE, SIDE), np.float32)
    free = SIDE - scene.side
    top, left = round(scene.y * free), round(scene.x * free)
    inside = (slice(top, top + scene.side), slice(left, left + scene.side))
    mask[inside] = np.clip(bright / 80, 0, 1)
    light[inside] = np.clip(bright / max(float(np.percentile(grey[grey > 0], 90)), 1.0), 0, 1)
    pixels = mask[..., None] * _cloth(scene, light) + (1 - mask[..., None]) * _background(scene)
    return Picture(pixels.clip(0, 255).round().astype(np.uint8), mask)


def _cloth(scene: Scene, light: np.ndarray) -> np.ndarray:
    """(64, 64, 3): the garment's colours, darker where the garment is; black is shown by what is lighter in it."""
    colours = np.empty((SIDE, SIDE, 3), np.float32)
    colours[:] = COLOURS[scene.colour]
    if scene.second:
        period = scene.side // 2 if scene.chequered else max(scene.side // 4, 6)
        rows, columns = ((np.arange(SIDE) - round(at * (SIDE - scene.side))) % period for at in (scene.y, scene.x))
        marked = (rows >= period // 2)[:, None] ^ (scene.chequered & (columns >= period // 2))[None, :]
        colours[marked] = COLOURS[scene.second]
    return colours * (0.6 + 0.4 * light[..., None]) + 18 * light[..., None]


def _background(scene: Scene) -> np.ndarray:
    """(64, 64, 3): one colour, or two shades of it in stripes or dots."""
    colours = np.empty((SIDE, SIDE, 3), np.float32)
    colours[:] = COLOURS[scene.background]
    place = (np.arange(SIDE) + scene.phase) % PERIOD
    if scene.texture == "plain":
        return colours
    if scene.texture == "striped":
        marked = np.broadcast_to(place < PERIOD // 3, (SIDE, SIDE))
    else:
        off_centre = (place - (PERIOD - 1) / 2) ** 2
        marked = off_centre[:, None] + off_centre[None, :] < (PERIOD / 3) ** 2
    colours[marked] = shades(scene.background)[1]
    return colours


def shades(colour: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A colour, and the second shade of it that backgrounds have: darker, or lighter for black."""
    first = COLOURS[colour]
    return first, tuple(value + 40 if colour == "black" else value * SHADE for value in first)


def caption(scene: Scene, random: np.random.Generator | None = None) -> str:
    """The whole truth about a scene or, with `random`, an opening and often less: words are left out, none is wrong."""

    def said() -> bool:
        return random is None or random.random() < 0.85

    opening = OPENINGS[int(random.integers(len(OPENINGS)))] if random else OPENINGS[0]
    size = "" if scene.size == "medium" else scene.size
    colour = (f"{scene.colour} and {scene.second}" if scene.second else scene.colour) if said() else ""
    thing = " ".join(filter(None, (size, colour, scene.garment)))
    thing = thing if scene.garment == "trousers" else _with_article(thing)
    texture = "" if scene.texture == "plain" else scene.texture
    surface = _with_article(" ".join(filter(None, (texture, scene.background, "background")))) if said() else ""
    return " ".join(filter(None, (opening, thing, surface and f"on {surface}")))


def _with_article(noun: str) -> str:
    return f"{'an' if noun.startswith('orange') else 'a'} {noun}"


def words() -> list[str]:
    """Every word that a caption can have, sorted."""
    phrases = (*OPENINGS, *GARMENTS.values(), *COLOURS, *TEXTURES[1:], "small large a an and on background")
    return sorted({word for phrase in phrases for word in phrase.split()})
