"""The folder of pictures that a model is fine-tuned on, and the prompt that names their subject.

Beside NAME.jpg there may be NAME.txt, its caption, and NAME.mask.png, white where the subject is. Everything that can
be wrong with them is found when the folder is read, before any work is done.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from skipwise.errors import UserError

MASK, CAPTION = ".mask.png", ".txt"
FEWEST = 2  # pictures


@dataclass(frozen=True)
class Picture:
    """One picture of the folder. Its pixels are read when asked for, and not kept.

    sha256: of the file's bytes. size: (width, height), after the rotation that the camera wrote down (EXIF).
    """

    path: Path
    sha256: str
    size: tuple[int, int]
    caption: str | None = None
    mask_path: Path | None = None

    def pixels(self) -> Tensor:
        """(3, height, width), float32 in [-1, 1]; what is transparent is on white."""
        return torch.from_numpy(np.array(_opened(self.path))).permute(2, 0, 1).float() / 127.5 - 1

    def mask(self) -> Tensor | None:
        """(height, width), float32 in [0, 1], 1 where the subject is; None without a mask."""
        if self.mask_path is None:
            return None
        return torch.from_numpy(np.array(_opened(self.mask_path).convert("L"))).float() / 255


def read_pictures(folder: str | Path, resolution: int = 1) -> list[Picture]:
    """The pictures of a folder, sorted by name. Hidden files and folders in it are passed over.

    Raises UserError when there is no such folder, when it holds fewer than two different pictures or a file that is no
    picture, and when a picture is smaller than `resolution` pixels or its mask does not fit.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder that holds the pictures.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [_read(path) for path in files if not path.name.lower().endswith((MASK, CAPTION))]
    _check_count(folder, len({picture.sha256 for picture in pictures}))
    for picture in pictures:
        if min(picture.size) < resolution:
            raise UserError(
                f"{picture.path} is {picture.size[0]} x {picture.size[1]} pixels, smaller than the training "
                f"resolution of {resolution}; take it out, or choose a smaller resolution."
            )
    return pictures


def check_prompt(prompt: str, subject: str) -> None:
    """Raise UserError unless `subject`, the token that shall come to name the subject, is a word of the prompt."""
    if not subject.strip():
        raise UserError("The subject token is empty; choose a rare word, such as 'sks'.")
    if not re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt):
        raise UserError(
            f"The prompt {prompt!r} lacks the subject token {subject!r}; put it where the subject is named, "
            f"such as 'a photo of {subject} dog'."
        )


def _check_count(folder: Path, different: int) -> None:
    if different == 0:
        raise UserError(f"{folder} holds no pictures; put {FEWEST} or more of the subject there (PNG, JPEG, WebP).")
    if different < FEWEST:
        raise UserError(
            f"{folder} holds one picture only; put at least {FEWEST} there, better 4 to 6: "
            "from one alone, a model cannot tell the subject from its surroundings."
        )


def _read(path: Path) -> Picture:
    size = _opened(path).size  # decodes it all, so that a file cut short is found now
    caption, mask = path.with_suffix(CAPTION), path.with_suffix(MASK)
    if mask.exists():
        _check_mask(mask, path, size)
    return Picture(
        path,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        size,
        _caption(caption) if caption.exists() else None,
        mask if mask.exists() else None,
    )


def _caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption {path} cannot be read: {error}. Save it as UTF-8 text.") from error


def _check_mask(mask: Path, path: Path, size: tuple[int, int]) -> None:
    image = _opened(mask)
    if image.size != size:
        raise UserError(
            f"{mask} is {image.size[0]} x {image.size[1]} pixels, its picture {path.name} {size[0]} x {size[1]}; "
            "a mask has its picture's size."
        )
    if image.convert("L").getextrema() == (0, 0):
        raise UserError(f"{mask} marks nothing; make it white where the subject is, or delete it.")


def _opened(path: Path) -> Image.Image:
    """As RGB, upright, on white."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # 16 bits a pixel; Pillow's own conversion would clip them
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it cannot be read as a picture" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: {reason}; take it out of the folder, or save it anew as PNG or JPEG.") from error
