"""Models of a given shape with random weights: for timing, for memory, for tests, where no checkpoint is at hand."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

SPREAD = 0.02  # of matrices that a class leaves to torch's initialisation, or at zero


def random_model(
    model_class: type[PreTrainedModel],
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Any:
    """A transformers model, in eval mode, with the random weights of its class's own initialisation.

    Weights are drawn where and as they are held, so that no second copy exists at any moment; an 8B model takes
    seconds on a GPU. Matrices that training begins at zero are drawn too: a head of zeros would predict nothing.
    """
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    return fill_randomly(model, device, seed)


@torch.no_grad()
def fill_randomly(model: Any, device: torch.device | str | None = None, seed: int = 0) -> Any:
    """The weights that a model on the meta device lacks, on `device` (the CPU when left out). Returns the model."""
    target = torch.device(device or "cpu")
    model = model.to_empty(device=target)
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        _unmark(model)
        model.initialize_weights()
        model.tie_weights()
        for name, parameter in model.named_parameters():
            _fill_rest(name, parameter)
    return model.eval()


def _fill_rest(name: str, parameter: nn.Parameter) -> None:
    """What the class's own initialisation left: a matrix not written or zero, a norm's scale or a bias not written."""
    first = parameter.flatten()[:1]
    if parameter.ndim > 1 and (first.isnan().any() or not parameter.any()):
        parameter.normal_(std=SPREAD)
    elif first.isnan().any():
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _unmark(model: nn.Module) -> None:
    """Make transformers forget that it initialised these modules, which it did on the meta device."""
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
