"""The tokenizer beside a model's weights."""

from typing import Any

import transformers

from skipwise.loading.checks import quiet
from skipwise.loading.gguf_file import GGUF
from skipwise.loading.source import Source, find


def load_tokenizer(source: Source, name: str | None = None) -> Any:
    """The tokenizer of a source, or of what else is named, which pads on the left; None where there is none."""
    if name is not None:
        return load_tokenizer(find(name, weights=False))
    if source.single or (source.gguf and not GGUF.open(source).is_language_model):
        return None
    if source.gguf:
        return transformers.AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, padding_side="left")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((source.folder / name).exists() for name in names):
        return None
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, padding_side="left")
