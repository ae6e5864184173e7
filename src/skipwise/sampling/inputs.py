"""What a caller gives as prompts, made into what samplers take: int64 ids padded on the left, and a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.errors import UserError
from skipwise.examples import check_text_alone
from skipwise.models import end_of_text

Ids = Tensor | Sequence[Sequence[int]]


def read_prompts(
    model: nn.Module, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None
) -> tuple[Tensor, Tensor | None]:
    """(ids (batch, prompt_length) int64, mask of the same shape or None), on the model's device.

    input_ids: a tensor or an array of integers, or lists of them, one a prompt, which are padded on the left when they
    are of unequal length; attention_mask: 0 on padding; token_type_ids: of tokenizers that make them, all 0.
    Raises UserError for an empty list of prompts, for padding on the right, for what holds no token ids, and for a
    model that does not run on text alone.
    """
    check_text_alone(model, "asked to continue")
    if isinstance(input_ids, Mapping):
        raise UserError("These are a tokenizer's outputs; hand them over by name: generate(model, **inputs).")
    if attention_mask is None and _is_ragged(input_ids):
        input_ids, attention_mask = _padded(model, input_ids)
    ids, mask = _tensor("input_ids", input_ids), attention_mask
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"input_ids of shape {tuple(ids.shape)} hold no prompts; give (batch, prompt_length).")
    _check_ids(model, ids)
    if mask is not None:
        mask = _tensor("attention_mask", mask, floating=True)
        if mask.shape != ids.shape:
            raise UserError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
        if not mask[:, -1].all():
            raise UserError("Prompts are padded on the right; pad on the left (tokenizer.padding_side = 'left').")
    if token_type_ids is not None and bool(_tensor("token_type_ids", token_type_ids).any()):
        raise UserError(f"token_type_ids are not all 0, and {type(model).__name__} knows no types; leave them out.")
    device = _device(model, ids)
    return ids.to(device), None if mask is None else mask.to(device)


def _is_ragged(input_ids: Any) -> bool:
    """Whether these are lists of unequal length."""
    lists = isinstance(input_ids, list | tuple) and all(isinstance(row, list | tuple) for row in input_ids)
    return lists and len({len(row) for row in input_ids}) > 1


def _padded(model: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    pad = getattr(model.config, "pad_token_id", None)
    pad = end_of_text(model) if pad is None else pad
    if pad is None:
        raise UserError("Prompts are of unequal length and the model's config has no pad_token_id; pad them yourself.")
    if not all(map(len, rows)):
        empty = next(number for number, row in enumerate(rows) if not len(row))
        raise UserError(f"Prompt {empty} has no tokens; give each prompt one token or more.")
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    return ids, [[0] * (width - len(row)) + [1] * len(row) for row in rows]


def _tensor(name: str, values: Any, floating: bool = False) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} are no rows of numbers of one length: {error}.") from error
    if found.numel() and (found.is_complex() or (found.is_floating_point() and not floating)):
        raise UserError(f"{name} are {found.dtype}; token ids are integers.")
    return found if floating else found.long()


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    words = getattr(model.config, "vocab_size", None)
    low, high = (int(n) for n in ids.aminmax())
    if low < 0 or (words is not None and high >= words):
        worst = low if low < 0 else high
        raise UserError(
            f"Token {worst} is not in the vocabulary of {words} of {type(model).__name__}; take its own tokenizer."
        )


def _device(model: nn.Module, ids: Tensor) -> torch.device:
    """Where the model runs; where the ids are, when its weights are elsewhere until they are needed."""
    found = next((parameter.device for parameter in model.parameters()), ids.device)
    return ids.device if found.type == "meta" else found
