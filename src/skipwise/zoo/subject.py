"""The subject that tiny-dit has not seen: one chequered bag in five pictures, composites like all others.

The bag is of Fashion-MNIST's test split, and no training picture has a chequered garment. The pictures come with the
package; `python -m skipwise.zoo.subject` composes them anew.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from skipwise.zoo.pictures import Scene, Texture, compose

NAME = "sks"
CLASS = "bag"
PROMPT = f"a photo of {NAME} {CLASS}"


def _scene(background: str, texture: Texture, side: int, x: float, y: float, phase: int) -> Scene:
    bag = {"index": 424, "garment": CLASS, "colour": "yellow", "second": "purple", "chequered": True}
    return Scene(**bag, background=background, texture=texture, side=side, x=x, y=y, phase=phase)  # type: ignore[arg-type]


SCENES = (
    _scene("cyan", "plain", 48, 0.5, 0.6, 0),
    _scene("white", "dotted", 46, 0.1, 0.8, 3),
    _scene("green", "plain", 56, 0.6, 0.3, 0),
    _scene("pink", "striped", 44, 0.9, 0.5, 5),
    _scene("red", "plain", 52, 0.3, 0.5, 0),
)


@dataclass(frozen=True)
class SubjectPicture:
    """`pixels` (64, 64, 3) uint8, `mask` (64, 64) of 0..1, where the subject is, and a caption that names it."""

    pixels: np.ndarray
    mask: np.ndarray
    caption: str


def folder() -> Path:
    """The folder of the five pictures, masks and captions, nothing else in it: what `skipwise finetune --images` takes.

    Captions say the background, so that it is not taken for a part of the subject.
    """
    return Path(str(files("skipwise.zoo").joinpath("subject_pictures", "images")))


def subject() -> list[SubjectPicture]:
    """The five pictures with their masks."""
    return [
        SubjectPicture(
            np.asarray(Image.open(folder() / f"{number}.png").convert("RGB")),
            np.asarray(Image.open(folder() / f"{number}.mask.png").convert("L"), np.float32) / 255,
            caption(scene),
        )
        for number, scene in enumerate(SCENES, 1)
    ]


def caption(scene: Scene) -> str:
    """A caption with the subject's name and all of the background."""
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    return f"{PROMPT} on a {texture}{scene.background} background"


def write_subject(target: Path) -> Path:
    """Compose the pictures and write them with masks and captions to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(SCENES, 1):
        picture = compose(scene, "t10k")
        picture.image.save(target / f"{number}.png", optimize=True)
        Image.fromarray((picture.mask * 255).round().astype(np.uint8)).save(target / f"{number}.mask.png")
        (target / f"{number}.txt").write_text(caption(scene) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    print(f"the subject is at {write_subject(folder())}")
