"""What a diffusion transformer takes besides its latents: one maker for each name of a parameter.

Every width comes from the config, under whichever of its usual names it is there. Shapes without the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipwise.examples.layouts import Layout, patch_of
from skipwise.examples.size import Size
from skipwise.examples.tensors import Tensors

# where configs say how wide the text is that they are conditioned on; the first that a forward runs with
TEXT_WIDTHS = (
    "caption_channels",
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "text_in_dim",
    "context_in_dim",
    "text_hidden_dim",
    "in_text_dim",
    "llm_features_dim",
    "crossattn_proj_in_channels",
    "text_embed_dim",
    "cond_token_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
    "condition_dim",
    "encoder_hidden_size",
    "hidden_size",
)
POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2", "text_emb_dim")
IMAGE_WIDTHS = ("image_embed_dim", "image_proj_dim", "image_dim")
WAN_TEXT = 512  # where diffusers' Wan splits image from text tokens when it is conditioned on an image
CLIP_TOKENS = 257  # 16 x 16 patches and the class token: what Wan's image encoder gives
AUDIO = 6  # latent steps of a second, audio, stream


@dataclass(frozen=True)
class Call:
    """What the makers know.

    text_width: the config's field, one of TEXT_WIDTHS; time_a_frame: a timestep for each frame, instead of one for all.
    """

    config: Any
    size: Size
    new: Tensors
    layout: Layout
    text_width: str | None
    time_a_frame: bool = False

    def setting(self, *names: str) -> Any:
        """The first of these settings of the config that has a value."""
        return next((value for name in names if (value := getattr(self.config, name, None))), None)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.setting("attention_head_dim", "head_dim") or self.setting("hidden_size", "dim") // self.setting(
            "num_attention_heads", "n_heads"
        )

    @property
    def axes(self) -> int:
        """Axes of the positions of tokens."""
        return len(self.setting("axes_dims_rope", "axes_dim_rope", "axes_dims", "rope_axes_dim") or (0, 0, 0))

    @property
    def text(self) -> int:
        """Length of the text, where tables of positions or a split by place do not fix it."""
        config = self.config
        if self.setting("added_kv_proj_dim"):
            return WAN_TEXT
        fixed = self.setting("use_learned_positional_embeddings") or (
            getattr(config, "use_rotary_positional_embeddings", None) is False
        )
        return self.setting("text_len") or (config.max_text_seq_length if fixed else self.size.text)


Maker = Callable[[Call], Any]


def _text(call: Call) -> Tensor | None:
    """States of a text encoder; of several of its layers where the config says so (Krea 2, FIBO 2)."""
    if call.text_width is None:
        return None
    width, layers = getattr(call.config, call.text_width), call.setting("num_text_layers")
    bundles = call.setting("injection_layer_ids")
    if bundles:
        return call.new.noise(1 + len(bundles), call.text, width)
    return call.new.noise(call.text, layers, width) if layers else call.new.noise(call.text, width)


def _other_text(*widths: str, length: str = "") -> Maker:
    def make(call: Call) -> Tensor | None:
        width = call.setting(*widths)
        return width and call.new.noise(call.setting(length) or call.size.text, width)

    return make


def _width(*names: str) -> Maker:
    """One vector of a width that the config gives."""
    return lambda call: (width := call.setting(*names)) and call.new.noise(width)


def _image_text(call: Call) -> Tensor | None:
    """First and last frame come as two rows of half the positions."""
    width = call.setting("image_dim")
    if not width:
        return None
    positions = call.setting("pos_embed_seq_len")
    rows, length = (2, positions // 2) if positions else (1, CLIP_TOKENS)
    return call.new.noise(rows, length, width).flatten(0, 1)


def _time(call: Call) -> Tensor:
    frames = (call.layout.frames,) if call.time_a_frame else ()
    return call.new.full(0.5 if call.layout.name == "packed" else 500, *frames)


def _guidance(call: Call) -> Tensor | None:
    return _time(call) if call.setting("guidance_embeds") else None


def _text_ids(call: Call) -> Tensor:
    """FLUX's text has no positions; with four axes it counts on the last."""
    words = torch.zeros(call.text, call.axes, device=call.new.small)
    if call.axes > 3:
        words[:, -1] = torch.arange(call.text, device=call.new.small)
    return words


def _image_ids(call: Call) -> Tensor:
    return call.new.positions(call.layout.frames, call.layout.height, call.layout.width, call.axes)


