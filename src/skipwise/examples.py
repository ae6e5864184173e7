"""Example inputs: one call of a model, made from its config alone, at a stated size.

What a model takes is what tracing cannot see: the names, the ranks, which tensor is a mask and which an index. Language
models take token ids. A diffusers transformer takes what its row in `ROWS` says. Every width comes from the config, so
that one row serves the published model and a toy of two blocks. Classes are named, never imported.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

from skipwise.errors import UserError, unknown

SEED = 0  # the same size gives the same inputs
WAN_TEXT = 512  # where diffusers' Wan splits image from text tokens when it is conditioned on an image
CLIP_TOKENS = 257  # 16 x 16 patches and the class token: what Wan's image encoder gives
_GROUPED_MM = torch.ops.aten._grouped_mm.default


@dataclass(frozen=True)
class Size:
    """How large one call is. Lengths that a model cannot take are rounded up to the next that it can.

    tokens: text length of a language model; of an encoder-decoder, the length that is decoded.
    image: side of the square latent image, in latent pixels (1024 pixels are 128 latent pixels in most models).
    text: tokens that the model is conditioned on; unlike the number of image tokens, so that streams are told apart.
    frames: latent frames of a video model.
    batch: samples a call.
    """

    tokens: int = 8
    image: int = 8
    text: int = 5
    frames: int = 2
    batch: int = 1


TINY = Size()


def example_inputs(model: nn.Module, size: Size = TINY, device: torch.device | str | None = None) -> dict[str, Any]:
    """Keyword arguments for one forward of `model`, deterministic, on `device` (default: where the model is).

    Random floats have the model's dtype. Under the meta device they hold no memory, and only masks, indices and
    timesteps, whose values a forward may read, are real: run the model inside `shapes_only()`. A module with a method
    `example_inputs(size)` is asked itself. Raises UserError for a class that has no row and takes no `input_ids`.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own(size)
    new = _Tensors(size.batch, torch.device(device or next(model.parameters()).device), _dtype(model))
    for cls in type(model).__mro__:  # a subclass takes what its parent takes
        if cls.__name__ in ROWS:
            return ROWS[cls.__name__](model.config, size, new)
    if "input_ids" in inspect.signature(model.forward).parameters:
        return _language_model(model, size, new)
    raise UserError(
        f"{unknown('model class', type(model).__name__, ROWS)} Pass example=, a dict of keyword arguments for one "
        "forward, or add a row in skipwise/examples.py."
    )


def on_meta(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """A real example for the model on the meta device: states on meta, what a forward may read is kept."""
    moved = tree_map_only(
        Tensor,
        lambda tensor: tensor.to("meta") if tensor.is_floating_point() and tensor.ndim > 2 else tensor,
        dict(example),
    )
    ids = moved.get("input_ids")
    if ids is not None and "position_ids" in inspect.signature(model.forward).parameters:
        # transformers reads the positions, to see whether sequences are packed
        moved.setdefault("position_ids", torch.arange(ids.shape[1])[None])
    return moved


class Shapes(TorchDispatchMode):
    """Runs an op for real where all its tensors are real, and for its shapes alone as soon as one is on meta.

    torch refuses to mix the two; models do it when they compute rotary tables on the CPU or read lengths off a mask.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if tree_any(lambda leaf: isinstance(leaf, Tensor) and leaf.is_meta, (args, kwargs)):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            if "device" in kwargs:  # what has no data cannot be moved off meta either
                kwargs["device"] = torch.device("meta")
            if func is _GROUPED_MM:  # mixtures of experts: its own meta kernel refuses float32
                return args[0] @ args[1][0]  # the same shape and FLOPs: each row meets one expert
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this, a model on the meta device can be run: `model(**example_inputs(model))` allocates no weights.

    Enter it after a FLOP counter, so that the counter sees the ops that are really run.
    """
    with torch.no_grad(), Shapes():
        yield


def _dtype(model: nn.Module) -> torch.dtype:
    # diffusers' and transformers' own answer knows of modules that stay in float32 in a half-precision model
    dtype = getattr(model, "dtype", None)
    return dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())


