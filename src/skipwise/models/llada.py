"""LLaDA: a masked diffusion language model, native, from the official checkpoints.

Source: Nie et al., "Large Language Diffusion Models" (arXiv 2502.09992). Mathematically LLaDA is a Llama with
bidirectional attention, so this is a thin face of transformers' Llama: a config translation and a key map. Attention
kernels, device placement, sharded loading and maintenance come from transformers.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipwise.errors import UserError
from skipwise.models.bidirectional import Bidirectional
from skipwise.models.native import OfficialConfig, registered
from skipwise.models.official import Layout
from skipwise.models.random import random_model

# official config.json key -> LlamaConfig key
CONFIG_KEYS = {
    "attention_dropout": "attention_dropout",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}

OFFICIAL_VOCABULARY, END_OF_TURN = 126464, 126348
OFFICIAL_ROPE = 500000.0  # LLaDA-8B's rope_theta

# What the official code can do and this module does not: any other value is refused by name.
ONLY_SUPPORTED = {
    "block_type": "llama",
    "block_group_size": 1,
    "alibi": False,
    "rope": True,
    "rope_full_precision": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "scale_logits": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "activation_type": "silu",
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}

LAYOUT = Layout(
    family="LLaDA",
    architectures=("LLaDAModelLM",),
    needed=("d_model", "n_layers", "n_heads", "vocab_size"),
    used=(*CONFIG_KEYS, "mlp_ratio", "embedding_size", "rope_theta"),
    only=ONLY_SUPPORTED,
    # biases of alibi, norms of attention, how weights began, kernels and precision of the official training code
    idle=(
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "flash_attention",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "init_std",
        "precision",
        "train_max_sequence_length",
    ),
    not_taken={
        "rope_scaling": "which LLaDA's own code does not read, so that what is meant is not known; take it out of "
        "config.json, or scale rope_theta, which is what NTK scaling does.",
        "rope_parameters": "which LLaDA's own code does not read; write rope_theta instead.",
    },
)

# part of a block in the official checkpoint -> here
PARTS = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
ENDS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}

# regular expression over official keys -> key of this module. The outer prefix `model.` may be missing: transformers
# adds its own. It carries over one captured group a pattern, no more. To save the official layout it turns the patterns
# round, which is why the short names at the ends are anchored.
KEY_MAPPING = {
    r"transformer\.wte\.": "embed_tokens.",
    r"^transformer\.ln_f\.": "^model.norm.",
    r"^transformer\.ff_out\.": "^lm_head.",
    r"^model\.transformer\.ln_f\.": "^model.norm.",
    r"^model\.transformer\.ff_out\.": "^lm_head.",
    **{rf"transformer\.blocks\.(\d+)\.{theirs}\.": rf"layers.\1.{ours}." for theirs, ours in PARTS.items()},
}


class LLaDAConfig(OfficialConfig, LlamaConfig):
    """A `LlamaConfig` whose attention looks both ways (`is_causal` False), with LLaDA's mask token."""

    model_type = "llada"
    mask_token_id: int | None = 126336
    eot_token_id: int | None = None  # ends a turn; the official files know it by number only
    is_causal: bool = False
    use_cache: bool = False
    layout: ClassVar[Layout] = LAYOUT

    @classmethod
    def is_official(cls, config: Mapping[str, Any]) -> bool:
        """The official name of the width is d_model."""
        return "hidden_size" not in config

    @classmethod
    def from_official(cls, official: dict[str, Any]) -> "LLaDAConfig":
        """Translate the dictionary of an official config.json.

        Raises UserError naming the key, its value and the supported one for what this module does not implement.
        """
        stored = LAYOUT.check(official)
        settings = {ours: official[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in official}
        if settings.get("intermediate_size") is None:
            if official.get("mlp_ratio") is None:
                raise UserError("LLaDA config lacks mlp_hidden_size; is this an official LLaDA config.json?")
            settings["intermediate_size"] = official["mlp_ratio"] * official["d_model"]
        # the embedding table is `embedding_size` rows tall; it is padded above the tokenizer's vocabulary
        settings["vocab_size"] = official.get("embedding_size") or official["vocab_size"]
        if settings["vocab_size"] == OFFICIAL_VOCABULARY:
            settings["eot_token_id"] = END_OF_TURN
        theta = float(official.get("rope_theta") or 10000.0)
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        # where the official defaults are not Llama's
        settings = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None} | settings
        return cls(architectures=["LLaDAModelLM"], **settings, **stored)

    def to_official(self) -> dict[str, Any]:
        """The official config.json that `from_official` reads back to this config."""
        official = {theirs: getattr(self, ours) for theirs, ours in CONFIG_KEYS.items()}
        official |= {key: value for key, value in ONLY_SUPPORTED.items() if value is not None}
        official |= {"vocab_size": self.vocab_size, "embedding_size": self.vocab_size}
        official |= {"rope_theta": cast(dict, self.rope_parameters)["rope_theta"]}
        return {"model_type": "llada", "architectures": ["LLaDAModelLM"], **official}


