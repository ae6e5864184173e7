"""`load`: an embedded name, a folder, a hub id or a GGUF file -> model and tokenizer.

Never remote code, never pickle. Native modules load the official checkpoints strictly: every key is used and every
parameter filled, or the error says which did not fit.
"""

from typing import Any

import torch
import transformers
from torch import nn

from skipwise.errors import UserError, unknown
from skipwise.loading.checks import check_keys, check_names, check_weights, quiet, readable_errors
from skipwise.loading.classes import DTYPES, NATIVE, build_skeleton, recipe
from skipwise.loading.gguf_file import load_gguf
from skipwise.loading.source import Source, find
from skipwise.loading.tokenizers import check_tokenizer, load_tokenizer
from skipwise.models.random import random_model
from skipwise.presets import names as preset_names
from skipwise.presets import read as read_preset


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) by embedded name, folder, hub id or GGUF file; tokenizer None where there is none.

    dtype: "float32", "bfloat16" or "float16", by default the checkpoint's; device: such as "cuda"; revision: of a hub
    repository. tokenizer: another one than that beside the weights, by the name of a model, a folder or a hub id, or
    loaded already; it must have the model's tokens. The model is in eval mode. Raises UserError with the next step for
    everything that can be wrong.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    source = find(name, revision)
    with readable_errors(source):
        words = load_tokenizer(source, tokenizer)  # first: it takes no time, and what is wrong with it is told at once
        model = load_gguf(source, dtype) if source.gguf else _load_folder(source, dtype)
    check_tokenizer(words, model.config, source.name)
    model = model.eval()
    if device is not None:
        model = model.to(device)
    return model, words


def load_skeleton(name: str, *, dtype: str | None = None, revision: str | None = None) -> nn.Module:
    """The model without weights, on the meta device, from a preset or from the config.json of what `load` takes.

    dtype: what its parameters would be held in, by default float32. Raises UserError as `load` does.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    skeleton = _skeleton(name, revision)
    return skeleton if dtype is None else skeleton.to(DTYPES[dtype])


def load_random(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, seed: int = 0
) -> Any:
    """A language model of this name's shape with random weights, drawn on `device` in `dtype`, in eval mode.

    name: a preset, or what `load` takes; no more than the config is needed. Raises UserError as `load` does.
    """
    skeleton = load_skeleton(name)
    if not isinstance(skeleton, transformers.PreTrainedModel):
        raise UserError(f"{name} is a {type(skeleton).__name__}; random weights are for language models.")
    return random_model(type(skeleton), skeleton.config, dtype=dtype, device=device, seed=seed)


def _skeleton(name: str, revision: str | None) -> nn.Module:
    if name in preset_names():
        return build_skeleton(read_preset(name), name)
    source = find(name, revision, weights=False)
    if source.gguf:
        raise UserError(f"{name} is a GGUF file, whose config comes with its weights; load it instead.")
    with readable_errors(source):
        return build_skeleton(source.config, name)


def _load_folder(source: Source, dtype: str | None) -> Any:
    config = source.config
    model_class, settings = recipe(config, source.name)
    check_weights(source)
    check_names(source)
    if "_class_name" in config:
        chosen = {"torch_dtype": DTYPES[dtype]} if dtype else {}
        return model_class.from_pretrained(source.folder, use_safetensors=True, **chosen)
    with quiet():
        model, report = model_class.from_pretrained(
            source.folder,
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the others
            **settings,
        )
    check_keys(source, report, strict=config.get("model_type") in NATIVE)
    model.name_or_path = source.name
    return model