class _Tensors:
    """Makes the tensors of one call. Every shape is without the batch, which comes first."""

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.device, self.dtype = batch, device, dtype
        self.small = torch.device("cpu") if device.type == "meta" else device
        self.generator = torch.Generator().manual_seed(SEED)

    def noise(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(self.batch, *shape, device="meta", dtype=self.dtype)
        return torch.randn(self.batch, *shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((self.batch, *shape), value, device=self.small, dtype=dtype or self.dtype)

    def mask(self, length: int) -> Tensor:
        return self.full(True, length, dtype=torch.bool)

    def labels(self) -> Tensor:
        return self.full(0, dtype=torch.long)

    def tokens(self, length: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (self.batch, length), generator=self.generator).to(self.small)

    def times(self, value: float, guidance: bool = False) -> dict[str, Tensor]:
        return {name: self.full(value) for name in ("timestep", "guidance")[: 1 + bool(guidance)]}

    def rotary(self, length: int, dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (length, dim), of plain 1-d rotary positions."""
        rates = 10000.0 ** (-torch.arange(0, dim, 2, device=self.small) / dim)
        angles = torch.outer(torch.arange(length, device=self.small), rates).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()

    def ids(self, side: int, text: int, axes: int) -> dict[str, Tensor]:
        """Positions of FLUX: row and column on axes 1 and 2; text has none, or, with four axes, counts on the last."""
        image, words = (torch.zeros(length, axes, device=self.small) for length in (side * side, text))
        image[:, 1] = torch.arange(side * side, device=self.small) // side
        image[:, 2] = torch.arange(side * side, device=self.small) % side
        if axes > 3:
            words[:, -1] = torch.arange(text, device=self.small)
        return {"img_ids": image, "txt_ids": words}


def _language_model(model: nn.Module, size: Size, new: _Tensors) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    vocabulary = getattr(config, "get_text_config", lambda: config)().vocab_size
    kwargs: dict[str, Any] = {"input_ids": new.tokens(size.tokens, vocabulary)}
    if "decoder_input_ids" in accepted:  # encoder-decoder: a prompt and, of another length, the canvas
        kwargs = {"input_ids": new.tokens(size.text, vocabulary), "decoder_input_ids": kwargs["input_ids"]}
    kwargs |= {"use_cache": False} if "use_cache" in accepted else {}
    return on_meta(model, kwargs) if new.device.type == "meta" else kwargs


def _up(length: int, multiple: int | None) -> int:
    multiple = multiple or 1
    return -(-length // multiple) * multiple


def _image(config: Any, size: Size, new: _Tensors, text_dim: int) -> dict[str, Any]:
    """Most models: a latent image (batch, channels, side, side), text (batch, length, text_dim) and a timestep."""
    side = _up(size.image, config.patch_size)
    return {
        "hidden_states": new.noise(config.in_channels, side, side),
        "encoder_hidden_states": new.noise(size.text, text_dim),
        **new.times(500, getattr(config, "guidance_embeds", False)),
    }


def _packed(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    """FLUX and its kin: 2 x 2 latent pixels are one token before the model sees them; the timestep is in 0..1."""
    side = _up(size.image, 2) // 2
    return {
        "hidden_states": new.noise(side * side, config.in_channels),
        "encoder_hidden_states": new.noise(size.text, config.joint_attention_dim),
        **new.ids(side, size.text, len(config.axes_dims_rope)),
    }


def _flux(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    pooled = {"pooled_projections": new.noise(config.pooled_projection_dim)}
    return _packed(config, size, new) | pooled | new.times(0.5, config.guidance_embeds)


def _flux2(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    return _packed(config, size, new) | new.times(0.5, config.guidance_embeds)


def _chroma(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    return _packed(config, size, new) | new.times(0.5)


def _qwen_image(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    side = _up(size.image, config.patch_size) // config.patch_size
    kwargs = {  # the model takes no guidance, whatever `guidance_embeds` says
        "hidden_states": new.noise(side * side, config.in_channels),
        "encoder_hidden_states": new.noise(size.text, config.joint_attention_dim),
        "encoder_hidden_states_mask": new.mask(size.text),
        "img_shapes": [[(1, side, side)]] * size.batch,
        **new.times(0.5),
    }
    return kwargs | ({"additional_t_cond": new.labels()} if config.use_additional_t_cond else {})


def _sd3(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    pooled = {"pooled_projections": new.noise(config.pooled_projection_dim)}
    return _image(config, size, new, config.joint_attention_dim) | pooled


def _aura_flow(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    return _image(config, size, new, config.joint_attention_dim) | new.times(0.5)


def _sana(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    return _image(config, size, new, config.caption_channels)


def _pixart(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    asked = config.use_additional_conditions
    if asked or (asked is None and config.sample_size == 128):  # the model's own default
        conditions = {"resolution": new.full(1024, 2), "aspect_ratio": new.full(1, 1)}
    text_dim = config.caption_channels or config.cross_attention_dim
    return _image(config, size, new, text_dim) | {"added_cond_kwargs": conditions}


def _dit(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    side = _up(size.image, config.patch_size)
    return {
        "hidden_states": new.noise(config.in_channels, side, side),
        "class_labels": new.labels(),
        **new.times(500),
    }


def _lumina2(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    mask = {"encoder_attention_mask": new.mask(size.text)}
    return _image(config, size, new, config.cap_feat_dim) | mask | new.times(0.5)


def _cogview4(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    sizes = {name: new.full(1024, 2) for name in ("original_size", "target_size")}
    return _image(config, size, new, config.text_embed_dim) | sizes | {"crop_coords": new.full(0, 2)}


def _z_image(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    patch, patch_t = config.all_patch_size[0], config.all_f_patch_size[0]
    side = _up(size.image, patch)
    return {  # lists of samples; the model pads each stream to a multiple of 32 tokens
        "x": list(new.noise(config.in_channels, patch_t, side, side)),
        "t": new.full(0.5),
        "cap_feats": list(new.noise(size.text, config.cap_feat_dim)),
        "patch_size": patch,
        "f_patch_size": patch_t,
    }


def _hunyuan_dit(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    side = _up(size.image, config.patch_size)
    kwargs = {  # both texts have the one length that the padding table has
        "hidden_states": new.noise(config.in_channels, side, side),
        "encoder_hidden_states": new.noise(config.text_len, config.cross_attention_dim),
        "text_embedding_mask": new.mask(config.text_len),
        "encoder_hidden_states_t5": new.noise(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": new.mask(config.text_len_t5),
        "image_rotary_emb": new.rotary((side // config.patch_size) ** 2, config.attention_head_dim),
        **new.times(500),
    }
    if config.use_style_cond_and_image_meta_size:
        kwargs |= {"image_meta_size": new.full(1024, 6), "style": new.labels()}
    return kwargs


def _wan(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    patch_t, patch, _ = config.patch_size
    side = _up(size.image, patch)
    kwargs = {
        "hidden_states": new.noise(config.in_channels, _up(size.frames, patch_t), side, side),
        "encoder_hidden_states": new.noise(WAN_TEXT if config.added_kv_proj_dim else size.text, config.text_dim),
        **new.times(500),
    }
    if config.image_dim:  # first and last frame come as two rows of half the positions
        rows, length = (2, config.pos_embed_seq_len // 2) if config.pos_embed_seq_len else (1, CLIP_TOKENS)
        kwargs["encoder_hidden_states_image"] = new.noise(rows, length, config.image_dim).flatten(0, 1)
    return kwargs


def _hunyuan_video(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    side = _up(size.image, config.patch_size)
    return {
        "hidden_states": new.noise(config.in_channels, _up(size.frames, config.patch_size_t), side, side),
        "encoder_hidden_states": new.noise(size.text, config.text_embed_dim),
        "encoder_attention_mask": new.mask(size.text),
        "pooled_projections": new.noise(config.pooled_projection_dim),
        **new.times(500, config.guidance_embeds),
    }


def _ltx(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    return {  # a token is a latent pixel of a frame: the latents are packed before the model sees them
        "hidden_states": new.noise(size.frames * size.image**2, config.in_channels),
        "encoder_hidden_states": new.noise(size.text, config.caption_channels),
        "encoder_attention_mask": new.mask(size.text),
        "num_frames": size.frames,
        "height": size.image,
        "width": size.image,
        **new.times(500),
    }


def _cogvideox(config: Any, size: Size, new: _Tensors) -> dict[str, Any]:
    frames, height = _up(size.frames, config.patch_size_t), _up(size.image, config.patch_size)
    width, text = height, size.text
    if config.use_learned_positional_embeddings:  # the table fits one resolution only
        height, width = config.sample_height, config.sample_width
    if config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings:
        text = config.max_text_seq_length  # the table counts the text in
    kwargs: dict[str, Any] = {
        "hidden_states": new.noise(frames, config.in_channels, height, width),
        "encoder_hidden_states": new.noise(text, config.text_embed_dim),
        **new.times(500),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
        kwargs["image_rotary_emb"] = new.rotary(tokens, config.attention_head_dim)
    return kwargs | ({"ofs": new.full(2)} if config.ofs_embed_dim else {})


ROWS: dict[str, Callable[[Any, Size, _Tensors], dict[str, Any]]] = {
    "AuraFlowTransformer2DModel": _aura_flow,
    "ChromaTransformer2DModel": _chroma,
    "CogVideoXTransformer3DModel": _cogvideox,
    "CogView4Transformer2DModel": _cogview4,
    "DiTTransformer2DModel": _dit,
    "Flux2Transformer2DModel": _flux2,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTXVideoTransformer3DModel": _ltx,
    "Lumina2Transformer2DModel": _lumina2,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
}
