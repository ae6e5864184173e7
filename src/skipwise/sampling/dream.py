"""Dream's decoding: all positions at once, tokens committed by time, by confidence, by margin or by entropy.

Source: Ye et al., "Dream 7B" (arXiv 2508.15487) and the official `diffusion_generate`. The default gives every row its
own even quotas and does not run a step that commits nothing; `compat="dream"` repeats the official schedule, whose
quota is the batch's mean rounded down, and its random numbers. The shift by one position is the model's business; a
mask right behind left padding is predicted from its own state, where the official code reads the padding's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from skipwise.errors import UserError
from skipwise.models import end_of_text
from skipwise.sampling.canvas import Canvas, Part, Settings, commit_top, on_device, places, quota_of
from skipwise.sampling.denoiser import Denoiser
from skipwise.sampling.llada import held_back
from skipwise.sampling.noise import Noise, gumbel_argmax
from skipwise.sampling.prediction import Prediction, Reader, largest, probabilities_of

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True, kw_only=True)
class DreamSettings(Settings):
    """How Dream decodes; see `Settings` for what all families take.

    alg: which tokens are committed first. "origin": each with the probability that the noise schedule gives; the others
    by confidence: the token's probability ("maskgit_plus"), that minus the second best's ("topk_margin"), or the
    negative entropy ("entropy"). alg_temp: above 0, positions are drawn with confidence / alg_temp as logits.
    temperature, top_p, top_k: how tokens are drawn; temperature 0 takes the best one. eps: when noise ends.
    eos_penalty: Dream-Coder's padding penalty (arXiv 2509.01142): eos_penalty x log(1 - t + eps) is added to the logit
    of the token that pads, which also ends a text, so that it comes late; t falls from 1 to eps over the steps.
    Dream-Coder's own samples have 3. confidence_eos_eot_inf: a position whose token ends a text or a turn is committed
    after all others, as LLaDA's setting of this name has it.
    logits_hook(step, sequences, logits) -> logits and tokens_hook(step, sequences, logits) -> sequences are called at
    every step, the latter also with step None and logits None before the first.
    """

    alg: Algorithm = "origin"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    eos_penalty: float = 0.0
    confidence_eos_eot_inf: bool = False
    logits_hook: Callable[[int, Tensor, Tensor], Tensor] | None = None
    tokens_hook: Callable[[int | None, Tensor, Tensor | None], Tensor] | None = None

    family: ClassVar[str] = "dream"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_zero("temperature", "0 is greedy, 1 is the model's distribution")
        self.at_least_zero("alg_temp", "0 commits the most confident positions")
        self.at_least_zero("eos_penalty", "0 is without a penalty, 3 is Dream-Coder's")
        if self.confidence_eos_eot_inf and (self.alg == "origin" or self.compat):
            given = f"compat={self.compat!r}" if self.compat else f"alg={self.alg!r}"
            raise UserError(
                f"confidence_eos_eot_inf orders commits by confidence, which {given} does not; leave it out."
            )
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
    _apply_tokens_hook(canvas, settings, None, None)
    rule = (_Official if settings.compat else _Plain)(settings, canvas, steps, denoiser)
    hooked = settings.tokens_hook is not None or settings.logits_hook is not None
    for i in range(steps):
        if hooked:
            _hooked(i, rule, denoiser)
        else:
            rule.step(i, denoiser)
        if rule.finished:
            break
    return canvas.close(settings.eos_token_id)


def _hooked(i: int, rule: "_Plain | _Official", denoiser: Denoiser) -> None:
    """A step with the logits of all positions: hooks may look at and change anything."""
    canvas, settings = rule.canvas, rule.settings
    logits = denoiser(canvas.step(i, rule.steps), canvas.sequences, canvas.attention_mask)
    if settings.logits_hook is not None:
        logits = settings.logits_hook(i, canvas.sequences, logits)
    rule.commit(i, logits)
    _apply_tokens_hook(canvas, settings, i, logits)
    rule.look(together=True)


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


class _Penalty:
    """Dream-Coder's padding penalty, as its `diffusion_generate` adds it."""

    def __init__(self, settings: DreamSettings, steps: int, denoiser: Denoiser):
        config: Any = denoiser.model.config
        pad = getattr(config, "pad_token_id", None)
        self.token = end_of_text(denoiser.model) if pad is None else pad
        if settings.eos_penalty and self.token is None:
            raise UserError(
                f"eos_penalty={settings.eos_penalty} needs a token that pads or ends a text; set config.pad_token_id."
            )
        times = torch.linspace(1, settings.eps, steps + 1)
        self.terms = settings.eos_penalty * torch.log(1 - times + settings.eps) if settings.eos_penalty else None

    def add(self, logits: Tensor, step: int) -> None:
        """Add the term of this step, in place, to logits (positions, vocabulary)."""
        if self.terms is not None:
            logits[:, self.token] += self.terms[step].to(logits.device)


