"""A GGUF file as a model: of transformers, its weights unpacked, or of diffusers (see `single_file`).

transformers tells neither of tensors that it has no place for nor of facts of the file that it does not read, so that
both are checked here against the model that it makes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
    config = _config(file)
    with quiet():
        auto: Any = transformers.AutoModelForCausalLM
        model, report = auto.from_pretrained(
            source.folder,
            gguf_file=source.gguf,
            config=config,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the others
        )
    check_keys(source, report, strict=True, model=model)
    _check_elements(file, model)
    model.name_or_path = source.name
    return model


def gguf_skeleton(source: Source) -> nn.Module:
    """The language model that the file describes, on the meta device."""
    return build_skeleton(_config(GGUF.open(source)).to_dict(), source.name)


def _config(file: GGUF) -> Any:
    """transformers' config of the file, checked against it."""
    _check_blocks(file)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(file.source.folder, gguf_file=file.source.gguf)
    rotations = _llama3(file, config)
    if rotations:
        config.rope_parameters = rotations
    for name, said, built in _unread(file, config):
        raise UserError(
            f"{file.source.name} has {name}={said}, which transformers does not read (it builds {built}): the model "
            "would be another one; load the original folder of safetensors."
        )
    return config


def _llama3(file: GGUF, config: Any) -> dict[str, Any] | None:
    """Llama 3's scaling of rotary embeddings, where the file's factors are what it gives; transformers reads none."""
    factors = next((t.data for t in file.reader.tensors if t.name == "rope_freqs.weight"), None)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if factors is None or (factors == 1).all() or rope.get("rope_type", "default") != "default":
        return None
    said = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = rope | said | {"original_max_position_embeddings": 8192}
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    width = 2 * len(found)
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, width, 2) / width)
    same = len(factors) == len(found) and torch.allclose(plain / torch.from_numpy(factors.copy()), found, rtol=1e-4)
    return scaled.rope_parameters if same else None


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


def _unread(file: GGUF, config: Any) -> Iterator[tuple[str, str, str]]:
    """(name, value, what is built instead) of what changes the computation and is not in the config."""
    pattern = file.fact("{arch}.attention.sliding_window_pattern")
    kinds = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    if isinstance(pattern, list) and list(map(bool, pattern)) != kinds:
        yield f"{file.architecture}.attention.sliding_window_pattern", str(pattern), str(kinds or "no windows")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds_of_rope = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # Gemma 3 has two
    plain = all(one.get("rope_type", "default") == "default" for one in kinds_of_rope)
    kind = file.fact("{arch}.rope.scaling.type", "none")
    if plain and kind != "none":
        yield f"{file.architecture}.rope.scaling.type", kind, "rotary embeddings without scaling"
    for tensor in file.reader.tensors:
        if plain and tensor.name.startswith("rope_") and (tensor.data != 1).any():
            yield tensor.name, f"{tensor.data.min():g} to {tensor.data.max():g}", "rotary embeddings without scaling"


def _check_elements(file: GGUF, model: Any) -> None:
    """However a reader cuts and joins tensors, their numbers stay as many."""
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    unread = {
        name: shape
        for name, shape in file.shapes.items()
        if name.startswith("rope_") or (tied and name == "output.weight")
    }
    held = sum(t.numel() for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    found = file.elements - sum(torch.Size(shape).numel() for shape in unread.values())
    if found != held:
        raise UserError(
            f"{file.source.name} holds {found:,} numbers, of which the {type(model).__name__} that transformers "
            f"makes of it takes {held:,}: some tensors were not read; load the original folder of safetensors."
        )


def path_of(source: Source) -> Path:
    """Of the one file that a source is."""
    return source.folder / str(source.gguf or source.single)
