"""Tiny settings of classes of diffusers, which take them by name."""

import inspect
import re
from typing import Any

from torch import nn

from tests.survey.shrinking import HEAD, HEADS, LAYERS, shake

WIDTH = HEADS * HEAD
AXES = {2: (8, 8), 3: (8, 4, 4), 4: (4, 4, 4, 4)}  # of a head's rotary positions

# name of a setting -> its tiny value; the first pattern that fits the whole name
SIZES: list[tuple[str, int]] = [
    (r"num_(hidden_|single_|mmdit_|single_dit_)?layers|n_layers|mmdit_layers|depth|num_visual_blocks", LAYERS),
    (r"(num|n)_refiner_layers|num_text_blocks|num_(layerwise|refiner)_text_blocks|approximator_layers", 2),
    (r"(text_)?num_key_value_heads|num_kv_heads|n_kv_heads", HEADS),
    (r".*num_attention_heads|n_heads|num_heads|num_cross_attention_heads|num_key_value_attention_heads", HEADS),
    (r"((audio_|cross_)?attention_|linear_)?head_dim", HEAD),
    (r"hidden_size|dim|model_dim|caption_projection_dim|inner_dim|embed_dim|cross_attention_dim", WIDTH),
    (r"(in|out|io|latent|cond_in|audio_in|audio_out)_channels|(in|out)(_visual|_audio)?_dim", 16),
    (r"audio_acoustic_hidden_dim", 16),
    (r".*(ffn_dim|ff_dim|intermediate_size|ffn_hidden_size|ff_inner_dim)", 48),
    (r"sample_(size|width|height|frames)|image_size|target_size", 8),
    (r"max_text_seq_length|text_len(_t5)?|pos_embed_max_size", 8),
    (r".*(_dim|_dim_t5|_dim2|_channels|_features)", 32),
]

# what the names do not say
CHANGES: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {"in_channels": 48},
    "LTX2VideoTransformer3DModel": {"audio_cross_attention_dim": 64, "caption_channels": 64},
    "LTXVideoTransformer3DModel": {"caption_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [32, 32],
        "text_emb_dim": 32,
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (32, 32),
        "llama_layers": list(range(8)),
    },
    "HunyuanDiT2DModel": {"in_channels": 16, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 16,
        "patch_size": 2,
        "cross_attention_dim": 64,
        "caption_channels": 32,
        "num_layers": 4,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "video_length": 3,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 2},
    "OmniGenTransformer2DModel": {"rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}},
    "HunyuanVideoFramepackTransformer3DModel": {"has_clean_x_embedder": True, "has_image_proj": True},
    "Ideogram4Transformer2DModel": {"mrope_section": (4, 2, 2)},
    "MiniMaxMusic3Transformer1DModel": {"rotary_dim": 16},
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": 64, "num_layers": 4},
    "CosmosTransformer3DModel": {"concat_padding_mask": False},  # which would need torchvision
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "Transformer2DModel": {"in_channels": 32, "num_layers": 4, "cross_attention_dim": 32},
    "TransformerTemporalModel": {"in_channels": 32, "num_layers": 4, "cross_attention_dim": 32},
    "WanAnimateTransformer3DModel": {"in_channels": 36, "motion_encoder_size": 16, "inject_face_latents_blocks": 2},
    "WanVACETransformer3DModel": {"vace_layers": [0, 2], "vace_in_channels": 16},
}


def tiny_model(model_class: Any) -> nn.Module:
    """A tiny model of a diffusers class with random weights."""
    return shake(model_class(**tiny_settings(model_class)))


def tiny_settings(model_class: Any) -> dict[str, Any]:
    """Tiny values for the settings that a diffusers class has defaults for, where they differ from these."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    small = {name: _small(name, value) for name, value in defaults.items()}
    return {name: value for name, value in small.items() if value != defaults[name]} | CHANGES.get(
        model_class.__name__, {}
    )


def _small(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(type(n) is int for n in value):
        return type(value)(AXES[len(value)]) if "axes_dim" in name or name.startswith("rope") else value
    if type(value) is not int:
        return value
    return next((min(value, small) for pattern, small in SIZES if re.fullmatch(pattern, name)), value)
