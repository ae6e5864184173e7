"""What is timed: a model, with its weights or with random ones, and prompts for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.benchmarking.memory import available_bytes
from skipwise.errors import UserError
from skipwise.evaluation import calibration_texts
from skipwise.loading import load, load_random, load_skeleton, read_device, read_dtype
from skipwise.models import kind_of
from skipwise.sizes import show_bytes

LONGEST = 128  # of prompt and of text, unless they are given


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, and its tokenizer where it has one that speaks of its weights."""

    name: str
    model: Any
    tokenizer: Any
    random: bool

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype


def prepare(
    name: str,
    *,
    random: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
) -> Subject:
    """The model of this name; `random`: of its shape, with random weights, which needs no more than a config.

    tokenizer: another one than the model's own, as `load` takes it; random weights are given random tokens.
    Raises UserError as `load` does, for an image model, and for random weights that would not fit in memory.
    """
    if random and tokenizer:
        raise UserError(f"Random weights are timed on random tokens; leave out --tokenizer {tokenizer}.")
    if not random:
        model, words = load(name, dtype=dtype, device=device, tokenizer=tokenizer)
    else:
        target = read_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = read_dtype(dtype) or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        check_fits(load_skeleton(name, dtype=chosen), name, target)
        model, words = load_random(name, dtype=chosen, device=target, seed=seed), None
    if kind_of(model) not in ("masked diffusion", "autoregressive"):
        raise UserError(f"{name} is a model of the kind {kind_of(model)!r}; bench times models that write text.")
    return Subject(name, model, words, random)


def check_fits(skeleton: nn.Module, name: str, device: torch.device) -> None:
    """Raise UserError, with the amounts, when the weights would not fit in what `device` has free."""
    needed = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    free = available_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"{name} needs {show_bytes(needed)} for its weights, and {device} has {show_bytes(free)} free; "
            "choose --dtype bfloat16, another --device or a smaller model."
        )


def lengths(model: nn.Module, prompt: int | None, gen: int | None) -> tuple[int, int]:
    """(prompt, new tokens): as given, or up to 128 each within what the model was made for.

    Raises UserError for more than the model's own length.
    """
    longest = _longest(model)
    half = min(LONGEST, longest // 2)
    prompt = prompt or (half if gen is None else max(1, min(LONGEST, longest - gen)))
    gen = gen or min(LONGEST, longest - prompt)
    if gen < 1 or prompt + gen > longest:
        raise UserError(
            f"A prompt of {prompt} and {gen} new tokens are more than the {longest} that {type(model).__name__} was "
            "made for; shorten --prompt-length or --gen-length."
        )
    return prompt, gen


def _longest(model: nn.Module) -> int:
    config: Any = model.config
    names = ("max_position_embeddings", "model_length", "n_positions")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 2 * LONGEST)


def prompts(subject: Subject, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) token ids: of texts that suit the tokenizer, else random ones without the special tokens."""
    words = subject.model.config.vocab_size
    if subject.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(words, (batch, length), generator=generator)
        special = torch.isin(ids, torch.tensor(_special(subject.model)))
        return ids.masked_fill(special, _plain(subject.model)).to(subject.device)
    texts = ["".join(text) for text in calibration_texts(subject.tokenizer, 256, seed)]
    ids_of = subject.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in ids_of for token in ids]
    repeated = stream * (1 + batch * length // len(stream))
    return torch.tensor(repeated[: batch * length], device=subject.device).view(batch, length)


def _special(model: nn.Module) -> list[int]:
    names = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
    found = [getattr(model.config, name, None) for name in names]
    return [token for entry in found for token in (entry if isinstance(entry, list) else [entry]) if token is not None]


def _plain(model: Any) -> int:
    return next(token for token in range(model.config.vocab_size) if token not in _special(model))
