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

# transformers' own table of what a class is for -> what the page calls it; a class is of the first that has it
MAPPINGS = {
    "IMAGE_TEXT_TO_TEXT": "transformers: vision-language models",
    "SEQ_TO_SEQ_CAUSAL_LM": "transformers: encoder-decoders",
    "CAUSAL_LM": "transformers: causal language models",
    "MASKED_LM": "transformers: masked language models",
    "TEXT_ENCODING": "transformers: text encoders",
}
OWN, IMAGES = "skipwise: masked diffusion language models", "diffusers: image, video and audio models"
NATIVE = {"LLaDAModelLM": "llada", "DreamModel": "dream", "MDLM": "mdlm"}
# a config of their own, which shrinking by names cannot find
BY_HAND = {"DiffusionGemmaForBlockDiffusion": "diffusion_gemma"}
LARGEST = 20_000_000  # parameters that a tiny model may have


class NotTinyError(Exception):
    """A class that could not be built small enough to be tried."""


def classes() -> dict[str, list[str]]:
    """Group -> names of its classes, sorted."""
    groups: dict[str, set[str]] = {}
    for mapping, group in MAPPINGS.items():
        known = set().union(*groups.values())
        groups[group] = set()
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            groups[group] |= ({names} if isinstance(names, str) else set(names)) - known
    text = {group: sorted(groups[group]) for group in sorted(groups)}
    return {OWN: sorted(NATIVE), **text, IMAGES: _transformers_of_diffusers()}


def _transformers_of_diffusers() -> list[str]:
    """What denoises in diffusers by transformer blocks; ControlNets go beside such a model."""
    found = []
    for name in dir(diffusers):
        value = getattr(diffusers, name) if name.endswith("Model") and "ControlNet" not in name else None
        if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and ".transformers." in value.__module__:
            found.append(name)
    return sorted(found)


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
