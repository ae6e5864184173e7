"""MDLM's ancestral sampling: every mask is lifted at a random time and its token drawn from the model's p(x0).

Source: Sahoo et al. (arXiv 2406.07524), section 3 and the official sampler. "ddpm" runs the model at every step;
"ddpm_cache" runs it again only when something has changed; "first_hitting" draws beforehand when each mask is lifted
(that does not depend on the tokens) and runs the model at those moments alone, each row at its own. All three have the
same law. First hitting without a number of steps is the continuous-time limit, one token an event.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from skipwise.models import fact
from skipwise.sampling.canvas import Canvas, Part, Settings, on_device, places
from skipwise.sampling.denoiser import Denoiser, Running, Step
from skipwise.sampling.noise import Feed, Noise, gumbel_argmax
from skipwise.sampling.prediction import Prediction, largest

Event = tuple[float, list[int]]  # progress in [0, 1], or above: never in time; positions
Sampler = Literal["first_hitting", "ddpm", "ddpm_cache"]
NOISE_EPS = 1e-3  # of the log-linear schedule: at t = 1 a token is masked with probability 1 - NOISE_EPS
LAST_TIME = 1e-5  # where sampling ends; what is masked then takes its most probable token


@dataclass(frozen=True, kw_only=True)
class MDLMSettings(Settings):
    """How MDLM decodes; see `Settings` for what all families take.

    sampler: see the module. steps: 1000 when left out for the ddpm samplers, continuous time for first hitting.
    noise_dtype: of the Gumbel noise; float32 cuts the tail off, which lowers perplexity and diversity together (arXiv
    2409.02908). compat="mdlm": the official arithmetic and random numbers of a ddpm sampler, in float32.
    """

    sampler: Sampler = "first_hitting"
    noise_dtype: Literal["float64", "float32"] = "float64"

    family: ClassVar[str] = "mdlm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat and self.sampler == "first_hitting":
            object.__setattr__(self, "sampler", "ddpm_cache")  # what the official code does by default

    @property
    def dtype(self) -> torch.dtype:
        """Of the noise."""
        return torch.float32 if self.compat or self.noise_dtype == "float32" else torch.float64


@torch.no_grad()
def decode(
    denoiser: Denoiser, input_ids: Tensor, settings: MDLMSettings, attention_mask: Tensor | None = None
) -> Tensor:
    """Fill `settings.gen_length` masks after every prompt, and those that the prompts hold.

    input_ids: (batch, prompt_length), padded on the left; attention_mask: the same shape, 0 on padding. Returns (batch,
    prompt_length + gen_length).
    """
    canvas = Canvas.open(input_ids, attention_mask, denoiser.mask_token, settings.gen_length)
    run = _FirstHitting if settings.sampler == "first_hitting" else _Ancestral
    run(denoiser, canvas, settings).fill()
    return canvas.close(settings.eos_token_id)


def sigma_of(time: Tensor) -> Tensor:
    """The log-linear schedule's total noise at `time` in [0, 1]; what a model with time conditioning is told."""
    return -torch.log1p(-(1 - NOISE_EPS) * time)


def predict(denoiser: Denoiser, step: Step, part: Part, time: Tensor, where: tuple[Tensor, Tensor]) -> Prediction:
    """p(x0) (n, vocabulary) at `where`, rows and positions (n,) of the part, in which the mask has no part (SUBS).

    time: of all rows (), or of each (rows,).
    """
    others = conditioning(denoiser.named(denoiser.at(step.progress).model), time, part.sequences)
    prediction = denoiser.predict(step, part.sequences, part.attention_mask, where, **others)

    def head(states: Tensor) -> Tensor:
        logits = prediction.head(states).float()
        logits[..., part.mask] = -torch.inf
        probabilities = (logits - logits.logsumexp(-1, keepdim=True)).exp()  # the official arithmetic of a softmax
        denoiser.watch.add(probabilities)
        return probabilities

    return replace(prediction, head=head)


