"""How much of a text that was decoded approximately, with a cache or by a threshold, is as decoded exactly."""

import torch
from torch import Tensor

from skipwise.errors import UserError


def agreement(approximate: Tensor, exact: Tensor, prompt_length: int, eos_token_id: int | None = None) -> float:
    """The share of tokens at which two decodings of the same prompts are equal, over all rows.

    approximate, exact: (batch, length), as `generate` returns them; the first `prompt_length` positions do not count.
    eos_token_id: a row's text goes up to and with its first end of text, and what only the longer text has is unequal;
    None compares all positions. 1 says that the texts are the same. A text that differs early often differs from there
    on: this is a harsher figure than a task's score. Raises UserError for decodings of different shapes.
    """
    if approximate.shape != exact.shape:
        raise UserError(
            f"Decodings {tuple(approximate.shape)} and {tuple(exact.shape)} are not of one batch; compare those of one."
        )
    one, other = approximate[:, prompt_length:], exact[:, prompt_length:]
    if one.shape[1] < 1:
        raise UserError(f"prompt_length={prompt_length} leaves none of {exact.shape[1]} positions to compare.")
    mine, theirs = _text(one, eos_token_id), _text(other, eos_token_id)
    return int(((one == other) & mine & theirs).sum()) / int((mine | theirs).sum())


def _text(tokens: Tensor, eos: int | None) -> Tensor:
    """(batch, length): up to and with each row's first end of text."""
    if eos is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == eos).long()
    return ended.cumsum(1) - ended == 0
