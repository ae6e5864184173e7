"""How well a language model predicts held-out English text: token accuracy and perplexity, window by window."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.errors import UserError
from skipwise.evaluation.measure import Measured
from skipwise.evaluation.texts import documents
from skipwise.models import kind_of, mask_token
from skipwise.sampling.denoiser import Denoiser, Step

# Noise levels of a masked model's windows, one after the other (stratified, so that every window counts alike).
NOISE_LEVELS = (0.15, 0.35, 0.55, 0.75, 0.95)


@dataclass(frozen=True)
class TextTask:
    """The first `windows` windows of `tokens` tokens of one document, each with the begin-of-text token before it.

    An autoregressive model predicts every token from those before it. A masked model (diffusion or encoder) predicts
    the tokens that are masked at a known noise level, the same ones under every plan; its perplexity is over masked
    tokens and is not comparable with an autoregressive one.
    """

    name: str
    split: Literal["calibration", "test"]
    windows: int
    seed: int
    tokens: int = 256

    @property
    def facts(self) -> dict[str, Any]:
        """None beyond those of every task."""
        return {}

    def run(self, denoiser: Denoiser, tokenizer: Any) -> list[Measured]:
        """Two metrics: token accuracy, and perplexity."""
        model = denoiser.model
        if tokenizer is None:
            raise UserError(f"Task {self.name!r} needs a tokenizer, and this model came without one.")
        autoregressive = kind_of(model) == "autoregressive"
        rows = []
        with torch.no_grad():
            for i, window in enumerate(self._windows(tokenizer)):
                ids = torch.tensor([window], device=next(model.parameters()).device)
                rows.append(
                    _autoregressive(model, ids) if autoregressive else self._masked(denoiser, tokenizer, ids, i)
                )
        correct, loss, count = np.array(rows).T
        what = "next-token accuracy" if autoregressive else "masked-token accuracy"
        return [Measured(what, correct, count), Measured("perplexity", loss, count, perplexity=True)]

    def _windows(self, tokenizer: Any) -> Iterator[list[int]]:
        text = documents(self.split)[self.name]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        for i in range(min(self.windows, len(ids) // self.tokens)):
            yield begin + ids[i * self.tokens : (i + 1) * self.tokens]

    def _masked(self, denoiser: Denoiser, tokenizer: Any, ids: Tensor, number: int) -> tuple[float, float, int]:
        model, level = denoiser.model, NOISE_LEVELS[number % len(NOISE_LEVELS)]
        token = tokenizer.mask_token_id if kind_of(model) == "encoder" else mask_token(model)
        if token is None:
            raise UserError(f"{type(model).__name__} has no mask token, so it cannot be scored on {self.name!r}.")
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        masked = (torch.rand(ids.shape, generator=noise) < level).to(ids.device)
        step = Step(number, self.windows, ids, 1 - level)  # the moment of a trajectory at which so much is masked
        return _score(denoiser(step, ids.masked_fill(masked, token), where=masked), ids[masked])


def _autoregressive(model: nn.Module, ids: Tensor) -> tuple[float, float, int]:
    return _score(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])


def _score(logits: Tensor, targets: Tensor) -> tuple[float, float, int]:
    """logits (tokens, vocabulary), targets (tokens,) -> (correct tokens, summed log loss in nats, tokens)."""
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return float((logits.argmax(-1) == targets).sum()), float(loss), len(targets)
