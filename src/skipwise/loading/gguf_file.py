"""A GGUF file as a model: of transformers, its weights unpacked, or of diffusers (see `single_file`).

transformers tells neither of tensors that it has no place for nor of facts of the file that it does not read, so that
both are checked here against the model that it makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from skipwise.errors import UserError, require
from skipwise.loading.checks import check_keys, quiet
from skipwise.loading.classes import build_skeleton
from skipwise.loading.source import Source


@dataclass
class GGUF:
    """What the header of a GGUF file says."""

    source: Source
    reader: Any = field(repr=False)

    @classmethod
    def open(cls, source: Source) -> "GGUF":
        """Read the header. Raises UserError for a damaged file."""
        gguf = require("gguf", "gguf")
        try:
            return cls(source, gguf.GGUFReader(source.folder / str(source.gguf)))
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{source.name} is damaged or no GGUF file ({error}); download it again.") from error

    def fact(self, name: str, default: Any = None) -> Any:
        """A field of the file; `{arch}` in the name stands for the architecture."""
        found = self.reader.fields.get(name.format(arch=self.architecture) if "{" in name else name)
        return default if found is None else found.contents()

    @cached_property
    def architecture(self) -> str:
        """Such as qwen2; empty where the file does not say."""
        return str(self.fact("general.architecture", ""))

    @property
    def is_language_model(self) -> bool:
        """Whether a tokenizer is in the file."""
        return any(name.startswith("tokenizer.") for name in self.reader.fields)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> its shape when it is unpacked."""
        return {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self.reader.tensors}

    @cached_property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)


def load_gguf(source: Source, dtype: torch.dtype | None) -> Any:
    """The language model in the file, its weights unpacked to `dtype`, float32 when left out.

    Raises UserError when a tensor or a fact of the file has no place in the model, or a parameter none in the file.
    """
    file = GGUF.open(source)
    _check_blocks(file)
    with quiet():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            gguf_file=source.gguf,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the others
        )
    check_keys(source, report, strict=True, model=model)
    _check_facts(file, model.config)
    _check_elements(file, model)
    model.name_or_path = source.name
    return model


def gguf_skeleton(source: Source) -> nn.Module:
    """The language model that the file describes, on the meta device."""
    file = GGUF.open(source)
    _check_blocks(file)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf)
    _check_facts(file, config)
    return build_skeleton(config.to_dict(), source.name)


def _check_blocks(file: GGUF) -> None:
    count = file.fact("{arch}.block_count")
    numbers = {int(name.split(".")[1]) for name in file.shapes if name.startswith("blk.")}
    if count is None or not numbers or numbers == set(range(int(count))):
        return
    odd = min(numbers.symmetric_difference(range(int(count))))
    what = "lacks" if odd not in numbers else "has"
    raise UserError(
        f"{file.source.name} says that it has {count} blocks ({file.architecture}.block_count), but {what} the "
        f"tensors of block {odd} (blk.{odd}.*); download it again, or convert it anew."
    )


def _check_facts(file: GGUF, config: Any) -> None:
    """Facts that change what the model computes, and that transformers does not read."""
    for name, said, built in _unread(file, config):
        raise UserError(
            f"{file.source.name} has {name}={said}, which transformers does not read (it builds {built}): the model "
            "would be another one; load the original folder of safetensors."
        )


def _unread(file: GGUF, config: Any) -> Iterator[tuple[str, str, str]]:
    pattern = file.fact("{arch}.attention.sliding_window_pattern")
    kinds = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    if isinstance(pattern, list) and list(map(bool, pattern)) != kinds:
        yield f"{file.architecture}.attention.sliding_window_pattern", str(pattern), str(kinds or "no windows")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = file.fact("{arch}.rope.scaling.type", "none")
    if kind != "none" and rope.get("rope_type", "default") == "default":
        yield f"{file.architecture}.rope.scaling.type", kind, "rotary embeddings without scaling"
    factors = next((t.data for t in file.reader.tensors if t.name == "rope_freqs.weight"), None)
    if factors is not None and (factors != 1).any() and rope.get("rope_type", "default") == "default":
        yield "rope_freqs.weight", f"{factors.min():g} to {factors.max():g}", "rotary embeddings without scaling"


def _check_elements(file: GGUF, model: nn.Module) -> None:
    """However a reader cuts and joins tensors, their numbers stay as many."""
    unread = {name: shape for name, shape in file.shapes.items() if name.startswith("rope_")}
    held = sum(p.numel() for p in model.parameters())
    found = file.elements - sum(torch.Size(shape).numel() for shape in unread.values())
    if found != held:
        raise UserError(
            f"{file.source.name} holds {found:,} numbers, of which the {type(model).__name__} that transformers "
            f"makes of it takes {held:,}: some tensors were not read; load the original folder of safetensors."
        )


def path_of(source: Source) -> Path:
    """Of the one file that a source is."""
    return source.folder / str(source.gguf or source.single)
