"""Dream's decoding: all positions at once, tokens committed by time, by confidence, by margin or by entropy.

Source: Ye et al., "Dream 7B" (arXiv 2508.15487) and the official `diffusion_generate`. The default gives every row its
own even quotas and does not run a step that commits nothing; `compat="dream"` repeats the official schedule, whose
quota is the batch's mean rounded down, and its random numbers. The shift by one position is the model's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from skipwise.errors import UserError
from skipwise.sampling.canvas import Canvas, Settings, commit_top, transfer_quotas
from skipwise.sampling.denoiser import Denoiser
from skipwise.sampling.noise import Noise, gumbel_argmax

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True, kw_only=True)
class DreamSettings(Settings):
    """How Dream decodes; see `Settings` for what all families take.

    alg: which tokens are committed first. "origin": each with the probability that the noise schedule gives; the others
    by confidence: the token's probability ("maskgit_plus"), that minus the second best's ("topk_margin"), or the
    negative entropy ("entropy"). alg_temp: above 0, positions are drawn with confidence / alg_temp as logits.
    temperature, top_p, top_k: how tokens are drawn; temperature 0 takes the best one. eps: when noise ends.
    logits_hook(step, sequences, logits) -> logits and tokens_hook(step, sequences, logits) -> sequences are called at
    every step, the latter also with step None and logits None before the first.
    """

    alg: Algorithm = "origin"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    logits_hook: Callable[[int, Tensor, Tensor], Tensor] | None = None
    tokens_hook: Callable[[int | None, Tensor, Tensor | None], Tensor] | None = None

    family: ClassVar[str] = "dream"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("alg", ALGORITHMS)
        self.at_least_zero("temperature", "0 is greedy, 1 is the model's distribution")
        self.at_least_zero("alg_temp", "0 commits the most confident positions")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is no probability; choose above 0 to 1.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}; at least one token must be left.")
        if not 0 < self.eps < 1:
            raise UserError(f"eps={self.eps} is not a time; choose between 0 and 1, such as 0.001.")


@torch.no_grad()
def decode(
    denoiser: Denoiser, input_ids: Tensor, settings: DreamSettings, attention_mask: Tensor | None = None
) -> Tensor:
    """Fill `settings.gen_length` masks after every prompt, and those that the prompts hold.

    input_ids: (batch, prompt_length), padded on the left; attention_mask: the same shape, 0 on padding. Returns (batch,
    prompt_length + gen_length).
    """
    canvas = Canvas.open(input_ids, attention_mask, denoiser.mask_token, settings.gen_length)
    steps = settings.steps or canvas.most
    hooked = settings.tokens_hook is not None or settings.logits_hook is not None
    _apply_tokens_hook(canvas, settings, None, None)
    rule = (_Official if settings.compat else _Plain)(settings, canvas, steps)
    for i in range(steps):
        if not hooked and not rule.commits(i):
            continue
        logits = denoiser(canvas.step(i, steps), canvas.sequences, canvas.attention_mask)
        if settings.logits_hook is not None:
            logits = settings.logits_hook(i, canvas.sequences, logits)
        rule.commit(i, logits)
        _apply_tokens_hook(canvas, settings, i, logits)
        if canvas.finished(settings.eos_token_id):
            break
    return canvas.close(settings.eos_token_id)


def _apply_tokens_hook(canvas: Canvas, settings: DreamSettings, step: int | None, logits: Tensor | None) -> None:
    if settings.tokens_hook is not None:
        canvas.sequences = settings.tokens_hook(step, canvas.sequences, logits)


def filtered(logits: Tensor, settings: DreamSettings) -> Tensor:
    """Logits (..., vocabulary) at the temperature, with what top_p and then top_k leave out at the lowest value."""
    if settings.temperature > 0:
        logits = logits / settings.temperature
    lowest = torch.finfo(logits.dtype).min
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > settings.top_p
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)  # keep the first above
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), lowest)
    if settings.top_k is not None:
        weakest = logits.topk(min(settings.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, lowest)
    return logits


def confidence_of(probabilities: Tensor, chosen: Tensor, alg: Algorithm) -> Tensor:
    """How confident each chosen token (...,) of probabilities (..., vocabulary) is."""
    if alg == "topk_margin":
        best = probabilities.topk(2).values
        return best[..., 0] - best[..., 1]
    if alg == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    return probabilities.gather(-1, chosen[..., None])[..., 0]


class _Plain:
    """Our commits: per row, in float32, with noise that does not depend on a row's neighbours."""

    def __init__(self, settings: DreamSettings, canvas: Canvas, steps: int):
        self.settings, self.canvas, self.steps = settings, canvas, steps
        self.noise = Noise(settings.seed, canvas)
        self.quotas = transfer_quotas(canvas.masked.sum(1), steps)
        # under "origin" when each mask is lifted is known beforehand: uniform over the steps, whatever the tokens are
        self.lifted = (self._uniform(0) * steps).long()

    def _uniform(self, draw: int, *rest: int) -> Tensor:
        return self.noise.uniform([draw] * len(self.canvas.sequences), *rest)

    def commits(self, step: int) -> bool:
        """Whether any row commits anything at this step."""
        if self.settings.alg == "origin":
            return bool((self.canvas.masked & (self.lifted == step)).any())
        return bool(self.quotas[:, step].any())

    def commit(self, step: int, logits: Tensor) -> None:
        """Commit the tokens of a step; logits (batch, length, vocabulary)."""
        settings, canvas, masked = self.settings, self.canvas, self.canvas.masked
        mask = torch.tensor([canvas.mask], device=logits.device)
        logits = filtered(logits.float().index_fill(-1, mask, -torch.inf), settings)  # no mask is filled with a mask
        probabilities = logits.softmax(-1)
        if settings.temperature > 0:
            chosen = gumbel_argmax(probabilities.double(), self._uniform(3 * step + 1, logits.shape[2]))
        else:
            chosen = logits.argmax(-1)
        if settings.alg == "origin":
            now = masked & ((self.lifted <= step) | (step == self.steps - 1))
            canvas.sequences[now] = chosen[now]
            return
        confidence = confidence_of(probabilities, chosen, settings.alg).where(masked, -torch.inf)
        if settings.alg_temp > 0:  # the Gumbel trick draws positions without replacement
            uniform = self._uniform(3 * step + 2)
            confidence = confidence / settings.alg_temp - (-uniform.log()).log()
        quota = self.quotas[:, step].minimum(masked.sum(1)) if step < self.steps - 1 else masked.sum(1)
        commit_top(canvas.sequences, chosen, confidence, quota)


