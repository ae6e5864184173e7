"""Autoregressive decoding: a thin call of transformers' `generate` and its KV cache, under the applied plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from skipwise.errors import UserError
from skipwise.skipping import cut_now


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSettings:
    """temperature: 0 is greedy. stopping_criteria: transformers' own, such as for strings that end a text."""

    temperature: float = 0.0
    stopping_criteria: StoppingCriteriaList | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is negative; 0 is greedy, 1 is the model's distribution.")


@torch.no_grad()
def decode_autoregressive(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    gen_length: int,
    *,
    seed: int = 0,
    stop_at_eos: bool = True,
    settings: AutoregressiveSettings | None = None,
) -> Tensor:
    """(batch, prompt_length) padded on the left -> (batch, prompt_length + up to gen_length)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    settings = settings or AutoregressiveSettings()
    temperature = settings.temperature
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not stop_at_eos:
        sampling["min_new_tokens"] = gen_length
    pad = model.generation_config.pad_token_id
    with torch.random.fork_rng(enabled=temperature > 0), _own_state_refused(model):
        torch.manual_seed(seed)
        return model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=gen_length,
            use_cache=True,
            pad_token_id=0 if pad is None else pad,
            stopping_criteria=settings.stopping_criteria,
            **sampling,
        )


@contextmanager
def _own_state_refused(model: Any) -> Iterator[None]:
    """Of a class that keeps its state by layer itself (RWKV, XLNet, xLSTM), which no plan cuts, one line."""
    try:
        yield
    except (IndexError, TypeError) as error:
        if not any(cut_now(model).skipped.values()):
            raise
        raise UserError(
            f"{type(model).__name__} cannot generate under this plan, as it keeps a state of every layer itself "
            f"({error}); export the plan and generate with the export."
        ) from error
