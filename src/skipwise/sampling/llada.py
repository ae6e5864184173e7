"""LLaDA's decoding: block by block, a fixed quota of tokens committed at every step.

Source: Nie et al. (arXiv 2502.09992), section 2.4 and the official `generate`. Two modes: the default computes in
float32 and looks at the current block alone; `compat="llada"` repeats the official arithmetic (softmax in the model's
own dtype, top-k over the whole row), in which ties decide the order, token for token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from skipwise.errors import UserError

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class Step:
    """One denoising step, announced before its forward. `sequences` is (batch, length), shared, not a copy."""

    index: int
    total: int
    sequences: Tensor

    @property
    def progress(self) -> float:
        """Progress through the trajectory at which this step starts, 0 = all noise, 1 = done."""
        return self.index / self.total


@dataclass(frozen=True)
class LLaDASettings:
    """How to decode. `steps` denoising steps in all, spread evenly over gen_length / block_length blocks.

    temperature 0 is greedy; above it, Gumbel noise in float64 multiplies in. `seed` makes the noise repeatable.
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    compat: Literal["llada"] | None = None
    seed: int = 0

    def resolved(self) -> tuple[int, int, int]:
        """(number of blocks, block length, steps a block). Raises UserError when they do not divide evenly."""
        block_length = self.block_length or self.gen_length
        steps = self.steps or self.gen_length
        if self.gen_length < 1 or self.gen_length % block_length:
            raise UserError(f"gen_length={self.gen_length} is not a multiple of block_length={block_length}.")
        blocks = self.gen_length // block_length
        if steps % blocks:
            raise UserError(
                f"steps={steps} is not a multiple of the {blocks} blocks; try steps={blocks * block_length}."
            )
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is negative; 0 is greedy, 1 is the model's distribution.")
        if self.remasking not in ("low_confidence", "random"):
            raise UserError(f"remasking={self.remasking!r} is unknown; use 'low_confidence' or 'random'.")
        if self.compat not in (None, "llada"):
            raise UserError(f"compat={self.compat!r} is unknown; use 'llada' or leave it out.")
        return blocks, block_length, steps // blocks


def mask_token(model: nn.Module) -> int:
    """The id of the model's mask token. Raises UserError when its config has none."""
    token = getattr(model.config, "mask_token_id", None)
    if token is None:
        raise UserError(f"{type(model).__name__} has no mask_token_id in its config; set model.config.mask_token_id.")
    return int(token)


def transfer_quotas(masked: Tensor, steps: int) -> Tensor:
    """How many tokens each row commits at each step: (batch,) masked counts -> (batch, steps); remainder goes first."""
    base, extra = masked // steps, masked % steps
    return base[:, None] + (torch.arange(steps, device=masked.device) < extra[:, None])


@torch.no_grad()
def decode(
    model: nn.Module,
    input_ids: Tensor,
    mask_token_id: int,
    settings: LLaDASettings,
    attention_mask: Tensor | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Decode `settings.gen_length` tokens after every prompt.

    input_ids: (batch, prompt_length), padded on the left; attention_mask: (batch, prompt_length), 0 on padding.
    Returns (batch, prompt_length + gen_length). `on_step` is called before each forward.
    """
    blocks, block_length, steps = settings.resolved()
    batch, prompt_length = input_ids.shape
    generator = torch.Generator(input_ids.device).manual_seed(settings.seed)
    tail = input_ids.new_full((batch, settings.gen_length), mask_token_id)
    sequences = torch.cat([input_ids, tail], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones_like(tail)], dim=1)
    for block in range(blocks):
        start = prompt_length + block * block_length
        end = start + block_length
        quotas = transfer_quotas((sequences[:, start:end] == mask_token_id).sum(1), steps)
        for i in range(steps):
            if on_step is not None:
                on_step(Step(block * steps + i, blocks * steps, sequences))
            logits = model(input_ids=sequences, attention_mask=attention_mask).logits
            window = slice(0, sequences.shape[1]) if settings.compat else slice(start, end)
            commit(
                sequences[:, window],
                logits[:, window],
                end - window.start,
                quotas[:, i],
                mask_token_id,
                settings,
                generator,
            )
    return sequences


def commit(
    sequences: Tensor,
    logits: Tensor,
    end: int,
    quota: Tensor,
    mask_token_id: int,
    settings: LLaDASettings,
    generator: torch.Generator,
) -> None:
    """Fill, in place, the `quota` (batch,) most confident masked positions before `end`; sequences (batch, length)."""
    masked = sequences == mask_token_id
    if not settings.compat:
        logits = logits.float()
    chosen = _choose(logits, settings.temperature, generator)
    confidence = _confidence(logits, chosen, settings, generator)
    confidence[:, end:] = -torch.inf
    confidence = confidence.where(masked, -torch.inf)
    for row, count in enumerate(quota.tolist()):
        # one top-k a row: its tie-breaking depends on k, and the official code decides ties this way
        positions = confidence[row].topk(count).indices
        sequences[row, positions] = chosen[row, positions]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Gumbel-max sample of every position: argmax exp(z) / (-log U)^temperature, U uniform in float64."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    return (logits.double().exp() / (-uniform.log()) ** temperature).argmax(-1)


def _confidence(logits: Tensor, chosen: Tensor, settings: LLaDASettings, generator: torch.Generator) -> Tensor:
    """(batch, length): probability of the chosen tokens, or uniform noise for random remasking."""
    if settings.remasking == "random":
        return torch.rand(chosen.shape, device=logits.device, generator=generator)
    return logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
