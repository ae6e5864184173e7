"""The diffusers classes whose signature and config do not say what they take, by name; they are never imported."""

from collections.abc import Callable
from typing import Any

from skipwise.examples.size import Size
from skipwise.examples.tensors import Tensors, round_up


def _z_image(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    patch, patch_t = config.all_patch_size[0], config.all_f_patch_size[0]
    side = round_up(size.image, patch)
    return {  # lists of samples; the model pads each stream to a multiple of 32 tokens
        "x": list(new.noise(config.in_channels, patch_t, side, side)),
        "t": new.full(0.5),
        "cap_feats": list(new.noise(size.text, config.cap_feat_dim)),
        "patch_size": patch,
        "f_patch_size": patch_t,
    }


ROWS: dict[str, Callable[[Any, Size, Tensors], dict[str, Any]]] = {
    "ZImageTransformer2DModel": _z_image,
}
