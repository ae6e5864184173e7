"""Autoregressive decoding: a thin call of transformers' `generate` and its KV cache, under the applied plan.

A class may keep what it remembers of every layer itself (RWKV, SeamlessM4T), in a way that no plan can cut. Such a
model decodes without a cache under a plan: the same tokens, in more time.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from skipwise.errors import UserError
from skipwise.finite import Watch, not_finite
from skipwise.skipping import cut_now
from skipwise.typed import check_types


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSettings:
    """temperature: 0 is greedy. stopping_criteria: transformers' own, such as for strings that end a text."""

    temperature: float = 0.0
    stopping_criteria: StoppingCriteriaList | None = None

    def __post_init__(self) -> None:
        check_types(self)
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
    keywords = sampling | {
        "attention_mask": mask,
        "max_new_tokens": gen_length,
        "pad_token_id": 0 if pad is None else pad,
        "stopping_criteria": settings.stopping_criteria,
    }
    with torch.random.fork_rng(enabled=temperature > 0):
        if runs_with_cache(model):
            try:
                return _decode(model, input_ids, seed, keywords, use_cache=True)
            except _OF_A_STATE as error:
                if isinstance(error, UserError) or not _is_planned(model):
                    raise
                sequences = _without_cache(model, input_ids, seed, keywords, error)
                _remember(model, error)
                return sequences
        return _decode(model, input_ids, seed, keywords, use_cache=False)


# models whose own states do not go with a plan, which decode without a cache under any
_uncached: WeakSet[Any] = WeakSet()
# what a forward raises where its state is for more layers, or for fewer, than run
_OF_A_STATE = (IndexError, KeyError, TypeError, ValueError)


def runs_with_cache(model: Any) -> bool:
    """Whether the model decodes with its cache now: all do outside of plans, and nearly all under one."""
    return model not in _uncached or not _is_planned(model)


def _is_planned(model: Any) -> bool:
    return any(cut_now(model).skipped.values())


def _decode(model: Any, input_ids: Tensor, seed: int, keywords: dict[str, Any], use_cache: bool) -> Tensor:
    watching = _Watching()
    if keywords["do_sample"]:
        torch.manual_seed(seed)
    try:
        sequences: Tensor = model.generate(
            input_ids, use_cache=use_cache, logits_processor=LogitsProcessorList([watching]), **keywords
        )
    except RuntimeError as error:  # no draw is made from probabilities that are none
        if not watching.is_fine:
            raise not_finite(model, partial(model, input_ids=input_ids)) from error
        raise
    if not watching.is_fine:
        raise not_finite(model, partial(model, input_ids=input_ids))
    return sequences


class _Watching(LogitsProcessor):
    """Sees whether all logits are finite, and leaves them as they are."""

    def __init__(self) -> None:
        self.watch = Watch()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.watch.add(scores)
        return scores

    @property
    def is_fine(self) -> bool:
        return bool(self.watch.fine(torch.device("cpu")))


def _without_cache(model: Any, input_ids: Tensor, seed: int, keywords: dict[str, Any], error: Exception) -> Tensor:
    """What the model decodes without a cache. Raises `error`, the one with it, where that was not the cache's doing."""
    try:
        return _decode(model, input_ids, seed, keywords, use_cache=False)
    except _OF_A_STATE:
        raise error from None


def _remember(model: Any, error: Exception) -> None:
    _uncached.add(model)
    why = " ".join(str(error).split())[:100]
    warnings.warn(
        f"{type(model).__name__} keeps a state of every layer that does not go with this plan ({why}); it decodes "
        "without a cache under plans, which gives the same tokens in more time. An export of the plan is faster.",
        stacklevel=3,
    )
