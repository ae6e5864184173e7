"""Autoregressive decoding: a thin call of transformers' `generate` and its KV cache, under the applied plan."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode_autoregressive(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    gen_length: int,
    temperature: float,
    seed: int,
    stop_at_eos: bool,
) -> Tensor:
    """(batch, prompt_length) padded on the left -> (batch, prompt_length + up to gen_length)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not stop_at_eos:
        sampling["min_new_tokens"] = gen_length
    pad = model.generation_config.pad_token_id
    with torch.random.fork_rng(enabled=temperature > 0):
        torch.manual_seed(seed)
        return model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=gen_length,
            use_cache=True,
            pad_token_id=0 if pad is None else pad,
            **sampling,
        )
