"""The lighter models that a plan hands denoising steps to: loaded by name, and held beside the plan's own model."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from skipwise.errors import UserError
from skipwise.loading import DTYPES, load
from skipwise.models import kind_of, mask_token
from skipwise.plan import Plan

_loaded: WeakKeyDictionary[nn.Module, dict[str, tuple[nn.Module, Any]]] = WeakKeyDictionary()


def load_others(
    plan: Plan | None, model: nn.Module, tokenizer: Any = None, given: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The models that the plan's phases name, by name; those not `given` are loaded, once, as `model` is held.

    tokenizer: the model's, with which those of loaded models are compared.
    Raises UserError for a name that nothing is known by, and for a model that cannot take over.
    """
    names = dict.fromkeys(phase.model for phase in plan.phases if phase.model) if plan else ()
    return {name: load_other(name, model, tokenizer, given) for name in names}


def load_other(
    name: str, model: nn.Module, tokenizer: Any = None, given: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """The model of this name: the `given` one, or loaded, once, as `model` is held. Raises as `load_others` does."""
    other, its_tokenizer = (given[name], None) if given and name in given else _load(name, model)
    if kind_of(model) == "image or video diffusion":
        check_latents(model, other, name)
    else:
        check_tokens(model, other, name, tokenizer, its_tokenizer)
    return other


def check_latents(model: nn.Module, other: nn.Module, name: str) -> None:
    """Raise UserError unless an image model `other` takes and gives what `model` does."""
    for what in ("in_channels", "out_channels"):
        mine, theirs = getattr(model.config, what, None), getattr(other.config, what, None)
        if kind_of(other) != kind_of(model) or mine != theirs:
            raise UserError(f"{name} is a {type(other).__name__} with {what}={theirs}; the plan's model has {mine}.")


def check_tokens(model: nn.Module, other: nn.Module, name: str, tokenizer: Any = None, of_other: Any = None) -> None:
    """Raise UserError unless `other`, called `name`, can take over denoising steps from `model`."""
    if kind_of(other) != "masked diffusion":
        raise UserError(f"{name} is a {type(other).__name__}, which cannot denoise; name a masked diffusion model.")
    for what, mine, theirs in (
        ("a vocabulary of", model.config.vocab_size, other.config.vocab_size),  # type: ignore[union-attr]
        ("the mask token", mask_token(model), mask_token(other)),
    ):
        if mine != theirs:
            raise UserError(f"{name} has {what} {theirs}, the plan's model {mine}; name a model with the same tokens.")
    if tokenizer is not None and of_other is not None and tokenizer.get_vocab() != of_other.get_vocab():
        raise UserError(f"{name} has another tokenizer than the plan's model; both must read text as the same tokens.")


def _load(name: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """Loaded once for as long as `model` lives."""
    known = _loaded.setdefault(model, {})
    if name not in known:
        first = next(model.parameters())
        dtype = next((key for key, value in DTYPES.items() if value == first.dtype), None)
        known[name] = load(name, dtype=dtype, device=str(first.device))
    return known[name]