@registered
class LLaDAModelLM(Bidirectional, LlamaForCausalLM):  # type: ignore[misc]  # generate is not transformers'
    """LLaDA with its language-model head. `model(input_ids).logits[b, p]` predicts the token *at* position p.

    input_ids: (batch, length) int64, masked positions hold `config.mask_token_id`; attention_mask: (batch, length),
    0 on left padding; logits: (batch, length, vocab_size).
    """

    config_class = LLaDAConfig
    config: LLaDAConfig
    official_keys = KEY_MAPPING

    @classmethod
    def from_dims(
        cls,
        *,
        width: int,
        layers: int,
        heads: int,
        mlp: int,
        vocab: int,
        mask_token_id: int | None = None,
        kv_heads: int | None = None,
        eos_token_id: int | None = None,
        max_length: int = 4096,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> "LLaDAModelLM":
        """A LLaDA of any shape with random weights, drawn on `device` in `dtype`: 8B parameters take seconds on a GPU.

        width: of the hidden states; mlp: of the MLPs inside; vocab: rows of the embedding and of the head, which are
        not tied; mask_token_id: the last of the vocabulary when left out; kv_heads: as many as heads when left out;
        eos_token_id: None never ends a text. Raises UserError for sizes that do not go together.
        """
        mask_token_id = vocab - 1 if mask_token_id is None else mask_token_id
        _check_dims(width, heads, kv_heads or heads, vocab, mask_token_id)
        config = LLaDAConfig(
            architectures=["LLaDAModelLM"],
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            intermediate_size=mlp,
            vocab_size=vocab,
            max_position_embeddings=max_length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": OFFICIAL_ROPE},
            mask_token_id=mask_token_id,
            bos_token_id=None,
            eos_token_id=eos_token_id,
        )
        return random_model(cls, config, dtype=dtype, device=device, seed=seed)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        logits_to_keep: Any = 0,
        states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Llama's forward. states: return what `self.states` does, at logits_to_keep, instead of logits."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        if states:
            return self.states(where=logits_to_keep, **inputs)
        return super().forward(**inputs, logits_to_keep=logits_to_keep)


LLaDA = LLaDAModelLM  # the paper's name


def _check_dims(width: int, heads: int, kv_heads: int, vocab: int, mask: int) -> None:
    if width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(
            f"width={width}, heads={heads}, kv_heads={kv_heads}: heads must be of an even width, and a multiple of "
            "kv_heads; try heads of 64."
        )
    if not 0 <= mask < vocab:
        raise UserError(f"mask_token_id={mask} is not in a vocabulary of {vocab}; leave it out to take the last.")


def official_state_dict(model: LLaDAModelLM) -> dict[str, torch.Tensor]:
    """The model's weights under the official checkpoint's keys (contiguous, tied head left out)."""
    ends, parts = ({ours: theirs for theirs, ours in names.items()} for names in (ENDS, PARTS))
    weights = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, _, leaf = key.rpartition(".")
        if module in ends:
            name = ends[module]
        else:
            _, _, number, part = module.split(".", 3)
            name = f"blocks.{number}.{parts[part]}"
        weights[f"model.transformer.{name}.{leaf}"] = tensor.contiguous()
    return weights