class _Official:
    """The official code's commits, quirks included: one quota for the whole batch, the mean of its masks."""

    def __init__(self, settings: DreamSettings, canvas: Canvas, steps: int):
        self.settings, self.canvas, self.steps = settings, canvas, steps
        self.times = torch.linspace(1, settings.eps, steps + 1)
        self.generator = torch.Generator(canvas.sequences.device).manual_seed(settings.seed)

    def commits(self, step: int) -> bool:
        """The official code runs every step."""
        return True

    def commit(self, step: int, logits: Tensor) -> None:
        """Commit the tokens of a step; logits (batch, length, vocabulary) in the model's own dtype."""
        settings, sequences = self.settings, self.canvas.sequences
        masked = sequences == self.canvas.mask
        last = step == self.steps - 1
        part = torch.tensor(1.0) if last else 1 - self.times[step + 1] / self.times[step]
        if settings.alg == "origin":
            found = torch.full_like(sequences[masked], self.canvas.mask)
            draws = torch.rand(found.shape, generator=self.generator, device=found.device)
            transfer = draws < part
            found[transfer] = self._sample(logits[masked][transfer])[1]
            sequences[masked] = found
            return
        confidence, found = self._sample(logits[masked])
        mean = masked.sum() / len(sequences)
        count = int(mean * part)
        if count > 0:
            ranked = torch.full_like(sequences, -torch.inf, dtype=logits.dtype)
            ranked[masked] = confidence
            candidates = sequences.clone()
            candidates[masked] = found
            positions = self._positions(ranked, count)
            sequences.scatter_(1, positions, candidates.gather(1, positions))

    def _positions(self, ranked: Tensor, count: int) -> Tensor:
        if self.settings.alg_temp == 0:
            return ranked.topk(count).indices
        weights = (ranked / self.settings.alg_temp).softmax(-1)
        return torch.multinomial(weights, count, generator=self.generator)

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(confidence, token) of logits (positions, vocabulary)."""
        probabilities = filtered(logits, self.settings).softmax(-1)
        if self.settings.temperature > 0:
            chosen = torch.multinomial(probabilities, 1, replacement=True, generator=self.generator)[:, 0]
        else:
            chosen = probabilities.argmax(-1)
        return confidence_of(probabilities, chosen, self.settings.alg), chosen
