"""`load`: an embedded name, a folder, a hub id or one file of weights -> model and tokenizer.

Never remote code, never pickle. Every parameter is filled and every key used, or the error says which did not fit.
"""

from typing import Any

import torch
import transformers
from torch import nn

from skipwise.errors import UserError, require
from skipwise.loading.checks import (
    check_counts,
    check_keys,
    check_names,
    check_requantised,
    check_weights,
    only_variant,
    quiet,
    readable_errors,
)
from skipwise.loading.classes import NATIVE, build_skeleton, recipe
from skipwise.loading.devices import Device, Dtype, read_device, read_dtype
from skipwise.loading.gguf_file import GGUF, gguf_skeleton, load_gguf
from skipwise.loading.single_file import load_single_file, single_file_skeleton
from skipwise.loading.source import Source, find
from skipwise.loading.tokenizers import check_tokenizer, load_tokenizer
from skipwise.models.random import random_model
from skipwise.presets import names as preset_names
from skipwise.presets import read as read_preset
from skipwise.quantised import as_stored


def load(
    name: str,
    *,
    dtype: Dtype = None,
    device: Device = None,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    variant: str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) by embedded name, folder, hub id or file (.gguf, or the .safetensors of a diffusers
    transformer); tokenizer None where there is none.

    dtype: torch.bfloat16, "bfloat16", "bf16" and so on, by default or with "auto" the checkpoint's; device: such as
    "cuda"; device_map: instead of a device, accelerate's ("auto", or a dictionary of module -> device);
    quantization_config: of transformers or diffusers, to quantise the weights as they are read; variant: of the weight
    files, such as "fp16"; revision: of a hub repository; tokenizer: another one than that beside the weights, by the
    name of a model, a folder or a hub id, or loaded already: it must have the model's tokens.
    The model is in eval mode. Raises UserError with the next step for everything that can be wrong.
    """
    chosen, place = read_dtype(dtype), read_device(device)
    given = {"device_map": _device_map(device_map, place), "quantization_config": _quantisation(quantization_config)}
    given = {key: value for key, value in (given | {"variant": variant}).items() if value is not None}
    source = find(name, revision)
    with readable_errors(source):
        words = load_tokenizer(source, tokenizer)  # first: it takes no time, and what is wrong with it is told at once
        read = _load_file if source.gguf or source.single else _load_folder
        model = read(source, chosen, given)
        check_tokenizer(words, model.config, source.name)
        model = model.eval()
        return model if place is None else model.to(place), words


def load_skeleton(name: str, *, dtype: Dtype = None, revision: str | None = None) -> nn.Module:
    """The model without weights, on the meta device, from a preset or from the config.json of what `load` takes.

    dtype: what its parameters would be held in, by default float32; linear layers of a quantised checkpoint are priced
    as they are stored (see `skipwise.quantised`). Raises UserError as `load` does.
    """
    chosen = read_dtype(dtype)
    skeleton = _skeleton(name, revision)
    return skeleton if chosen is None else skeleton.to(chosen)


def load_random(name: str, *, dtype: Dtype = torch.float32, device: Device = None, seed: int = 0) -> Any:
    """A language model of this name's shape with random weights, drawn on `device` in `dtype`, in eval mode.

    name: a preset, or what `load` takes; no more than the config is needed. Raises UserError as `load` does.
    """
    chosen, place = read_dtype(dtype) or torch.float32, read_device(device)
    skeleton = load_skeleton(name)
    if not isinstance(skeleton, transformers.PreTrainedModel):
        raise UserError(f"{name} is a {type(skeleton).__name__}; random weights are for language models.")
    return random_model(type(skeleton), skeleton.config, dtype=chosen, device=place, seed=seed)


def _skeleton(name: str, revision: str | None) -> nn.Module:
    if name in preset_names():
        return build_skeleton(read_preset(name), name)
    source = find(name, revision, weights=False)
    with readable_errors(source):
        if source.gguf and GGUF.open(source).is_language_model:
            return gguf_skeleton(source)
        if source.gguf or source.single:
            return single_file_skeleton(source)
        skeleton, quantised = build_skeleton(source.config, name), source.config.get("quantization_config")
        return as_stored(skeleton, quantised) if quantised else skeleton


def _device_map(wanted: Any, place: torch.device | None) -> Any:
    if wanted is None:
        return None
    if place is not None:
        raise UserError(f"device={str(place)!r} and device_map={wanted!r} both place the weights; give one of them.")
    require("accelerate", "image")
    return wanted


def _quantisation(config: Any) -> Any:
    if config is None or isinstance(config, dict) or hasattr(config, "quant_method"):
        return config
    raise UserError(
        f"quantization_config={config!r} is none; give one of transformers or diffusers, such as "
        "BitsAndBytesConfig(load_in_4bit=True)."
    )


def _load_file(source: Source, dtype: torch.dtype | None, given: dict[str, Any]) -> Any:
    """A GGUF file, or a .safetensors file of a transformer alone."""
    language = source.gguf and GGUF.open(source).is_language_model
    useless = list(given) if language else [key for key in given if key == "variant" or source.gguf]
    if useless:
        raise UserError(f"{source.name} is one file, which is loaded without {', '.join(useless)}; leave that out.")
    return load_gguf(source, dtype) if language else load_single_file(source, dtype, given)


def _load_folder(source: Source, dtype: torch.dtype | None, given: dict[str, Any]) -> Any:
    """given: for from_pretrained of transformers or diffusers."""
    config = source.config
    model_class, settings = recipe(config, source.name)
    diffusers = "_class_name" in config
    if "config" in settings and "quantization_config" in config:  # of a native class
        settings["config"].quantization_config = config["quantization_config"]
    check_weights(source)
    check_counts(source, config)
    given = {"variant": only_variant(source)} | check_requantised(config, source.name, given)
    if given["variant"] is None:  # the files of a variant have another name
        check_names(source)
    settings |= {"torch_dtype": dtype} if diffusers else {"dtype": dtype or "auto", "trust_remote_code": False}
    if not diffusers:
        settings["ignore_mismatched_sizes"] = True  # so that they are reported with the others
    with quiet():
        model, report = model_class.from_pretrained(
            source.folder, use_safetensors=True, output_loading_info=True, **settings, **given
        )
    check_keys(source, report, strict=diffusers or config.get("model_type") in NATIVE, model=model)
    if not diffusers:
        model.name_or_path = source.name
    return model
