"""Native modules for models whose official code is remote code. Each loads the official weights strictly, by key.

Importing this package also makes them known to transformers' auto classes (`skipwise.models.native`).
"""

from typing import Literal

from torch import nn
from transformers.generation import GenerationMixin

from skipwise.errors import UserError
from skipwise.models.dream import DreamModel as Dream
from skipwise.models.llada import LLaDA
from skipwise.models.mdlm import MDLM
from skipwise.models.native import MaskedDiffusion, fact
from skipwise.wrapping import unwrap

__all__ = [
    "MDLM",
    "Dream",
    "Kind",
    "LLaDA",
    "MaskedDiffusion",
    "end_of_text",
    "fact",
    "head_of",
    "kind_of",
    "mask_token",
]

Kind = Literal["masked diffusion", "block diffusion", "autoregressive", "encoder", "image or video diffusion"]


def kind_of(model: nn.Module) -> Kind:
    """What a model is, as far as analyses and samplers need to know: by what it can do, not by its name."""
    model = unwrap(model)
    if getattr(model, "is_masked_diffusion", False):
        return "masked diffusion"
    if hasattr(model, "config_name"):  # a diffusers model, without importing diffusers
        return "image or video diffusion"
    if isinstance(model, GenerationMixin):
        return "autoregressive"
    if hasattr(model.config, "canvas_length"):  # DiffusionGemma writes a canvas of random tokens over and over
        return "block diffusion"
    return "encoder"


def head_of(model: nn.Module) -> nn.Module | None:
    """What makes logits of a model's states, where the model gives both (`states`, `head`), as our own models do."""
    return model.head if hasattr(model, "states") else None  # type: ignore[return-value]


def end_of_text(model: nn.Module) -> int | None:
    """The id of the token that ends a text, the first where the config has several; None when it has none."""
    token = getattr(model.config, "eos_token_id", None)
    return token[0] if isinstance(token, list) else token


def mask_token(model: nn.Module) -> int:
    """The id of the model's mask token. Raises UserError when its config has none."""
    token = getattr(model.config, "mask_token_id", None)
    if token is None:
        raise UserError(f"{type(model).__name__} has no mask_token_id in its config; set model.config.mask_token_id.")
    return int(token)
