"""LLaDA's decoding: block by block, the most confident tokens committed at every step.

Source: Nie et al. (arXiv 2502.09992), section 2.4 and the official `generate`. The default computes in float32 and
looks at the current block alone; `compat="llada"` repeats the official arithmetic (softmax in the model's own dtype,
top-k over the whole row), in which ties decide the order, token for token. A threshold commits in parallel instead of
by quota (Fast-dLLM, arXiv 2505.22618).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from skipwise.errors import UserError
from skipwise.models import end_of_text
from skipwise.sampling.cache import Kind, Windows, check_cache
from skipwise.sampling.canvas import Canvas, Settings, commit_above, commit_top, transfer_quotas
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.noise import Noise

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True, kw_only=True)
class LLaDASettings(Settings):
    """How LLaDA decodes; see `Settings` for what all families take.

    block_length: tokens decoded before the next block begins; all of them when left out. Masks in the prompt are filled
    with the first block. steps: in all, spread evenly over the blocks. temperature: 0 is greedy; above it, Gumbel noise
    in float64 multiplies in. threshold: instead of a quota a step, commit what the model is at least this confident of.
    cfg_scale: classifier-free guidance, z_u + (cfg_scale + 1) (z - z_u), where z_u are the logits with the prompt
    masked; a step then runs twice the rows. logits_eos_inf: never choose the end of text; confidence_eos_eot_inf:
    choose it last of all (under compat the official code's version, which at a temperature forgets the end of text).
    cache: "prefix", "dual" or "interval", an approximation that does not run all positions at every step, with refresh
    and prompt_refresh, in steps that are run (`skipwise.sampling.cache`); None is exact.
    """

    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    cache: Kind | None = None
    refresh: int | None = None
    prompt_refresh: int | None = None

    family: ClassVar[str] = "llada"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("remasking", ("low_confidence", "random"))
        self.at_least_zero("temperature", "0 is greedy, 1 is the model's distribution")
        self.at_least_zero("cfg_scale", "0 is without guidance")
        check_cache(self.cache, self.refresh, self.prompt_refresh, self.compat)
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} is no probability; choose above 0 to 1, such as 0.9.")
        if self.compat or self.steps:
            given = "compat" if self.compat else f"steps={self.steps}"
            raise UserError(f"With a threshold the number of steps follows from the text; leave out {given}.")

    def resolved(self, most_masks: int) -> tuple[int, int, int]:
        """(number of blocks, block length, steps a block). Raises UserError when they do not divide evenly."""
        if self.gen_length == 0:
            if self.block_length:
                raise UserError(
                    f"block_length={self.block_length} needs new tokens; infilling (gen_length=0) is one block."
                )
            return 1, 0, self.steps or most_masks
        block_length = self.block_length or self.gen_length
        if block_length < 1 or self.gen_length % block_length:
            raise UserError(f"gen_length={self.gen_length} is not a multiple of block_length={block_length}.")
        blocks = self.gen_length // block_length
        steps = self.steps or self.gen_length
        if steps % blocks:
            near = max(1, round(steps / blocks)) * blocks
            raise UserError(f"steps={steps} is not a multiple of the {blocks} blocks; try steps={near}.")
        return blocks, block_length, steps // blocks


@torch.no_grad()
def decode(
    denoiser: Denoiser, input_ids: Tensor, settings: LLaDASettings, attention_mask: Tensor | None = None
) -> Tensor:
    """Decode `settings.gen_length` tokens after every prompt, and the masks that the prompts hold.

    input_ids: (batch, prompt_length), padded on the left; attention_mask: (batch, prompt_length), 0 on padding.
    Returns (batch, prompt_length + gen_length). A step in which no row commits is not run, except under compat.
    """
    canvas = Canvas.open(input_ids, attention_mask, denoiser.mask_token, settings.gen_length)
    blocks, block_length, steps = settings.resolved(canvas.most)
    run = _Run(denoiser, canvas, settings)
    for block in range(blocks):
        # the masks of the prompt belong to the first block; the official code never fills them
        start = 0 if block == 0 and not settings.compat else canvas.prompt + block * block_length
        window = slice(start, canvas.prompt + (block + 1) * block_length)
        if settings.threshold is not None:
            run.until_filled(window)
        else:
            run.by_quota(window, block * steps, steps, blocks * steps)
        if run.finished:
            break
    return canvas.close(settings.eos_token_id)


def guided(logits: Tensor, unguided: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance as in LLaDA's `generate`: `unguided` are the logits with the prompt masked."""
    return unguided + (scale + 1) * (logits - unguided)


class _Run:
    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: LLaDASettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.given = canvas.sequences != canvas.mask  # what guidance masks
        self.total = canvas.most
        self.eos, self.eot = end_of_text(denoiser.model), getattr(denoiser.model.config, "eot_token_id", None)
        device = canvas.sequences.device
        self.noise: Noise | torch.Generator
        if settings.compat:
            self.noise = torch.Generator(device).manual_seed(settings.seed)
        else:
            self.noise = Noise(settings.seed, canvas)
        self.finished = False

    def by_quota(self, window: slice, first: int, steps: int, total: int) -> None:
        """Fill a block in a fixed number of steps."""
        quotas = transfer_quotas(self.canvas.masked[:, window].sum(1), steps)
        for i in range(steps):
            if self.settings.compat or bool(quotas[:, i].any()):
                self._commit(self.canvas.step(first + i, total), window, quotas[:, i])
            if self.finished:
                return

    def until_filled(self, window: slice) -> None:
        """Fill a block in as many steps as the threshold asks for."""
        while bool(self.canvas.masked[:, window].any()):
            left = self.canvas.most
            step = self.canvas.step(len(self.denoiser.forwards), self.total, 1 - left / self.total)
            self._commit(step, window, None)
            if self.finished:
                return

    def _commit(self, step: Step, window: slice, quota: Tensor | None) -> None:
        logits = self._logits(step)
        end = window.stop
        if self.settings.compat:  # the whole row, later blocks with -inf: ties are decided over it
            window = slice(0, self.canvas.sequences.shape[1])
        else:
            logits = logits[:, window].float()
            logits[..., self.canvas.mask] = -torch.inf  # or a position could be filled with a mask
        chosen, confidence = self._choose(logits, window)
        confidence[:, end - window.start :] = -torch.inf
        confidence = confidence.where(self.canvas.masked[:, window], -torch.inf)
        view = self.canvas.sequences[:, window]
        if quota is None:
            commit_above(view, chosen, confidence, self.settings.threshold or 1.0)
        else:
            commit_top(view, chosen, confidence, quota)
        self.finished = self.canvas.finished(self.settings.eos_token_id)

    def _logits(self, step: Step) -> Tensor:
        canvas, scale = self.canvas, self.settings.cfg_scale
        if scale == 0:
            return self.denoiser(step, canvas.sequences, canvas.attention_mask)
        without = canvas.sequences.masked_fill(self.given, canvas.mask)
        mask = None if canvas.attention_mask is None else canvas.attention_mask.repeat(2, 1)
        logits, unguided = self.denoiser(step, torch.cat([canvas.sequences, without]), mask).chunk(2)
        return guided(logits, unguided, scale)

    def _choose(self, logits: Tensor, window: slice) -> tuple[Tensor, Tensor]:
        """The chosen token of every position of `logits` (batch, window, vocabulary), and how confident it is."""
        settings, temperature = self.settings, self.settings.temperature
        if settings.logits_eos_inf and self.eos is not None:
            logits[..., self.eos] = -torch.inf
        noisy = logits
        if temperature > 0:  # Gumbel-max: argmax exp(z) / (-log U)^temperature, U uniform in float64
            uniform = self._uniform(0, window, logits.shape, torch.float64)
            noisy = logits.double().exp() / (-uniform.log()) ** temperature
        chosen = noisy.argmax(-1)
        if settings.confidence_eos_eot_inf:
            for token in self._held_back():
                logits[..., token] = -torch.inf
        if settings.remasking == "random":
            return chosen, self._uniform(1, window, chosen.shape, torch.float32)
        return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]

    def _held_back(self) -> list[int]:
        """Tokens whose confidence is 0. The official code forgets the end of text when there is noise."""
        forgotten = self.settings.compat is not None and self.settings.temperature > 0
        return [token for token in (None if forgotten else self.eos, self.eot) if token is not None]

    def _uniform(self, which: int, window: slice, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if isinstance(self.noise, torch.Generator):
            return torch.rand(shape, dtype=dtype, generator=self.noise, device=self.noise.device)
        # a row's masks left number its draws: equal for the same row in any batch
        draws = [2 * left + which for left in self.canvas.left]
        return self.noise.uniform(draws, *shape[2:], window=window, dtype=dtype)