class _Plain:
    """Our commits: per row, in float32, with noise that does not depend on a row's neighbours."""

    def __init__(self, settings: DreamSettings, canvas: Canvas, steps: int, denoiser: Denoiser):
        self.settings, self.canvas, self.steps, self.denoiser = settings, canvas, steps, denoiser
        self.penalty = _Penalty(settings, steps, denoiser)
        self.last = held_back(denoiser) if settings.confidence_eos_eot_inf else []
        self.noise = Noise(settings.seed, canvas)
        self.masks = canvas.left
        self.left = list(self.masks)
        self.rows = list(range(len(self.masks)))  # those that have not ended
        if settings.alg == "origin":  # when each mask is lifted is uniform over the steps, whatever the tokens are
            self.lifted = (self.noise.uniform([0] * len(self.rows)) * steps).long().clamp_max(steps - 1)
            lifted, masked = self.lifted.cpu(), canvas.masked.cpu()
            self.counts = [torch.bincount(lifted[n][masked[n]], minlength=steps).tolist() for n in self.rows]

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return not self.rows

    def look(self, together: bool = False) -> None:
        """Let go of the rows that have ended; together: only when the last has."""
        self.rows = self.canvas.going(self.rows, self.settings.eos_token_id, together)

    def step(self, i: int, denoiser: Denoiser) -> None:
        """Run the rows that commit at this step, and commit; how many tokens, no device is asked."""
        quota = {row: self._quota(row, i) for row in self.rows}
        if not any(quota.values()):
            return
        part = self.canvas.part(row for row in self.rows if quota[row] or denoiser.fixed_rows)
        counts = [quota[row] for row in part.rows]
        origin = self.settings.alg == "origin"
        now = part.masked & (part.of(self.lifted) == i) if origin else part.masked
        where = places(now, sum(counts if origin else (self.left[row] for row in part.rows)))
        step = self.canvas.step(i, self.steps)
        prediction = denoiser.predict(step, part.sequences, part.attention_mask, where)
        self._commit(i, part, prediction, where, counts)
        for row in part.rows:
            self.left[row] -= quota[row]
        if self.canvas.looks_for_ends(i):
            self.look(denoiser.fixed_rows)

    def commit(self, i: int, logits: Tensor) -> None:
        """Commit the tokens of a step; a hook may have changed the masks. logits: (batch, length, vocabulary)."""
        part = self.canvas.part(self.rows)
        masked = part.masked
        self.left = masked.sum(1).tolist()
        if self.settings.alg == "origin":
            masked = masked & ((self.lifted <= i) | (i == self.steps - 1))
        where = places(masked, int(masked.sum()))
        if not len(where[0]):
            return
        quota = [self._quota(row, i) for row in part.rows]
        self._commit(i, part, Prediction(logits[where], lambda logits: logits, logits.shape[-1]), where, quota)

    def _quota(self, row: int, i: int) -> int:
        if self.settings.alg == "origin":
            return self.counts[row][i]
        return self.left[row] if i == self.steps - 1 else min(quota_of(self.masks[row], self.steps, i), self.left[row])

    def _commit(
        self, i: int, part: Part, prediction: Prediction, where: tuple[Tensor, Tensor], quota: Sequence[int]
    ) -> None:
        """Commit what is predicted at `where`, rows and positions (n,) of the part."""
        found = prediction.read(self._reader(i, part, where, prediction.vocabulary))
        if len(found) > 1:  # how confident, which is NaN where any logit is
            self.denoiser.watch.add(found[1])
        if self.settings.alg == "origin":
            part.sequences[where] = found[0]
        else:
            chosen = part.sequences.index_put(where, found[0])
            confidence = torch.full_like(chosen, -torch.inf, dtype=torch.float32).index_put(where, found[1])
            if self.settings.alg_temp > 0:  # the Gumbel trick draws positions without replacement
                uniform = self.noise.uniform([3 * i + 2] * len(part.rows), rows=part.rows)
                confidence = confidence / self.settings.alg_temp - (-uniform.log()).log()
            if self.last:  # still above -inf, which is where there is nothing to commit
                last = torch.isin(chosen, on_device(self.last, chosen.device)) & (confidence > -torch.inf)
                confidence = confidence.masked_fill(last, torch.finfo(confidence.dtype).min)
            commit_top(part.sequences, chosen, confidence, quota)
        self.canvas.put(part)

    def _reader(self, i: int, part: Part, where: tuple[Tensor, Tensor], words: int) -> Reader:
        """Reads the chosen token off logits and, unless time decides, how confident it is."""
        settings = self.settings
        hot, timed = settings.temperature > 0, settings.alg == "origin"
        feed = self.noise.feed([3 * i + 1] * len(part.rows), words, where, part.rows) if hot else None

        def read(logits: Tensor, some: slice) -> tuple[Tensor, ...]:
            logits = logits.float()
            logits[:, part.mask] = -torch.inf  # no mask is filled with a mask
            self.penalty.add(logits, i)
            if timed:
                self.denoiser.watch.add(logits)
            logits = filtered(logits, settings)
            if feed is None and timed:
                return (largest(logits),)
            greedy = largest(logits) if feed is None else logits.new_empty(0)
            probabilities = probabilities_of(logits)
            chosen = gumbel_argmax(probabilities.double(), feed.take(len(logits))) if feed else greedy
            return (chosen,) if timed else (chosen, confidence_of(probabilities, chosen, settings.alg))

        return read


