"""The ways in which a diffusion transformer takes its latents: as a grid of pixels, or as tokens."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from skipwise.examples.size import Size
from skipwise.examples.tensors import round_up

CHANNELS = ("audio_acoustic_hidden_dim", "in_channels", "in_visual_dim", "in_dim", "io_channels")
PACKED = 2  # FLUX and its kin: 2 x 2 latent pixels are one token before the model sees them


@dataclass(frozen=True)
class Layout:
    """One way to give the latents of one call.

    shape: of `hidden_states`, without the batch; frames, height, width: the grid that it stands for, in latent pixels
    or, where the model is given tokens, in tokens; tokens: how many the blocks see.
    """

    name: str
    shape: tuple[int, ...]
    frames: int
    height: int
    width: int
    tokens: int


def layouts(config: Any, names: Collection[str], size: Size) -> Iterator[Layout]:
    """Every layout for a model of this config whose forward has parameters of these names, the likeliest first."""
    found = {layout.name: layout for layout in _all(config, size)}
    first: list[str] = []
    if "num_frames" in names and "height" in names:
        first = ["token a pixel"]
    elif {"img_ids", "img_shapes", "position_ids"} & set(names):
        first = ["packed"]
    elif hasattr(config, "audio_acoustic_hidden_dim"):
        first = ["audio steps"]
    elif is_video(config):
        first = ["video", "frames"]
    yield from (found[name] for name in dict.fromkeys([*first, *found]))


def _all(config: Any, size: Size) -> Iterator[Layout]:
    channels = next((value for name in CHANNELS if (value := getattr(config, name, None))), None)
    if channels is None:
        return
    patch_t, patch = patch_of(config)
    height, width = sides(config, size)
    frames = getattr(config, "video_length", None) or round_up(size.frames, patch_t)  # Latte's table of positions
    image = (height // patch) * (width // patch)
    video = frames // patch_t * image
    packed = round_up(size.image, max(PACKED, patch)) // max(PACKED, patch)
    pixels = size.image**2
    yield Layout("image", (channels, height, width), 1, height, width, image)
    yield Layout("video", (channels, frames, height, width), frames, height, width, video)
    yield Layout("frames", (frames, channels, height, width), frames, height, width, video)
    yield Layout("channels last", (frames, height, width, channels), frames, height, width, video)
    conditioned = 2 * channels + 1  # Kandinsky: the latents, what they begin with, and where that is
    yield Layout("channels last, conditioned", (frames, height, width, conditioned), frames, height, width, video)
    yield Layout("packed", (packed * packed, channels), 1, packed, packed, packed * packed)
    token_a_pixel = size.frames * pixels
    yield Layout("token a pixel", (token_a_pixel, channels), size.frames, size.image, size.image, token_a_pixel)
    length = round_up(pixels, patch)
    yield Layout("audio steps", (length, channels), 1, 1, length, length // patch)
    yield Layout("audio channels", (channels, length), 1, 1, length, length // patch)


def patch_of(config: Any) -> tuple[int, int]:
    """(frames, latent pixels a side) of one patch."""
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, list | tuple):
        return (patch[0] if len(patch) == 3 else 1), patch[-1]
    return getattr(config, "patch_size_t", None) or 1, patch


def is_video(config: Any) -> bool:
    """Whether a config speaks of frames."""
    patch = getattr(config, "patch_size", None)
    tubes = isinstance(patch, list | tuple) and len(patch) == 3
    return tubes or any(hasattr(config, name) for name in ("patch_size_t", "sample_frames", "video_length"))


def sides(config: Any, size: Size) -> tuple[int, int]:
    """Height and width of the latents, which a learned table of positions may fix."""
    if getattr(config, "use_learned_positional_embeddings", False):
        return config.sample_height, config.sample_width
    side = round_up(size.image, patch_of(config)[1])
    return side, side
