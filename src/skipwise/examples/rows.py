"""The diffusers classes whose signature and config do not say what they take, by name; they are never imported."""

from collections.abc import Callable
from typing import Any

import torch

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


def _hi_dream(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    side = round_up(size.image, config.patch_size)
    t5, llama = config.caption_channels
    return {
        "hidden_states": new.noise(config.in_channels, side, side),
        "timesteps": new.full(500),
        "encoder_hidden_states_t5": new.noise(size.text, t5),
        "encoder_hidden_states_llama3": [new.noise(size.text, llama) for _ in range(max(config.llama_layers) + 1)],
        "pooled_embeds": new.noise(config.text_emb_dim),
    }


def _ideogram4(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    side = round_up(size.image, 2) // 2
    text, length = size.text, size.text + side**2  # one sequence: first the text's tokens, then the image's
    roles = torch.tensor([3] * text + [2] * side**2, device=new.small)  # diffusers' indicators of text and image
    words = torch.zeros(text, 3, device=new.small)
    return {
        "hidden_states": new.noise(length, config.in_channels),
        "timestep": new.full(0.5),
        "encoder_hidden_states": new.noise(length, config.llm_features_dim),
        "position_ids": torch.cat([words, new.positions(1, side, side, 3)]).repeat(size.batch, 1, 1),
        "segment_ids": new.labels(length),
        "indicator": roles.repeat(size.batch, 1),
    }


def _qwen_image21(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    side = round_up(size.image, 2)  # a token is a latent pixel; 2 x 2 of them are one slot of the text's encoder
    slots = torch.tensor([False] * size.text + [True] * (side // 2) ** 2, device=new.small)
    return {
        "hidden_states": new.noise(side**2, config.in_channels),
        "encoder_hidden_states": new.noise(size.text, config.context_in_dim),
        "timestep": new.full(0.5),
        "img_shapes": [[(1, side, side)]] * size.batch,
        "img_mask": slots.repeat(size.batch, 1),
    }


def _mini_max_music3(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    length = size.image**2  # what conditions the sound has a state for each of its steps
    return {
        "hidden_states": new.noise(config.in_channels, length),
        "timestep": new.full(0.5),
        "encoder_hidden_states": new.noise(length, config.condition_dim),
    }


def _lumina_next(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    side = round_up(size.image, config.patch_size)
    head = config.hidden_size // config.num_attention_heads
    return {
        "hidden_states": new.noise(config.in_channels, side, side),
        "timestep": new.full(0.5),
        "encoder_hidden_states": new.noise(size.text, config.cross_attention_dim),
        "encoder_mask": new.mask(size.text),
        "image_rotary_emb": torch.ones(side, side, head // 2, dtype=torch.complex64, device=new.small),
        "cross_attention_kwargs": {},
    }


def _omni_gen(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    side = round_up(size.image, config.patch_size)
    length = size.text + 1 + (side // config.patch_size) ** 2  # words, the time and the image in one sequence
    return {
        "hidden_states": new.noise(config.in_channels, side, side),
        "timestep": new.full(0.5),
        "input_ids": new.tokens(size.text, config.vocab_size),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": new.full(1, length, length),
        "position_ids": torch.arange(length, device=new.small).repeat(size.batch, 1),
    }


def _joy_image_edit_plus(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    frames, height, width = config.patch_size
    rows, columns = (round_up(size.image, side) // side for side in (height, width))
    return {
        "hidden_states": new.noise(rows * columns, config.in_channels, frames, height, width),
        "timestep": new.full(500),
        "encoder_hidden_states": new.noise(size.text, config.text_dim),
        "shape_list": [[(1, rows, columns)]] * size.batch,
    }


def _sana_wm(config: Any, size: Size, new: Tensors) -> dict[str, Any]:
    frames, side = (round_up(n, of) for n, of in zip((size.frames, size.image), config.patch_size, strict=False))
    return {  # a timestep a frame, and the text as if it were of several prompts
        "hidden_states": new.noise(config.in_channels, frames, side, side),
        "timestep": new.full(500, 1, frames),
        "encoder_hidden_states": new.noise(1, size.text, config.caption_channels),
        "encoder_attention_mask": new.mask(size.text),
    }


ROWS: dict[str, Callable[[Any, Size, Tensors], dict[str, Any]]] = {
    "HiDreamImageTransformer2DModel": _hi_dream,
    "Ideogram4Transformer2DModel": _ideogram4,
    "JoyImageEditPlusTransformer3DModel": _joy_image_edit_plus,
    "LuminaNextDiT2DModel": _lumina_next,
    "MiniMaxMusic3Transformer1DModel": _mini_max_music3,
    "OmniGenTransformer2DModel": _omni_gen,
    "QwenImage21Transformer2DModel": _qwen_image21,
    "SanaWMTransformer3DModel": _sana_wm,
    "ZImageTransformer2DModel": _z_image,
}
