"""Tiny random models, one row for each kind of model that the laws are tested on.

Widths are as small as the classes allow; depths and attention patterns are such that a skipped block is seen: three or
more blocks a stack, mixed layer types, windows shorter than the text. Under the meta device they have shapes only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from skipwise.examples import Size, example_inputs
from skipwise.models.dream import DreamConfig, DreamModel
from skipwise.models.llada import LLaDAConfig, LLaDAModelLM
from skipwise.models.mdlm import MDLM, MDLMConfig

WIDTH, VOCABULARY, LAYERS = 32, 64, 4
SPREAD = 0.12  # of the random weights: blocks matter, and no row overflows float32

# what the decoder-only language models share
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
# skipping any block changes the type of those after it, if types were read off the index
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}  # diffusers' way to say WIDTH
PIXELS = {"sample_size": 8, "patch_size": 2, "in_channels": 4}


def _shake(model: nn.Module) -> nn.Module:
    """Random weights for all: blocks that begin as the identity (gates of zero) would let a wrong skip pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            # norm scales stay near what they are, one or, in Gemma's writing, zero
            centre = parameter.mean() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + SPREAD * torch.randn_like(parameter))
    return model.eval().float()


def _transformers(config: Any, model_class: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return _shake(model_class(config))


def _diffusers(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return _shake(getattr(diffusers, name)(**settings))


def _lm(config_class: str, model_class: str, **settings: Any) -> nn.Module:
    return _transformers(getattr(transformers, config_class)(**settings), getattr(transformers, model_class))


def _llada() -> nn.Module:
    return _transformers(LLaDAConfig(**DECODER, mask_token_id=3), LLaDAModelLM)


def _dream() -> nn.Module:
    return _transformers(DreamConfig(**DECODER, mask_token_id=3), DreamModel)


def _mdlm() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_dim": WIDTH, "cond_dim": 8, "n_blocks": LAYERS, "n_heads": 4}
    return _transformers(MDLMConfig(**sizes), MDLM)


def _diffusion_gemma() -> nn.Module:
    # a prompt encoder and a canvas decoder, mixtures of experts both, that share their weights
    text = DECODER | {"head_dim": 8, "sliding_window": 4, "num_experts": 4, "top_k_experts": 2}
    text |= {"moe_intermediate_size": 16, "num_hidden_layers": len(MIXED), "layer_types": list(MIXED)}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"model_type": "gemma4_vision", "num_key_value_heads": 1, "head_dim": 8, "position_embedding_size": 8}
    config = transformers.DiffusionGemmaConfig(
        text_config=text | {"global_head_dim": 16}, vision_config=vision, canvas_length=8
    )
    return _transformers(config, transformers.DiffusionGemmaForBlockDiffusion)


LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "llada": _llada,
    "dream": _dream,
    "mdlm": _mdlm,
    "llama": partial(_lm, "LlamaConfig", "LlamaForCausalLM", **DECODER),
    "mistral": partial(_lm, "MistralConfig", "MistralForCausalLM", **DECODER, sliding_window=3),
    "qwen2": partial(_lm, "Qwen2Config", "Qwen2ForCausalLM", **DECODER),
    "qwen3": partial(_lm, "Qwen3Config", "Qwen3ForCausalLM", **DECODER, head_dim=8),
    "gemma3": partial(
        _lm,
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        **DECODER | {"num_hidden_layers": len(MIXED)},
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=3,
        layer_types=list(MIXED),
    ),
    "smollm3": partial(_lm, "SmolLM3Config", "SmolLM3ForCausalLM", **DECODER, no_rope_layers=[1, 0, 1, 0]),
    "gpt2": partial(
        _lm, "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4
    ),
    "gpt_neox": partial(_lm, "GPTNeoXConfig", "GPTNeoXForCausalLM", **ENCODER),
    "bert": partial(_lm, "BertConfig", "BertForMaskedLM", **ENCODER),
    "modernbert": partial(
        _lm,
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        **ENCODER | {"num_hidden_layers": len(MIXED)},
        local_attention=4,
        layer_types=list(MIXED),
    ),
    "diffusion_gemma": _diffusion_gemma,
}

IMAGE: dict[str, Callable[[], nn.Module]] = {
    "flux": partial(
        _diffusers,
        "FluxTransformer2DModel",
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    ),
    "flux2": partial(
        _diffusers,
        "Flux2Transformer2DModel",
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    ),
    "chroma": partial(
        _diffusers,
        "ChromaTransformer2DModel",
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    ),
    "sd3": partial(
        _diffusers,
        "SD3Transformer2DModel",
        **HEADS,
        **PIXELS,
        out_channels=4,
        num_layers=LAYERS,
        joint_attention_dim=16,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    "pixart": partial(
        _diffusers,
        "PixArtTransformer2DModel",
        **HEADS,
        **PIXELS,
        out_channels=8,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=16,
    ),
    "sana": partial(
        _diffusers,
        "SanaTransformer2DModel",
        **HEADS,
        **PIXELS | {"patch_size": 1},
        out_channels=4,
        num_layers=LAYERS,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=16,
    ),
    "dit": partial(
        _diffusers,
        "DiTTransformer2DModel",
        **HEADS,
        **PIXELS,
        out_channels=8,
        num_layers=LAYERS,
        num_embeds_ada_norm=10,
    ),
    "qwen_image": partial(
        _diffusers,
        "QwenImageTransformer2DModel",
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    ),
    "cogview4": partial(
        _diffusers,
        "CogView4Transformer2DModel",
        **HEADS,
        **PIXELS,
        out_channels=4,
        num_layers=LAYERS,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
    ),
    "z_image": partial(
        _diffusers,
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=3,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    ),
    "aura_flow": partial(
        _diffusers,
        "AuraFlowTransformer2DModel",
        **HEADS,
        **PIXELS,
        out_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=4,
        joint_attention_dim=16,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64,
    ),
    "lumina2": partial(
        _diffusers,
        "Lumina2Transformer2DModel",
        **PIXELS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_refiner_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=16,
    ),
}

VIDEO: dict[str, Callable[[], nn.Module]] = {
    "wan": partial(
        _diffusers,
        "WanTransformer3DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    ),
    "hunyuan_video": partial(
        _diffusers,
        "HunyuanVideoTransformer3DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_single_layers=4,
        num_refiner_layers=3,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 2, 2),
    ),
    "ltx": partial(
        _diffusers,
        "LTXVideoTransformer3DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=WIDTH,
        num_layers=LAYERS,
        caption_channels=16,
    ),
    "cogvideox": partial(
        _diffusers,
        "CogVideoXTransformer3DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=LAYERS,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    ),
}

ROWS: dict[str, Callable[[], nn.Module]] = LANGUAGE | IMAGE | VIDEO

# no block of these can be left out: long skips lead from early blocks to late ones
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "hunyuan_dit": partial(
        _diffusers,
        "HunyuanDiT2DModel",
        **HEADS,
        **PIXELS,
        num_layers=6,
        hidden_size=WIDTH,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=5,
    ),
}


def example(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments for one forward of a row's model; image and text streams differ in length."""
    # Z-Image pads each stream to a multiple of 32 tokens: 64 image tokens against 32 of text
    image = 16 if type(model).__name__ == "ZImageTransformer2DModel" else 8
    return example_inputs(model, Size(batch=batch, image=image))


def output(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """What one forward gives: logits (batch, length, vocabulary) or the sample, shaped as the latents."""
    with torch.no_grad():
        result = model(**kwargs)
    main = result.logits if "logits" in result else result[0]
    return torch.stack(main) if isinstance(main, list) else main
