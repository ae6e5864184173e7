"""Tiny configs of classes of transformers: every width, depth and count by the name of its field."""

import re
from typing import Any

import torch
from torch import nn

WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY = 64, 4, 2, 16, 4, 64
SPREAD = 0.12  # of the random weights: blocks matter, and no row overflows float32

# name of a field -> its tiny value; the first pattern that fits the whole name
SIZES: list[tuple[str, int | None]] = [
    (r"(.*_)?vocab_size(_.*)?|.*_vocab(ulary)?|n_vocab", VOCABULARY),
    (r".*_token_(id|index|ids)|index_.*_token", None),  # below the vocabulary
    (r"(num_hidden_|n_|num_|(num_)?(en|de)coder_)?layers|(n|num)_layer|depth", LAYERS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|kv_n_heads", KV_HEADS),
    (r".*num_attention_heads|attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|n_head", HEADS),
    (r"(.*_)?head_dim|d_kv|head_size|attention_head_size|rotary_dim", HEAD),
    (
        r"hidden_size(_global)?|d_model|d_latents|n_embd|dim|emb_dim|embed_dim|embedding_size|word_embed_proj_dim|.*_hidden_size",
        WIDTH,
    ),
    (r"hidden_dim|text_embed_dim|projection_dim|out_hidden_size|output_dim|n_embed|lru_width", WIDTH),
    (r"(moe|.*expert)_(intermediate|ffn)(_hidden)?_(size|dim)|moe_ffn_dim|share_expert_dim", 16),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|mlp_dim|dim_ff|d_inner", 48),
    (r"n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts|num_moe_experts", 4),
    (r"num_experts_per_tok(en)?|top_k(_experts)?|moe_topk|moe_top_k|moe_k|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(q|kv|o)_lora_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len.*", 64),
    (r"(.*_)?sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size|local_attention", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"num_query_tokens|latent_query_num|num_filters|num_self_attends_per_block", 4),
    (r"image_size|base_channels", 32),
    (r"patch_size", 16),
]

PICTURE_TOKEN = r"(image|video)_token_(id|index)"
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN4 = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# what the names do not say: class of a model -> fields of its config, those of a part as "text_config.field"
GEMMA4 = [*["sliding_attention", "full_attention"] * 2, "full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    # of two kinds of layers at least two of each are left when any one is skipped
    "JambaForCausalLM": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "BambaForCausalLM": {"num_hidden_layers": 6, "attn_layer_indices": [1, 3, 4], "mamba_n_heads": 8},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "MllamaForConditionalGeneration": {
        "vision_config.intermediate_layers_indices": [0, 2],
        "vision_config.vision_output_dim": 3 * WIDTH,
    },
    "MobileBertForMaskedLM": {"intra_bottleneck_size": 64},
    "MobileBertModel": {"intra_bottleneck_size": 64},
    "HunYuanVLForConditionalGeneration": {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "Mistral4ForCausalLM": {
        "rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    },
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": 5},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 5},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "ReformerModel": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "DbrxForCausalLM": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention"] * 3,
        "num_hidden_layers": 6,
        "mamba_n_heads": 8,
    },
    "Zamba2ForCausalLM": {
        "layers_block_type": [*["mamba", "hybrid"] * 3, "mamba"],  # as the published ones, which end so
        "num_hidden_layers": 7,
        "attention_hidden_size": 128,
    },
    "NeoMMEForMaskedLM": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "Gemma4ForCausalLM": {"layer_types": GEMMA4, "num_hidden_layers": len(GEMMA4)},
    "Gemma4ForConditionalGeneration": {
        "text_config.layer_types": GEMMA4,
        "text_config.num_hidden_layers": len(GEMMA4),
    },
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE}},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": {"full_attention": ROPE}},
    "Florence2ForConditionalGeneration": {
        "vision_config.embed_dim": (8, 16, 32, 64),
        "vision_config.num_groups": (1, 1, 2, 4),
        "vision_config.num_heads": (1, 1, 2, 4),
    },
    "MuseSparkForConditionalGeneration": {"audio_config.hidden_sizes": (8, 16, 32, 64)},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
        "text_config.num_experts_per_tok": 2,
        "text_config.topk_method": "greedy",
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config.rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "Gemma3nForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "Molmo2ForConditionalGeneration": {"adapter_config.vision_feature_layer": [3, 1]},
    "Qwen4ExpForCausalLM": QWEN4,
    "Qwen4ExpForConditionalGeneration": {
        f"text_config.{name}": value for name, value in (QWEN4 | {"num_hidden_layers": 8}).items()
    },
    "ZambaForCausalLM": {
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "num_hidden_layers": 6,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
    },
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "EsmcForMaskedLM": {"num_key_value_heads": HEADS},
    "EsmForMaskedLM": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 5},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 3, "num_hidden_layers": 6},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "MambaForCausalLM": {"time_step_rank": 4},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 4},
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 6},
    "EncoderDecoderModel": {"decoder_start_token_id": 1},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "XmodForCausalLM": {"default_language": "en_XX", "is_decoder": True},
    "XmodForMaskedLM": {"default_language": "en_XX"},
}
for _name in ("Qwen2VL", "Qwen2_5_VL", "Qwen2_5OmniThinker", "PaddleOCRVL"):
    _changes = CHANGES.setdefault(f"{_name}ForConditionalGeneration", {})
    _changes["text_config.rope_parameters"] = ROPE | {"mrope_section": [2, 3, 3]}
