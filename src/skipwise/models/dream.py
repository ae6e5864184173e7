"""Dream: a masked diffusion language model initialised from Qwen2.5, native, from the official checkpoints.

Source: Ye et al., "Dream 7B" (arXiv 2508.15487). Dream is Qwen2 with bidirectional attention, trained to predict
position p from the state at p - 1, as its autoregressive parent does. That shift is part of this model's face: whoever
uses it sees logits for position p at index p.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipwise.errors import UserError
from skipwise.models.official import check_official

ONLY_SUPPORTED = {"use_sliding_window": False, "hidden_act": "silu", "rope_scaling": None, "use_mrope": False}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# of the remote code's own bookkeeping; means nothing here
_IGNORED = (
    "auto_map",
    "model_type",
    "architectures",
    "rope_theta",
    "transformers_version",
    "use_cache",
    *ONLY_SUPPORTED,
)

KEY_MAPPING: dict[str, str] = {}  # the names are Qwen2's own


class DreamConfig(Qwen2Config):
    """A `Qwen2Config` whose attention looks both ways (`is_causal` False), with Dream's mask token."""

    model_type = "Dream"
    mask_token_id: int | None = 151666
    is_causal: bool = False
    use_cache: bool = False

    @classmethod
    def from_official(cls, official: dict[str, Any]) -> "DreamConfig":
        """Translate the dictionary of an official config.json.

        Raises UserError naming the key, its value and the supported one for what this module does not implement.
        """
        check_official("Dream", official, NEEDED, ONLY_SUPPORTED)
        settings = {key: value for key, value in official.items() if key not in _IGNORED}
        rope = {"rope_type": "default", "rope_theta": float(official.get("rope_theta", 1e6))}
        return cls(architectures=["DreamModel"], rope_parameters=rope, **settings)


class DreamModel(Qwen2ForCausalLM):
    """Dream with its language-model head. `model(input_ids).logits[b, p]` predicts the token *at* position p.

    input_ids: (batch, length) int64, masked positions hold `config.mask_token_id`; attention_mask: (batch, length),
    0 on left padding; logits: (batch, length, vocab_size).
    """

    config_class = DreamConfig
    config: DreamConfig
    is_masked_diffusion = True

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False  # the SDPA kernels read this flag when there is no padding mask

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Qwen2's forward with the logits of position p made from the state at p - 1; position 0 keeps its own.

        logits_to_keep: positions to predict, as an index (positions,), or the last n of them; 0 is all.
        Rotary positions count the padding too: attention sees differences of positions only, so that a left-padded
        row gives what it gives alone.
        """
        length = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        if not isinstance(logits_to_keep, Tensor):
            device = self.lm_head.weight.device
            logits_to_keep = torch.arange(length - (logits_to_keep or length), length, device=device)
        if logits_to_keep.ndim != 1 or logits_to_keep.dtype == torch.bool:
            raise UserError("Dream takes logits_to_keep as a number or as a one-dimensional index of positions.")
        return super().forward(input_ids, *args, logits_to_keep=(logits_to_keep - 1).clamp_min(0), **kwargs)
