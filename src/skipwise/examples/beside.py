"""What a language model takes besides text, where text alone does not run: one maker for each name of a parameter.

Every size comes from the config or from one of its parts (`vision_config`, `audio_config`, ...), under whichever of its
usual names it is there. Shapes without the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipwise.examples.size import Size
from skipwise.examples.tensors import Tensors


@dataclass(frozen=True)
class Call:
    """What the makers know. pictures: what a picture's axes are preceded by: of several pictures, of several tiles."""

    config: Any
    size: Size
    new: Tensors
    pictures: tuple[int, ...] = ()

    def setting(self, *names: str) -> Any:
        """The first of these settings that the config has a value for, or one of its parts."""
        parts = list(parts_of(self.config))
        return next((value for name in names for part in parts if (value := getattr(part, name, None))), None)

    @property
    def places(self) -> int:
        """Tokens that stand for the picture, before the text."""
        return self.setting("num_query_tokens", "latent_query_num", "num_image_tokens") or 0

    @property
    def length(self) -> int:
        """Tokens of the picture and of the text."""
        return self.places + self.size.tokens


def parts_of(config: Any) -> Iterator[Any]:
    """A config of transformers, and the configs inside of it."""
    yield config
    for value in getattr(config, "__dict__", {}).values():
        if hasattr(value, "to_dict"):
            yield from parts_of(value)


Maker = Callable[[Call], Tensor | None]


def _picture(call: Call) -> Tensor | None:
    sides = call.setting("image_size")
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    return sides and call.new.noise(*call.pictures, call.setting("num_channels") or 3, height, width)


def _patches(call: Call) -> Tensor | None:
    """Row and column of each patch, and its pixels."""
    pixels, count = call.setting("patch_embed_hidden_size"), call.size.text
    if not pixels:
        return None
    patches = call.new.noise(count, 2 + pixels)
    patches[..., :2] = 1
    return patches


def _sound(call: Call) -> Tensor | None:
    """A spectrogram, as long as the text where the config says how long that is."""
    bins, steps = call.setting("num_mel_bins"), call.setting("audio_length_per_tok")
    return bins and steps and call.new.noise(bins, call.size.tokens * steps)


def _places(call: Call) -> Tensor:
    """Which tokens stand for the picture."""
    return torch.arange(call.length, device=call.new.small).lt(call.places).repeat(call.new.batch, 1)


def _noise(*widths: str, length: str = "") -> Maker:
    def make(call: Call) -> Tensor | None:
        shape = [call.setting(name) for name in (length, *widths) if name]
        return call.new.noise(*shape) if all(shape) else None

    return make


# what stands beside the words, or is what the model moves
OTHERS: dict[str, Maker] = {
    "bbox": lambda call: call.new.full(0.5, call.size.text, 4),
    "state": _noise("max_state_dim"),
    "noise": _noise("max_action_dim", length="chunk_size"),
    "timestep": lambda call: call.new.full(0.5),
}
PICTURES: dict[str, Maker] = {
    "pixel_values": _picture,
    "flattened_patches": _patches,
    "input_features": _sound,
    "attention_mask": lambda call: call.new.mask(call.size.text),  # of patches, where these are what is read
    "qformer_input_ids": lambda call: call.new.labels(call.size.text),
    "pixel_attention_mask": lambda call: call.new.mask(1),
    "image_attention_mask": lambda call: call.new.full(1, call.length, 1, dtype=torch.long),
    "image_embeds_position_mask": _places,
    "aspect_ratio_ids": lambda call: call.new.full(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda call: call.new.full(1, 1, call.setting("max_num_tiles") or 1, dtype=torch.long),
}
# of a text decoder that is tried without the encoder of its pictures
STATES: dict[str, Maker] = {
    "cross_attention_states": lambda call: call.new.noise(call.size.text, call.setting("hidden_size"))
}