for _name in ("Glm46V", "Glm4v", "Glm4vMoe", "GlmOcr"):
    CHANGES[f"{_name}ForConditionalGeneration"] = {
        "text_config.rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    }
# decoders among the encoders
_DECODERS = "BigBird Camembert Data2VecText Electra Ernie MegatronBert RemBert RoCBert RoFormer Roberta"
_DECODERS += " RobertaPreLayerNorm XLMRoberta XLMRobertaXL"
for _name in ("BertLMHeadModel", "BertGenerationDecoder", *(f"{kind}ForCausalLM" for kind in _DECODERS.split())):
    CHANGES[_name] = {"is_decoder": True}
# of attention that comes every fourth layer, two
for _name in ("BailingHybrid", "KimiLinear", "Lfm3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe"):
    CHANGES[f"{_name}ForCausalLM"] = {"num_hidden_layers": 8}
for _name in ("Lfm3Vl", "Qwen3_5", "Qwen3_5Moe"):
    CHANGES[f"{_name}ForConditionalGeneration"] = {"text_config.num_hidden_layers": 8}


def tiny_config(model_class: Any) -> Any:
    """A config for this class of transformers with all its parts shrunk."""
    return _shrunk(model_class.config_class(), CHANGES.get(model_class.__name__, {}))


def _shrunk(default: Any, changes: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {}
    for name, value in default.__dict__.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            part = {key.partition(".")[2]: v for key, v in changes.items() if key.startswith(f"{name}.")}
            fields[name] = _shrunk(value, part)
        elif type(value) is int and not name.startswith("_"):
            fields[name] = _small(name, value)
    _fill_in(default, fields)
    _keep_all_heads(default, fields)
    _shrink_sections(default, fields)
    fields |= {key: value for key, value in changes.items() if "." not in key}
    usual = vars(type(default)())  # of a part, which may have been given others
    changed = {key: value for key, value in fields.items() if hasattr(value, "to_dict") or value != usual.get(key)}
    return type(default)(**changed)


def _fill_in(default: Any, fields: dict[str, Any]) -> None:
    """What defaults leave open and published configs say, and a few layers of each kind."""
    missing = (name for name, value in vars(default).items() if value is None and re.fullmatch(PICTURE_TOKEN, name))
    fields |= dict.fromkeys(missing, VOCABULARY - 1)
    kinds = vars(default).get("layers_block_type")
    if isinstance(kinds, list):  # two of each
        fields["layers_block_type"] = 2 * list(dict.fromkeys(kinds))
        fields["num_hidden_layers"] = len(fields["layers_block_type"])
    if vars(default).get("head_dim", HEAD) is None:
        fields["head_dim"] = HEAD
    if "qk_head_dim" in fields:
        fields["qk_head_dim"] = 2 * HEAD  # with positions and without
    if default.is_encoder_decoder and getattr(default, "decoder_start_token_id", None) is None:
        fields["decoder_start_token_id"] = 0


def _small(name: str, value: int) -> int:
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            if small == LAYERS and value > 1:
                return LAYERS
            return value if value < 0 else min(value, VOCABULARY - 4 + value % 4 if small is None else small)
    return value


def _keep_all_heads(default: Any, fields: dict[str, Any]) -> None:
    """As many keys as queries, where that is the default: latent attention has no groups."""
    heads, keys = (vars(default).get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads == keys and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", HEADS)


def _shrink_sections(default: Any, fields: dict[str, Any]) -> None:
    """Multimodal rotary positions: their sections fill half of the (smaller) head."""
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        head = vars(default).get("head_dim") or default.hidden_size // default.num_attention_heads
        whole = sum(rope["mrope_section"]) * HEAD // head
        sections = [max(1, n * HEAD // head) for n in rope["mrope_section"]]
        sections[-1] = whole - sum(sections[:-1])
        fields["rope_parameters"] = rope | {"mrope_section": sections}


def shake(model: nn.Module) -> nn.Module:
    """Random weights for all: blocks that begin as the identity (gates of zero) would let a wrong skip pass."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # norm scales stay near what they are, one or, in Gemma's writing, zero
            centre = parameter.mean() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + SPREAD * torch.randn(parameter.shape, generator=generator))
    return model.eval().float()