def conditioning(model: nn.Module, time: Tensor, inputs: Tensor) -> dict[str, Any]:
    """What a model is told beside its `inputs` (rows, length): the noise at `time`, () or (rows,), or nothing."""
    return {"sigma": sigma_of(time).float().expand(len(inputs)).to(inputs.device)} if _conditioned(model) else {}


def _conditioned(model: nn.Module) -> bool:
    """Whether the model is told the time."""
    return fact(model, "takes_sigma")


class _Ancestral:
    """ddpm and ddpm_cache, step by step."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: MDLMSettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.steps = settings.steps or 1000
        self.generator = torch.Generator(canvas.sequences.device).manual_seed(settings.seed)
        self.noise = Noise(settings.seed, canvas)
        self.rows = list(range(len(canvas.sequences)))  # those that have not ended
        self.together = settings.compat is not None or denoiser.fixed_rows
        self._cached: tuple[Running, Prediction] | None = None

    def fill(self) -> None:
        """Fill the canvas. How many masks are left is asked once a step."""
        times = torch.linspace(1, LAST_TIME, self.steps + 1)
        left = self.canvas.left
        for i in range(self.steps):
            part, where = self._work(left)
            self._advance(i, part, where, times[i], (1 - LAST_TIME) / self.steps)
            before, left = left, self.canvas.left
            if before != left:
                self._cached = None
                if self.canvas.looks_for_ends(i):
                    self.rows = self.canvas.going(self.rows, self.settings.eos_token_id, self.together)
            # the official code runs on over filled sequences, which changes nothing
            if not any(left[row] for row in self.rows):
                return
        self._cached = None
        part, where = self._work(left)
        (best,) = self._predict(self.steps - 1, part, where, times[-1]).read(lambda p, some: (largest(p),))
        part.sequences[where] = best
        self.canvas.put(part)

    def _work(self, left: Sequence[int]) -> tuple[Part, tuple[Tensor, Tensor]]:
        """The rows to be run, of which so many masks are left, and where those are."""
        part = self.canvas.part(row for row in self.rows if left[row] or self.together)
        return part, places(part.masked, sum(left[row] for row in part.rows))

    def _predict(self, index: int, part: Part, where: tuple[Tensor, Tensor], time: Tensor) -> Prediction:
        """p(x0) at all masks, from the last forward where that is allowed: the same tokens, the same model with the
        same blocks, and not told the time.
        """
        step, forwards = self.canvas.step(index, self.steps), self.denoiser.forwards
        running = self.denoiser.at(step.progress)
        if self._cached is not None and self._cached[0] == running:
            if forwards[-1].predicted is not None and not self._cached[1].fits:  # its logits are made again
                forwards[-1] = replace(forwards[-1], predicted=forwards[-1].predicted + len(where[0]))
            return self._cached[1]
        prediction = predict(self.denoiser, step, part, time, where)
        if self.settings.sampler == "ddpm_cache" and not _conditioned(self.denoiser.named(running.model)):
            prediction = prediction.made() if prediction.fits else prediction
            self._cached = running, prediction
        return prediction

    def _advance(self, index: int, part: Part, where: tuple[Tensor, Tensor], time: Tensor, dt: float) -> None:
        """One step of the reverse process: q(x_s | x_t, x0), whose mass on the mask is the chance to stay."""
        if self.settings.sampler == "ddpm_cache":
            masked_now, masked_then = time, time - dt
        else:
            masked_now, masked_then = (1 - (-sigma_of(t)).exp() for t in (time, time - dt))
        prediction = self._predict(index, part, where, time)
        feed = self._feed(index, part, where, prediction.vocabulary)

        def draw(probabilities: Tensor, some: slice) -> tuple[Tensor]:
            posterior = probabilities.mul_(masked_now - masked_then)
            posterior[:, part.mask] = masked_then
            uniform = feed.take(len(posterior))
            if self.settings.compat:
                return (largest(posterior / (1e-10 - (uniform + 1e-10).log())),)
            return (gumbel_argmax(posterior.to(uniform.dtype), uniform),)

        (part.sequences[where],) = prediction.read(draw)
        self.canvas.put(part)

    def _feed(self, index: int, part: Part, where: tuple[Tensor, Tensor], words: int) -> Feed:
        if self.settings.compat:  # the official code draws for every position
            whole = (*part.sequences.shape, words)
            return Feed(iter([torch.rand(whole, generator=self.generator, device=self.generator.device)[where]]))
        return self.noise.feed([index] * len(part.rows), words, where, part.rows, dtype=self.settings.dtype)


class _FirstHitting:
    """When each mask is lifted is drawn first; the model then runs at those moments only, on the rows concerned."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: MDLMSettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.noise = Noise(settings.seed, canvas)
        progress = self.noise.uniform([0] * len(canvas.sequences))  # uniform: P(masked at time t) is t
        if settings.steps:
            # which step lifts the mask; `steps` itself: none did, with probability LAST_TIME
            progress = (progress * settings.steps / (1 - LAST_TIME)).floor() / settings.steps
        masked = canvas.masked.tolist()
        self.events = [_events(*pair) for pair in zip(progress.tolist(), masked, strict=True)]
        self.rows = list(range(len(masked)))  # those that have not ended

    def fill(self) -> None:
        """Fill the canvas, event by event. Phases of a plan are finished by all rows before the next begins."""
        total = self.canvas.most
        while any(self.events[row] for row in self.rows):
            self.rows = [row for row in self.rows if self.events[row]]
            earliest = min(self.events[row][-1][0] for row in self.rows)
            border = self.denoiser.border(min(earliest, 1.0))
            rows = [row for row in self.rows if border >= 1.0 or self.events[row][-1][0] < border]
            step = self.canvas.step(len(self.denoiser.forwards), total, min(earliest, 1.0))
            events = [self.events[row].pop() for row in rows]
            if self.denoiser.fixed_rows:  # the others are run along
                due = dict(zip(rows, events, strict=True))
                rows = list(range(len(self.events)))
                events = [due.get(row, (earliest, [])) for row in rows]
            self._lift(step, rows, events)
            if self.canvas.looks_for_ends(step.index):
                self.rows = self.canvas.going(self.rows, self.settings.eos_token_id)

    def _lift(self, step: Step, rows: Sequence[int], events: Sequence[Event]) -> None:
        """One forward of these rows, each at its own next event."""
        part, device = self.canvas.part(rows), self.canvas.sequences.device
        pairs = [(n, position) for n, (_, positions) in enumerate(events) for position in positions]
        found = on_device([number for pair in pairs for number in pair], device).view(-1, 2)
        where, at = (found[:, 0], found[:, 1]), [(rows[n], position) for n, position in pairs]
        in_time = [events[n][0] < 1 for n, _ in pairs]
        time = torch.tensor([1 - due for due, _ in events], dtype=torch.float64).clamp_min(LAST_TIME)
        prediction = predict(self.denoiser, step, part, time, where)

        def draw(probabilities: Tensor, some: slice) -> tuple[Tensor]:
            uniform = self.noise.at(at[some], prediction.vocabulary, self.settings.dtype)
            drawn = gumbel_argmax(probabilities.to(uniform.dtype), uniform)
            if all(in_time[some]):
                return (drawn,)
            early = on_device(in_time[some], device).bool()
            return (torch.where(early, drawn, largest(probabilities)),)  # the official end of sampling

        (part.sequences[where],) = prediction.read(draw)
        self.canvas.put(part)


def _events(progress: Sequence[float], masked: Sequence[bool]) -> list[Event]:
    """When masks of a row are lifted, and which, the last first."""
    found: dict[float, list[int]] = {}
    for position, (moment, hidden) in enumerate(zip(progress, masked, strict=True)):
        if hidden:
            found.setdefault(moment, []).append(position)
    return sorted(found.items(), reverse=True)
