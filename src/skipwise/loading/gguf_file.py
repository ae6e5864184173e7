"""A GGUF file as a transformers model."""

from typing import Any

import torch
import transformers

from skipwise.loading.checks import quiet
from skipwise.loading.classes import DTYPES
from skipwise.loading.source import Source


def load_gguf(source: Source, dtype: str | None) -> Any:
    """The model in the file, its weights unpacked to `dtype`, float32 when left out."""
    chosen = DTYPES[dtype] if dtype else torch.float32
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf, dtype=chosen)
    model.name_or_path = source.name
    return model
