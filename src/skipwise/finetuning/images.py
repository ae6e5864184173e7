"""The folder of pictures that a model is fine-tuned on, and the prompt that names their subject.

Beside NAME.jpg there may be a caption (`skipwise.finetuning.captions`) and NAME.mask.png, white where the subject is.
Pictures may have any size and shape: they are resized and cropped as diffusers' DreamBooth scripts do it. Everything
that can be wrong with them is found when the folder is read, before any work is done.
"""

import hashlib
import mimetypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from skipwise.errors import UserError
from skipwise.finetuning.captions import Captions, is_caption, read_captions

MASK = ".mask.png"
FEWEST = 2  # pictures
FIRST_IS_ALL = ("MPO", "PSD")  # formats whose first frame is the picture: phones' previews, layers
WHITE, TURNED = "transparent parts on white", "turned as the camera noted"

Tell = Callable[[str], None]  # a line for people


@dataclass(frozen=True)
class Picture:
    """One picture of the folder. Its pixels are read when asked for, and not kept.

    sha256: of the file's bytes. size: (width, height), after the rotation that the camera wrote down (EXIF) and after
    the cut of `squared`. caption_file: where the caption is from. changes: what was done to the pixels, in words.
    """

    path: Path
    sha256: str
    size: tuple[int, int]
    caption: str | None = None
    mask_path: Path | None = None
    caption_file: str | None = None
    changes: tuple[str, ...] = ()
    is_squared: bool = False

    def pixels(self) -> Tensor:
        """(3, height, width), float32 in [-1, 1]; what is transparent is on white."""
        return self._cut(torch.from_numpy(np.array(_opened(self.path))).permute(2, 0, 1)).float() / 127.5 - 1

    def mask(self) -> Tensor | None:
        """(height, width), float32 in [0, 1], 1 where the subject is; None without a mask."""
        if self.mask_path is None:
            return None
        return self._cut(torch.from_numpy(np.array(_opened(self.mask_path).convert("L")))).float() / 255

    def squared(self) -> "Picture":
        """Its centre alone, a square as long as the shorter side."""
        if self.size[0] == self.size[1]:
            return self
        changes = (*self.changes, f"the centre of {self.size[0]} x {self.size[1]}")
        return replace(self, size=(min(self.size),) * 2, changes=changes, is_squared=True)

    @property
    def identity(self) -> str:
        """What the pixels are: the sha256, with what was cut."""
        return f"{self.sha256}-squared" if self.is_squared else self.sha256

    def resized(self, resolution: int) -> str:
        """How it becomes `resolution` pixels square, in words."""
        width, height = self.size
        short = min(self.size)
        steps = [f"{width} x {height}", *self.changes]
        if short != resolution:
            steps.append(f"resized to {resolution * width // short} x {resolution * height // short}")
        if width != height:
            steps.append(f"random crops of {resolution} x {resolution}")
        return ", ".join(steps)

    def _cut(self, pixels: Tensor) -> Tensor:
        """The centre of (..., height, width) when that alone is wanted."""
        if not self.is_squared:
            return pixels
        side = min(pixels.shape[-2:])
        top, left = ((length - side) // 2 for length in pixels.shape[-2:])
        return pixels[..., top : top + side, left : left + side]


def read_pictures(folder: str | Path, resolution: int = 1, tell: Tell | None = None) -> list[Picture]:
    """The pictures of a folder, sorted by name, with their captions. Hidden files and folders in it are passed over.

    resolution: in pixels; a picture with a shorter side is enlarged, which is told. tell: is given a line on every such
    picture, on files that are no pictures, and on captions and masks of none.
    Raises UserError when there is no such folder, when it holds fewer than two different pictures, for a picture that
    is damaged or animated, for captions that cannot be read or contradict each other, and for a mask that does not fit.
    """
    folder, tell = Path(folder).expanduser(), tell or (lambda line: None)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder that holds the pictures.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    masks = {path.name[: -len(MASK)]: path for path in files if path.name.lower().endswith(MASK)}
    others = [path for path in files if path not in masks.values() and not is_caption(path)]
    sizes = {path: found for path in others if (found := _size(path))}
    captions = read_captions(files, list(sizes))
    pictures = [_picture(path, *sizes[path], masks.get(path.stem), captions) for path in sizes]
    _check_count(folder, len({picture.sha256 for picture in pictures}))
    lone = [path.name for stem, path in masks.items() if stem not in {picture.stem for picture in sizes}]
    _tell_rest(tell, [path.name for path in others if path not in sizes], captions.unused, lone)
    for picture in pictures:
        if min(picture.size) < resolution:
            size = f"{picture.size[0]} x {picture.size[1]}"
            tell(f"{picture.path.name} has {size} pixels, fewer than the resolution of {resolution}: it is enlarged")
    return pictures


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in the text as a whole word."""
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text))


def check_prompt(prompt: str, subject: str) -> None:
    """Raise UserError unless `subject`, the token that shall come to name the subject, is a word of the prompt."""
    if not subject.strip():
        raise UserError("The subject token is empty; choose a rare word, such as 'sks'.")
    if not has_word(prompt, subject):
        raise UserError(
            f"The prompt {prompt!r} lacks the subject token {subject!r}; put it where the subject is named, "
            f"such as 'a photo of {subject} dog'."
        )


def _tell_rest(tell: Tell, strange: Sequence[str], captions: Sequence[str], masks: Sequence[str]) -> None:
    """Of everything in the folder that is not used."""
    for what, names in (
        ("no pictures, passed over", strange),
        ("captions without a picture", captions),
        ("masks without a picture", masks),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            tell(f"{what}: {', '.join(names[:8])}{more}")


def _check_count(folder: Path, different: int) -> None:
    if different == 0:
        inside = next((path.name for path in sorted(folder.iterdir()) if path.is_dir()), None)
        hint = f"; folders in it, such as {inside}, are not read" if inside else ""
        raise UserError(
            f"{folder} holds no pictures{hint}; put {FEWEST} or more of the subject there (PNG, JPEG, WebP)."
        )
    if different < FEWEST:
        raise UserError(
            f"{folder} holds one picture only; put at least {FEWEST} there, better 4 to 6: "
            "from one alone, a model cannot tell the subject from its surroundings."
        )


def _size(path: Path) -> tuple[tuple[int, int], tuple[str, ...]] | None:
    """(width, height) of a picture, and what opening it changed; None for a file that is none, nor is called so.

    Decodes it all, so that a file cut short is found now.
    """
    try:
        changes: list[str] = []
        return _opened(path, changes).size, tuple(changes)
    except UserError:
        if (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
            raise
        return None


def _picture(
    path: Path, size: tuple[int, int], changes: tuple[str, ...], mask: Path | None, captions: Captions
) -> Picture:
    if mask is not None:
        _check_mask(mask, path, size)
    caption = captions.captions.get(path.name)
    return Picture(
        path,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        size,
        caption.text if caption else None,
        mask,
        caption.source if caption else None,
        changes,
    )


def _check_mask(mask: Path, path: Path, size: tuple[int, int]) -> None:
    image = _opened(mask)
    if image.size != size:
        raise UserError(
            f"{mask} is {image.size[0]} x {image.size[1]} pixels, its picture {path.name} {size[0]} x {size[1]}; "
            "a mask has its picture's size."
        )
    if image.convert("L").getextrema() == (0, 0):
        raise UserError(f"{mask} marks nothing; make it white where the subject is, or delete it.")


def _opened(path: Path, changes: list[str] | None = None) -> Image.Image:
    """As RGB, upright, on white. changes: what of this was done is added to it."""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1 and file.format not in FIRST_IS_ALL:
                raise ValueError(f"it has {frames} frames, a picture has one")
            image = ImageOps.exif_transpose(file)
            if changes is not None and file.getexif().get(0x0112, 1) > 1:
                changes.append(TURNED)
            if image.mode in ("I", "F"):
                raise ValueError(f"it has 32 bits a pixel (mode {image.mode}), whose white is unknown")
            if image.mode.startswith("I;16"):  # 16 bits a pixel; Pillow's own conversion would clip them
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            if not image.has_transparency_data:
                return image.convert("RGB")
            if changes is not None:
                changes.append(WHITE)
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # of a damaged file Pillow's decoders raise nearly everything
        reason = "it cannot be read as a picture" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: {reason}; take it out of the folder, or save it anew as PNG or JPEG.") from error
