"""Which classes the survey covers, and how each is built tiny."""

import inspect
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.survey import shrinking, shrinking_diffusers
from tests.tiny_models import LANGUAGE

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_ENCODING")
NATIVE = {"LLaDAModelLM": "llada", "DreamModel": "dream", "MDLM": "mdlm"}
# a config of their own, which shrinking by names cannot find
BY_HAND = {"DiffusionGemmaForBlockDiffusion": "diffusion_gemma"}
LARGEST = 20_000_000  # parameters that a tiny model may have


class NotTinyError(Exception):
    """A class that could not be built small enough to be tried."""


def classes() -> dict[str, list[str]]:
    """Library -> names of classes, sorted."""
    text: set[str] = set()
    for mapping in MAPPINGS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            text |= {names} if isinstance(names, str) else set(names)
    return {"skipwise": sorted(NATIVE), "transformers": sorted(text), "diffusers": _transformers_of_diffusers()}


def _transformers_of_diffusers() -> list[str]:
    """What denoises in diffusers by transformer blocks; ControlNets go beside such a model."""
    found = []
    for name in dir(diffusers):
        value = getattr(diffusers, name) if name.endswith("Model") and "ControlNet" not in name else None
        if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and ".transformers." in value.__module__:
            found.append(name)
    return sorted(found)


def library_of(name: str) -> str:
    """The library of a class."""
    return next(library for library, names in classes().items() if name in names)


def build(name: str) -> nn.Module:
    """A tiny model of this class with random weights. Raises NotTinyError, with the reason."""
    torch.manual_seed(0)
    if name in NATIVE | BY_HAND:
        return LANGUAGE[(NATIVE | BY_HAND)[name]]()
    try:
        if hasattr(transformers, name):
            return _tiny_of_transformers(getattr(transformers, name))
        return shrinking_diffusers.tiny_model(getattr(diffusers, name))
    except NotTinyError:
        raise
    except Exception as error:
        raise NotTinyError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error


def _tiny_of_transformers(model_class: Any) -> nn.Module:
    config = shrinking.tiny_config(model_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise NotTinyError(f"{size:,} parameters with the widths that its config names")
    return shrinking.shake(model_class(config))
