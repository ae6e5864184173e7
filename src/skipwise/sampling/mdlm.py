"""MDLM's ancestral sampling: every mask is lifted at a random time and its token drawn from the model's p(x0).

Source: Sahoo et al. (arXiv 2406.07524), section 3 and the official sampler. "ddpm" runs the model at every step;
"ddpm_cache" runs it again only when something has changed; "first_hitting" draws beforehand when each mask is lifted
(that does not depend on the tokens) and runs the model at those moments alone, each row at its own. All three have the
same law. First hitting without a number of steps is the continuous-time limit, one token an event.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from skipwise.sampling.canvas import Canvas, Settings
from skipwise.sampling.denoiser import Denoiser, Running, Step
from skipwise.sampling.noise import Noise, gumbel_argmax

Sampler = Literal["first_hitting", "ddpm", "ddpm_cache"]
SAMPLERS = ("first_hitting", "ddpm", "ddpm_cache")
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
        self.one_of("sampler", SAMPLERS)
        self.one_of("noise_dtype", ("float64", "float32"))
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


def predict(
    denoiser: Denoiser, step: Step, canvas: Canvas, time: Tensor, where: Tensor, rows: Tensor | None = None
) -> Tensor:
    """p(x0) (positions, vocabulary) at the positions `where` (rows, length), in which the mask has no part (SUBS).

    time: of all rows (), or of each (rows,); rows: which sequences to run, all of them by default.
    """
    inputs, attention_mask = canvas.sequences, canvas.attention_mask
    if rows is not None:
        inputs, attention_mask = inputs[rows], None if attention_mask is None else attention_mask[rows]
    others = conditioning(denoiser.named(denoiser.at(step.progress).model), time, inputs)
    logits = denoiser(step, inputs, attention_mask, **others)[where].float()
    logits[..., canvas.mask] = -torch.inf
    return (logits - logits.logsumexp(-1, keepdim=True)).exp()  # the official arithmetic of a softmax


def conditioning(model: nn.Module, time: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """What a model is told beside its `inputs` (rows, length): the noise at `time`, () or (rows,), or nothing."""
    return {"sigma": sigma_of(time).float().expand(len(inputs)).to(inputs.device)} if _conditioned(model) else {}


def _conditioned(model: nn.Module) -> bool:
    """Whether the model is told the time."""
    return getattr(model.config, "time_conditioning", False)


class _Ancestral:
    """ddpm and ddpm_cache, step by step."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: MDLMSettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.steps = settings.steps or 1000
        device = canvas.sequences.device
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.noise = Noise(settings.seed, canvas)
        self._cached: tuple[Running, Tensor] | None = None

    def fill(self) -> None:
        """Fill the canvas."""
        times = torch.linspace(1, LAST_TIME, self.steps + 1)
        for i in range(self.steps):
            probabilities = self._predict(i, times[i])
            before = self.canvas.sequences.clone()
            self._advance(i, probabilities, times[i], (1 - LAST_TIME) / self.steps)
            if not torch.equal(before, self.canvas.sequences):
                self._cached = None
            # the official code runs on over filled sequences, which changes nothing
            if not bool(self.canvas.masked.any()) or self.canvas.finished(self.settings.eos_token_id):
                return
        self._cached = None
        best = self._predict(self.steps - 1, times[-1]).argmax(-1)
        self.canvas.sequences[self.canvas.masked] = best

    def _predict(self, index: int, time: Tensor) -> Tensor:
        """p(x0) at all masks, from the last forward where that is allowed: the same tokens, the same model with the
        same blocks, and not told the time.
        """
        step = self.canvas.step(index, self.steps)
        running = self.denoiser.at(step.progress)
        if self._cached is not None and self._cached[0] == running:
            return self._cached[1]
        probabilities = predict(self.denoiser, step, self.canvas, time, self.canvas.masked)
        if self.settings.sampler == "ddpm_cache" and not _conditioned(self.denoiser.named(running.model)):
            self._cached = running, probabilities
        return probabilities

    def _advance(self, index: int, probabilities: Tensor, time: Tensor, dt: float) -> None:
        """One step of the reverse process: q(x_s | x_t, x0), whose mass on the mask is the chance to stay."""
        if self.settings.sampler == "ddpm_cache":
            masked_now, masked_then = time, time - dt
        else:
            masked_now, masked_then = (1 - (-sigma_of(t)).exp() for t in (time, time - dt))
        masked = self.canvas.masked
        posterior = probabilities * (masked_now - masked_then)
        posterior[..., self.canvas.mask] = masked_then
        if self.settings.compat:
            whole = (*masked.shape, posterior.shape[-1])  # the official code draws for every position
            uniform = torch.rand(whole, generator=self.generator, device=posterior.device)[masked]
            drawn = (posterior / (1e-10 - (uniform + 1e-10).log())).argmax(-1)
        else:
            draws = [index] * len(masked)
            uniform = self.noise.uniform(draws, posterior.shape[-1], dtype=self.settings.dtype)[masked]
            drawn = gumbel_argmax(posterior.to(uniform.dtype), uniform)
        self.canvas.sequences[masked] = drawn


class _FirstHitting:
    """When each mask is lifted is drawn first; the model then runs at those moments only, on the rows concerned."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: MDLMSettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.noise = Noise(settings.seed, canvas)
        progress = self.noise.uniform([0] * len(canvas.sequences))  # uniform: P(masked at time t) is t
        if settings.steps:
            # which step lifts the mask; `steps` itself: none did, with probability LAST_TIME
            progress = (progress * settings.steps / (1 - LAST_TIME)).floor() / settings.steps
        self.lifted = progress.masked_fill(~canvas.masked, torch.inf)

    def fill(self) -> None:
        """Fill the canvas, event by event. Phases of a plan are finished by all rows before the next begins."""
        total = self.canvas.most
        while bool(self.canvas.masked.any()):
            due = self.lifted.masked_fill(~self.canvas.masked, torch.inf).amin(1)  # each row's next event
            earliest = float(due.min())
            border = self.denoiser.border(min(earliest, 1.0))
            rows = (due < (border if border < 1.0 else torch.inf)).nonzero()[:, 0]
            step = self.canvas.step(len(self.denoiser.forwards), total, min(earliest, 1.0))
            self._lift(step, rows, due[rows])
            if self.canvas.finished(self.settings.eos_token_id):
                return

    def _lift(self, step: Step, rows: Tensor, due: Tensor) -> None:
        """One forward of these rows, each at its own next event, at `due` (rows,)."""
        now = self.canvas.masked[rows] & (self.lifted[rows] == due[:, None])
        time = (1 - due).clamp_min(LAST_TIME)
        probabilities = predict(self.denoiser, step, self.canvas, time, now, rows)
        uniform = self.noise.at(now, rows, probabilities.shape[1], self.settings.dtype)
        drawn = gumbel_argmax(probabilities.to(uniform.dtype), uniform)
        in_time = (due < 1)[:, None].expand_as(now)[now]
        drawn = torch.where(in_time, drawn, probabilities.argmax(-1))  # the official end of sampling
        self.canvas.sequences[rows] = self.canvas.sequences[rows].masked_scatter(now, drawn)
