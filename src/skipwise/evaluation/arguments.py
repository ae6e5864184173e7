"""What lm-eval's model arguments mean: the model and its tokenizer, a peft adapter, the size of a batch, its length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models import utils as lm_eval_models
from torch import nn

from skipwise.blocks import find_contract
from skipwise.errors import UserError, require
from skipwise.loading import check_tokenizer, load, load_tokenizer
from skipwise.plan import Plan

LARGEST_BATCH = 64  # that `auto` tries where max_batch_size does not say; lm-eval's own default
CPU_BATCH = 8  # of `auto` on a CPU, where memory does not end and larger batches gain little
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_model(pretrained: Any, tokenizer: Any, dtype: str | None, device: str | None, revision: str | None) -> Any:
    """(model, tokenizer) on the device: the one asked for, or a GPU where there is one, or a loaded model's own."""
    if isinstance(pretrained, str):
        chosen = None if dtype == "auto" else dtype
        model, words = load(pretrained, dtype=chosen, device=_device(device), revision=revision, tokenizer=tokenizer)
    else:
        model, words = pretrained.to(device) if device else pretrained, load_tokenizer(None, tokenizer)
        check_tokenizer(words, model.config, type(model).__name__)
    if words is None:
        raise UserError(f"{pretrained} came without a tokenizer; name one with tokenizer=NAME.")
    return model, words


def _device(wanted: str | None) -> str:
    """The device asked for, or a GPU if there is one; lm-eval's command asks for cuda:0 when nobody chose."""
    if torch.cuda.is_available():
        return wanted or "cuda"
    return "cpu" if not wanted or wanted.startswith("cuda") else wanted


def check_peft(plan: Plan | None, folder: str | None) -> None:
    """Raise UserError when there is no such folder, and when the plan has an adapter already."""
    if folder is None:
        return
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"peft={folder} is no folder; give the one that peft's save_pretrained wrote.")
    if plan is not None and plan.adapter is not None:
        raise UserError(f"peft={folder}: the plan carries an adapter already; leave out either of them.")


def with_peft(plan: Plan | None, model: nn.Module, folder: str) -> Plan:
    """The plan, or one that runs all blocks, with the adapter that peft's `save_pretrained` wrote into a folder.

    It is merged into the weights for as long as the plan is in force. Raises UserError for a folder without an adapter.
    """
    path = Path(folder).expanduser()
    lacking = [name for name in PEFT_FILES if not (path / name).is_file()]
    if lacking:
        raise UserError(f"peft={folder} has no {lacking[0]}; give the folder that peft's save_pretrained wrote.")
    return (plan or Plan.static(find_contract(model).shape, {})).with_adapter(path)


def read_batch_size(given: int | str) -> int | None:
    """A number of rows, or None for "auto". Raises UserError for what is neither."""
    if str(given).partition(":")[0] == "auto":
        return None
    if not str(given).isdigit() or int(given) < 1:
        raise UserError(f"batch_size={given!r} is no number from 1 on; give one, or auto.")
    return int(given)


def largest_batch(model: nn.Module, length: int, largest: int | None = None) -> int:
    """On a GPU the largest power of two of rows, up to `largest`, whose forward of `length` tokens has memory."""
    largest = largest or LARGEST_BATCH
    device = next(model.parameters()).device
    if device.type == "cpu":
        return min(CPU_BATCH, largest)

    @torch.no_grad()
    def forward(rows: int) -> None:
        model(input_ids=torch.zeros(rows, length, dtype=torch.long, device=device))

    return first_that_fits(forward, 2 ** (largest.bit_length() - 1))


def first_that_fits(forward: Callable[[int], None], largest: int) -> int:
    """The first of `largest`, half of it, a quarter, ... rows that a forward has memory for."""
    accelerate = require("accelerate.utils", "eval")
    smaller = (largest >> power for power in range(1, largest.bit_length() + 1))

    @accelerate.find_executable_batch_size(starting_batch_size=largest, reduce_batch_size_fn=smaller.__next__)
    def search(rows: int) -> int:
        forward(rows)
        return rows

    try:
        return search()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise UserError("batch_size=auto: there is no memory for a single row; give a shorter max_length.") from error


def longest(config: Any, tokenizer: Any) -> int:
    """Tokens that the model was made for."""
    return getattr(config, "model_length", None) or lm_eval_models.resolve_max_length(config, tokenizer)
