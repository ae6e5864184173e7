"""A judge of text: any causal language model, asked how probable texts are to it (generative perplexity).

Texts are read again with the judge's own tokenizer. Where a text ends is a rule (`RULES`), as the numbers depend on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.errors import UserError, unknown
from skipwise.evaluation.likelihood import pad
from skipwise.loading import load
from skipwise.models import kind_of

# what becomes of the end of a text: rule -> in words, as every Result shows it
RULES = {
    "cut": "what a sample says after its first end of text is dropped; the judge's own end of text is not scored",
    "mdlm": "MDLM's official count: nothing is dropped; every token is scored but the judge's ends of text after the "
    "first one; what is longer than the judge takes is cut",
}


@dataclass(frozen=True)
class Judge:
    """A causal language model that scores texts.

    batch_size: texts a forward, at most. max_tokens: positions a forward, padding included: it bounds the memory of the
    logits, max_tokens x vocabulary; a longer text is read in pieces over the KV cache.
    """

    name: str
    model: Any
    tokenizer: Any
    batch_size: int = 16
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for what in ("batch_size", "max_tokens"):
            if getattr(self, what) < 1:
                raise UserError(f"{what}={getattr(self, what)} of the judge; at least 1 is needed.")

    @classmethod
    def load(
        cls,
        name: str,
        device: str | None = None,
        dtype: str | None = "float32",
        batch_size: int = 16,
        max_tokens: int = 2048,
    ) -> "Judge":
        """The judge of this name, anything that `skipwise.load` takes; loaded once a process, dtype and device.

        dtype: of the weights, None the checkpoint's own; scores are in float32 and their sums in float64 in any case.
        Raises UserError for what is not a causal language model, or has no tokenizer.
        """
        return cls(name, *_load(name, device, dtype), batch_size, max_tokens)

    @property
    def limit(self) -> int | None:
        """The longest text that the judge reads, in tokens; None where neither config nor tokenizer says."""
        config = self.model.config.get_text_config()
        told = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        return min((n for n in told if n and n < 1_000_000_000), default=None)  # tokenizers say 1e30 for "no limit"

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the judge tells apart."""
        return int(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def score(
        self, texts: Sequence[str], prefixes: Sequence[str] | None = None, rule: str = "cut"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(texts,) negative log-likelihoods in nats, and (texts,) numbers of tokens that were scored.

        prefixes: as many, one before each text, which are read but not scored. Prefix and text are tokenized together;
        a token belongs to the text when it ends in it, so one that lies across the border is scored.
        rule: one of `RULES`. Under "cut" the judge's begin-of-text token stands in front, and the first token is scored
        too; a tokenizer without one leaves it unscored. Under "mdlm" the tokenizer adds what it adds by itself, the
        first token is never scored, and the text is to hold its ends of text in the judge's own spelling.
        A text that holds nothing scores 0 in 0 tokens. Raises UserError for a text that is too long for the judge.
        """
        if rule not in RULES:
            raise unknown("end-of-text rule", rule, RULES)
        before = prefixes if prefixes is not None else [""] * len(texts)
        read = [self._read(text, prefix, rule) for text, prefix in zip(texts, before, strict=True)]
        nll, tokens = np.zeros(len(read)), np.array([sum(counts) for _, counts in read], dtype=float)
        for batch in self._batches(read):
            losses = self._losses([read[i][0] for i in batch])
            for i, loss in zip(batch, losses, strict=True):
                counts = torch.tensor(read[i][1][1:])
                nll[i] = float(loss[: len(counts)][counts].sum())
        return nll, tokens

    def _read(self, text: str, prefix: str, rule: str) -> tuple[list[int], list[bool]]:
        """The tokens of prefix and text, and which of them are scored."""
        if prefix and not self.tokenizer.is_fast:
            raise UserError(
                f"{self.name} has a tokenizer without offsets, which cannot tell a prefix from what follows."
            )
        found = self.tokenizer(
            prefix + text, add_special_tokens=rule == "mdlm", return_offsets_mapping=bool(prefix), verbose=False
        )
        ids = found["input_ids"]
        counts = counted(ids, self.tokenizer.eos_token_id, rule)
        if prefix:
            ends = [end for _, end in found["offset_mapping"]]
            counts = [count and end > len(prefix) for count, end in zip(counts, ends, strict=True)]
        if rule == "cut" and self.tokenizer.bos_token_id is not None:
            ids, counts = [self.tokenizer.bos_token_id, *ids], [False, *counts]
        if rule == "mdlm":
            ids, counts = ids[: self.limit], counts[: self.limit]
        self._check_length(len(ids))
        return ids, [False, *counts[1:]]

    def _check_length(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit:
            raise UserError(
                f"A text has {tokens} tokens of {self.name}, which reads {self.limit} at most; "
                "write shorter texts (length), or choose a judge that reads more."
            )

    def _batches(self, read: Sequence[tuple[list[int], list[bool]]]) -> Iterator[list[int]]:
        """Numbers of the texts of each forward, shortest first; those without a scored token are left out."""
        batch: list[int] = []
        for i in sorted((i for i, (_, counts) in enumerate(read) if any(counts)), key=lambda i: len(read[i][0])):
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * len(read[i][0]) > self.max_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _losses(self, rows: Sequence[list[int]]) -> Tensor:
        """(rows, longest - 1), float64 on the CPU: -log p of every token but the first; padding holds anything."""
        ids, present = (tensor.to(self.model.device) for tensor in pad(rows, left=False))
        pieces, past = [], None
        for begin in range(0, ids.shape[1] - 1, self.max_tokens):
            end = begin + self.max_tokens
            out = self.model(
                input_ids=ids[:, begin:end],
                attention_mask=present[:, :end].long(),
                past_key_values=past,
                use_cache=ids.shape[1] - 1 > self.max_tokens,
            )
            past = out.past_key_values if "past_key_values" in out else None
            targets = ids[:, begin + 1 : end + 1]
            # one row after the other, so that one row's logits are held in float32, not the batch's
            pairs = zip(out.logits, targets, strict=True)
            losses = [F.cross_entropy(z[: len(t)].float(), t, reduction="none") for z, t in pairs]
            pieces.append(torch.stack(losses).double().cpu())
        return torch.cat(pieces, dim=1)


def counted(ids: Sequence[int], eos: int | None, rule: str) -> list[bool]:
    """Which of the judge's tokens `ids` a rule scores, were each of them predicted; eos: the judge's end of text."""
    ends = [token == eos for token in ids]
    if rule == "cut":
        return [not end for end in ends]
    return [not end or seen == 1 for end, seen in zip(ends, accumulate(ends), strict=True)]


@cache
def _load(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    model, tokenizer = load(name, device=device, dtype=dtype)
    kind = kind_of(model)
    if kind != "autoregressive" or getattr(model.config, "is_encoder_decoder", False):
        said = "encoder-decoder" if kind == "autoregressive" else kind
        raise UserError(f"{name} is no judge: it is of the kind {said!r}; give a causal language model.")
    if tokenizer is None:
        raise UserError(f"{name} is no judge: it came without a tokenizer, so it cannot read texts.")
    return model, tokenizer