class _Official:
    """The official code's commits, quirks included: one quota for the whole batch, the mean of its masks."""

    def __init__(self, settings: DreamSettings, canvas: Canvas, steps: int, denoiser: Denoiser):
        self.settings, self.canvas, self.steps = settings, canvas, steps
        self.penalty = _Penalty(settings, steps, denoiser)
        self.times = torch.linspace(1, settings.eps, steps + 1)
        self.generator = torch.Generator(canvas.sequences.device).manual_seed(settings.seed)

    finished = False  # it goes on after the end of text

    def look(self, together: bool = False) -> None:
        """It lets go of no row."""

    def step(self, i: int, denoiser: Denoiser) -> None:
        """Run everything, look at the logits of masked positions, and commit."""
        masked = self.canvas.sequences == self.canvas.mask
        rows, positions = masked.nonzero(as_tuple=True)
        if len(rows):  # the official code runs on over filled sequences, which changes nothing
            step = self.canvas.step(i, self.steps)
            self._commit(
                i, denoiser(step, self.canvas.sequences, self.canvas.attention_mask, (rows, positions)), masked
            )

    def commit(self, i: int, logits: Tensor) -> None:
        """Commit the tokens of a step; logits (batch, length, vocabulary) in the model's own dtype."""
        masked = self.canvas.sequences == self.canvas.mask
        self._commit(i, logits[masked], masked)

    def _commit(self, step: int, logits: Tensor, masked: Tensor) -> None:
        """logits: (n, vocabulary) of what is masked (batch, length)."""
        settings, sequences = self.settings, self.canvas.sequences
        last = step == self.steps - 1
        self.penalty.add(logits, step)
        part = torch.tensor(1.0) if last else 1 - self.times[step + 1] / self.times[step]
        if settings.alg == "origin":
            found = torch.full_like(sequences[masked], self.canvas.mask)
            draws = torch.rand(found.shape, generator=self.generator, device=found.device)
            transfer = draws < part
            found[transfer] = self._sample(logits[transfer])[1]
            sequences[masked] = found
            return
        confidence, found = self._sample(logits)
        mean = masked.sum() / len(sequences)
        count = int(mean * part)
        if count > 0:
            ranked = torch.full_like(sequences, -torch.inf, dtype=logits.dtype)
            ranked[masked] = confidence
            # what is drawn beside the masks, as it may be, becomes a mask again
            candidates = torch.full_like(sequences, self.canvas.mask)
            candidates[masked] = found
            positions = self._positions(ranked, count)
            sequences.scatter_(1, positions, candidates.gather(1, positions))

    def _positions(self, ranked: Tensor, count: int) -> Tensor:
        if self.settings.alg_temp == 0:
            return ranked.topk(count).indices
        weights = (ranked / self.settings.alg_temp).softmax(-1)
        if bool(weights.isnan().any()):
            raise UserError(
                f"alg_temp={self.settings.alg_temp:g} is too small for {ranked.dtype}, in which the official code "
                "ends in an error; choose a larger one, 0, or a model in float32."
            )
        return torch.multinomial(weights, count, generator=self.generator)

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(confidence, token) of logits (positions, vocabulary)."""
        probabilities = filtered(logits, self.settings).softmax(-1)
        hot = self.settings.temperature > 0 and not bool(probabilities.isnan().any())  # greedy where nothing is drawn
        if hot and len(probabilities):
            chosen = torch.multinomial(probabilities, 1, replacement=True, generator=self.generator)[:, 0]
        else:
            chosen = largest(probabilities)
        return confidence_of(probabilities, chosen, self.settings.alg), chosen
