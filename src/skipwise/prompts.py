"""Where the words of a prompt are in the text stream that a pipeline makes of it."""

import re
from typing import Any

from skipwise.errors import UserError


def token_positions(
    tokenizer: Any, prompt: str, subject: str, *, max_length: int | None = None, prefix: str = "", offset: int = 0
) -> tuple[int, ...]:
    """Positions of the subject's words in a text stream as a pipeline makes it of a prompt; every time they occur.

    prompt: as the pipeline hands it to the tokenizer (PixArt and SANA lower its case first). subject: one or more whole
    words of it, in any case. max_length: to which the pipeline pads and cuts the text. prefix: what SANA writes before
    every prompt (its complex human instruction) and drops again: of the encoded text it keeps the first token and the
    last `max_length` - 1. offset: how many tokens of other encoders come first in the stream.
    FLUX: T5 with max_length=512. PixArt: T5, 300. SANA: Gemma, 300, and the prefix. SD3: of CLIP with max_length=77,
    and of T5 with max_length=256, offset=77; both are the subject's.
    Raises UserError when the subject is not in the prompt or is cut off, and for a tokenizer without offsets.
    """
    words = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE)]
    if not subject or not words:
        raise UserError(f"The subject {subject!r} is not in the prompt {prompt!r}; give a word of the prompt.")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} does not say where its tokens are; load a fast tokenizer.")
    dropped = _prefix_length(tokenizer, prefix, max_length)
    padding: dict[str, Any] = {}
    if max_length is not None:
        padding = {"padding": "max_length", "truncation": True, "max_length": max_length + dropped}
    text = prefix + prompt
    spans = tokenizer(text, return_offsets_mapping=True, **padding)["offset_mapping"]
    found = [
        position - dropped + offset
        for position, (begin, end) in enumerate(spans)
        if any(_overlap(text, begin, end, len(prefix) + first, len(prefix) + last) for first, last in words)
    ]
    if not found:
        raise UserError(f"The subject {subject!r} is cut off: it is behind the {max_length} tokens of the text stream.")
    return tuple(found)


def _prefix_length(tokenizer: Any, prefix: str, max_length: int | None) -> int:
    """How many tokens of the encoded text SANA drops: those of the prefix, but for the two special ones it counts."""
    if not prefix:
        return 0
    if max_length is None:
        raise UserError("A prefix is dropped by counting from the end of the padded text; give max_length too.")
    return len(tokenizer.encode(prefix)) - 2


def _overlap(text: str, begin: int, end: int, first: int, last: int) -> bool:
    """Whether a token, without the space before its word, has a letter between `first` and `last`."""
    begin += len(text[begin:end]) - len(text[begin:end].lstrip())
    return max(begin, first) < min(end, last)