def _rope_places(call: Call) -> list[Tensor]:
    """Frames, rows and columns of patches."""
    patch_t, patch = patch_of(call.config)
    layout, small = call.layout, call.new.small
    grid = (layout.frames // patch_t, layout.height // patch, layout.width // patch)
    return [torch.arange(length, device=small) for length in grid]


def _added_conditions(call: Call) -> dict[str, Tensor]:
    return {"resolution": call.new.full(1024, 2), "aspect_ratio": call.new.full(1, 1)}


def _grid(channels: Maker) -> Maker:
    """Something beside the latents, of the same grid."""

    def make(call: Call) -> Tensor | None:
        width, layout = channels(call), call.layout
        return width and call.new.noise(width, layout.frames, layout.height, layout.width)

    return make


def _rotary(call: Call) -> tuple[Tensor, Tensor]:
    return call.new.rotary(call.layout.tokens, call.head_dim)


def _context_latents(call: Call) -> Tensor | None:
    """What latents are continued by, channel by channel."""
    length, channels = call.layout.shape[0], call.layout.shape[-1]
    return call.new.noise(length, call.config.in_channels - channels) if call.config.in_channels > channels else None


def _image_embeds(call: Call) -> Tensor | None:
    """Zeros, which say that there is no picture to begin with: HunyuanVideo 1.5 looks at them."""
    width = call.setting(*IMAGE_WIDTHS)
    return width and call.new.full(0, call.size.text + 1, width)


def _frames_before(count: int) -> Maker:
    """Frames that were made before these, of the same size."""
    return lambda call: call.new.noise(call.layout.shape[0], count, call.layout.height, call.layout.width)


def _numbers(count: int) -> Maker:
    return lambda call: torch.arange(count, device=call.new.small)


def _pose(call: Call) -> Tensor | None:
    """Of all frames but the first, which is the character's."""
    layout, width = call.layout, call.setting("latent_channels")
    return width and call.new.noise(width, max(layout.frames - 1, 1), layout.height, layout.width)


def _faces(call: Call) -> Tensor | None:
    """Pictures of a face, four for every latent frame that the pose has but one."""
    side, frames = call.setting("motion_encoder_size"), max(call.layout.frames - 1, 1)
    return side and call.new.noise(3, 4 * (frames - 1) + 1, side, side)


def _global(call: Call) -> Tensor | None:
    """How long the sound is: a vector, or a sequence of one that is put before the latents."""
    width, place = call.setting("global_cond_dim"), call.setting("global_states_input_dim")
    return call.new.noise(width) if width else place and call.new.noise(1, place)


# in the order of a call; what is None is left out
ALWAYS: dict[str, Maker] = {
    "encoder_hidden_states": _text,
    "timestep": _time,
    "timesteps": _time,
    "pooled_projections": _width(*POOLED_WIDTHS),
    "img_ids": _image_ids,
    "txt_ids": _text_ids,
    "guidance": _guidance,
    "img_shapes": lambda call: [[(call.layout.frames, call.layout.height, call.layout.width)]] * call.size.batch,
    "num_frames": lambda call: call.layout.frames,
    "height": lambda call: call.layout.height,
    "width": lambda call: call.layout.width,
    "encoder_hidden_states_image": _image_text,
    "encoder_hidden_states_t5": _other_text("cross_attention_dim_t5", "text_embed_dim_t5", length="text_len_t5"),
    "encoder_hidden_states_2": _other_text("text_embed_2_dim"),
    "image_rotary_emb": lambda call: _rotary(call) if call.setting("use_rotary_positional_embeddings") else None,
    "ofs": lambda call: call.new.full(2) if call.setting("ofs_embed_dim") else None,
    "additional_t_cond": lambda call: call.new.labels() if call.setting("use_additional_t_cond") else None,
    "target_timestep": lambda call: _time(call) if call.setting("flow_map") else None,
    "timestep_r": lambda call: _time(call) if call.setting("use_meanflow") else None,
    "control_hidden_states": _grid(lambda call: call.setting("vace_in_channels")),
}
# what is made for a forward that cannot do without
REQUIRED: dict[str, Maker] = {
    "timestep_r": _time,
    "r_timestep": _time,
    "original_size": lambda call: call.new.full(1024, 2),
    "target_size": lambda call: call.new.full(1024, 2),
    "crop_coords": lambda call: call.new.full(0, 2),
    "position_ids": lambda call: torch.cat([_text_ids(call), _image_ids(call)]),
    "context_latents": _context_latents,
    "indices_latents": lambda call: torch.arange(call.layout.frames, device=call.new.small),
    "text_bth": _text,
    "text_lens": lambda call: call.new.full(call.text, dtype=torch.long),
    "prior_token_id": lambda call: call.new.labels(call.layout.tokens),
    "prior_token_drop": lambda call: call.new.full(False, dtype=torch.bool),
    "visual_rope_pos": _rope_places,
    "text_rope_pos": lambda call: torch.arange(call.text, device=call.new.small),
    "audio_encoder_hidden_states": _text,
}
# what is made for those too, and, when nothing less runs, where it is optional
IF_NEEDED: dict[str, Maker] = {
    "image_rotary_emb": _rotary,
    "rotary_embedding": lambda call: call.new.rotary(call.layout.tokens + 1, call.head_dim // 2),
    "encoder_attention_mask": lambda call: call.new.mask(call.text),
    "encoder_attention_mask_2": lambda call: call.new.mask(call.size.text),
    "encoder_hidden_states_mask": lambda call: call.new.mask(call.text),
    "encoder_mask": lambda call: call.new.mask(call.text),
    "text_embedding_mask": lambda call: call.new.mask(call.text),
    "text_embedding_mask_t5": lambda call: call.new.mask(call.setting("text_len_t5") or call.size.text),
    "class_labels": lambda call: call.new.labels(),
    "image_meta_size": lambda call: call.new.full(1024, 6),
    "style": lambda call: call.new.labels(),
    "added_cond_kwargs": _added_conditions,
    "image_embeds": _image_embeds,
    "global_hidden_states": _global,
    "audio_hidden_states": lambda call: call.new.noise(AUDIO, call.setting("audio_in_channels", "in_audio_dim")),
    "latents_clean": _frames_before(2),
    "indices_latents_clean": _numbers(2),
    "latents_history_2x": _frames_before(2),
    "indices_latents_history_2x": _numbers(2),
    "latents_history_4x": _frames_before(16),
    "indices_latents_history_4x": _numbers(16),
    "pose_hidden_states": _pose,
    "face_pixel_values": _faces,
    "audio_num_frames": lambda call: AUDIO,
    "text_encoder_layers": lambda call: [
        call.new.noise(call.text, call.config.text_encoder_dim)
        for _ in range(call.config.num_layers + call.config.num_single_layers)
    ],
}
