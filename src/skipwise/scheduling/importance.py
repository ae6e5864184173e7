"""Step importance: how far a lighter model is from the heavy one, by noise level.

Source: "Not All Denoising Steps Are Equal" (arXiv 2604.02340): the loss of both models, and the KL divergence between
them, on the same noised inputs, over masked positions. The noise is `readings.stratified_readings`'s.

**What an average is over.** Masked positions of a text first, then texts. As one of the masked tokens is drawn
uniformly and the rest independently, the value at noise level t is the mean over the tokens that a sampler commits at
t, given that the text so far is noised data.

**Two views.** Under the log-linear schedule a sampler lifts every mask at a time that is uniform in (0, 1): steps of
equal dt are spent on equal intervals of t, and each commits as many tokens as any other.

- `token`: the plain curve, KL(t) in nats a token. A token meets the models' difference once, when it is committed, so
  its weight is uniform in t, and the integral over the part of the trajectory that the light model runs is the KL
  between the paths of the two samplers, in nats a token (chain rule; of samplers that commit one token at a time, as
  long as their text so far is like noised data). NELBO weighs the *sum* over the masked tokens by 1/t, of which there
  are t * length, and so gives this same uniform weight: the integral of a loss curve is the likelihood bound in nats a
  token, to within 1e-3.
- `step`: the plain curve times the share of positions that are masked, t: what one forward, which predicts all of
  them, is off in total, per position of the text. It is for samplers that choose by confidence what to commit, where
  every prediction matters, and it falls to 0 with t whatever the models are.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.calibration import Sample, Text, divergence, fingerprint, tokenize
from skipwise.errors import UserError, unknown
from skipwise.evaluation.measure import interval, resamples
from skipwise.evaluation.result import Interval
from skipwise.files import read_model, write_atomically
from skipwise.models import kind_of, mask_token
from skipwise.plan import ModelShape, Plan
from skipwise.sampling.denoiser import denoising
from skipwise.sampling.mdlm import conditioning
from skipwise.sampling.others import check_tokens, load_others
from skipwise.scheduling.readings import Reading, batches, stratified_readings
from skipwise.versions import versions

FORMAT = "skipwise-importance/1"
CURVES = ("heavy_loss", "light_loss", "loss_gap", "kl", "reverse_kl")
THIRDS = ("early", "middle", "late")
NEVER = -1e6  # the mask token's score: the official MDLM's number, whose probability is exactly 0 and which KL can take

Curve = Literal["heavy_loss", "light_loss", "loss_gap", "kl", "reverse_kl"]
View = Literal["token", "step"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curves(_Frozen):
    """(bins,) means over texts with 95% bootstrap bands, in nats; bin 0 is the one nearest to clean text.

    heavy_loss, light_loss: cross-entropy of the true token. loss_gap: light minus heavy on the same tokens. kl:
    KL(heavy || light); reverse_kl: KL(light || heavy). The mask token has no part in any distribution, as in sampling.
    """

    heavy_loss: tuple[Interval, ...]
    light_loss: tuple[Interval, ...]
    loss_gap: tuple[Interval, ...]
    kl: tuple[Interval, ...]
    reverse_kl: tuple[Interval, ...]


class Importance(_Frozen):
    """How far the light model is from the heavy one at every noise level; see the module for what is averaged.

    Noise levels are cut into equal bins over (0, 1). `plan` is what the light model runs under, if any. `totals` are
    the integrals of the `token` curves over the whole trajectory, with their intervals; `thirds` the shares of that of
    the KL which the early, middle and late third have.
    """

    format: Literal["skipwise-importance/1"] = "skipwise-importance/1"
    heavy: str
    light: str
    plan: Plan | None
    models: tuple[ModelShape, ModelShape]
    token: Curves
    step: Curves
    totals: dict[Curve, Interval]
    thirds: tuple[Interval, Interval, Interval]
    texts: int
    calibration: dict[str, Any]
    settings: dict[str, Any]
    seeds: dict[str, int]
    device: str
    dtype: str
    versions: dict[str, str] = {}
    date: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {len(getattr(view, curve)) for view in (self.token, self.step) for curve in CURVES}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"all curves have the same number of bins, at least one; these have {sorted(lengths)}")
        return self

    @property
    def bins(self) -> int:
        """Number of bins of noise levels."""
        return len(self.token.kl)

    def values(self, curve: Curve = "kl", view: View = "token") -> np.ndarray:
        """(bins,) means of a curve, from clean text to all noise. Raises UserError for an unknown curve or view."""
        if view not in ("token", "step"):
            raise unknown("view of importance", view, ("token", "step"))
        if curve not in CURVES:
            raise unknown("curve of importance", curve, CURVES)
        return np.array([point.value for point in getattr(getattr(self, view), curve)])

    def total(self, begin: float = 0.0, end: float = 1.0, curve: Curve = "kl", view: View = "token") -> float:
        """The integral of a curve over progress `begin` to `end` (0 = all noise, 1 = done), in nats a token.

        Of "kl", what it costs when the light model runs there; of "loss_gap", by how much the likelihood bound rises.
        Raises UserError when this is no interval inside 0 to 1.
        """
        if not 0 <= begin <= end <= 1:
            raise UserError(f"Progress {begin:g} to {end:g} is no interval; it runs from 0 (all noise) to 1 (done).")
        return float(widths(self.bins, begin, end) @ self.values(curve, view))

    def share(self, begin: float, end: float, curve: Curve = "kl", view: View = "token") -> float:
        """`total` of the interval over that of the whole trajectory; 0 where the two models are equal."""
        whole = self.total(curve=curve, view=view)
        return self.total(begin, end, curve, view) / whole if whole else 0.0

    def cost(self, segments: str, curve: Curve = "kl", view: View = "token") -> float:
        """What a schedule of equal segments costs, such as "LHHL" (L light, H heavy; all noise first), in nats a token.

        The sum of `total` over its light segments, for screening. Raises UserError for other letters, and for none.
        """
        if not segments or set(segments) - set("HL"):
            raise UserError(f"{segments!r} is no schedule; write H (heavy) or L (light) for every segment, as in LHHL.")
        n = len(segments)
        return sum(self.total(i / n, (i + 1) / n, curve, view) for i, who in enumerate(segments) if who == "L")

    def describe(self) -> str:
        """Which two are compared, such as `tiny-text and tiny-text-light`."""
        return f"{self.heavy} and {self.light}" + (f" under a plan ({self.plan.describe()})" if self.plan else "")

    def save(self, path: str | Path) -> Path:
        """Write this as one JSON object, whole or not at all."""
        return write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Importance":
        """Read what `save` wrote. Raises UserError, in one line, for anything else."""
        return read_model(cls, path, FORMAT, "skipwise schedule importance")


def widths(bins: int, begin: float, end: float) -> np.ndarray:
    """(bins,): how much of each bin of noise levels lies between progress `begin` and `end`."""
    edges = np.arange(bins + 1) / bins
    return np.clip(np.minimum(edges[1:], 1 - begin) - np.maximum(edges[:-1], 1 - end), 0, None)


def measure_importance(
    heavy: nn.Module,
    light: nn.Module | None,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    plan: Plan | None = None,
    others: Mapping[str, nn.Module] | None = None,
    light_tokenizer: Any = None,
    bins: int = 24,
    max_tokens: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    names: tuple[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Loss of two masked diffusion models and KL between them, by noise level, on the same noised texts.

    light: another model; or None, with a plan of the heavy one, which then is the light model (at noise level t, the
    plan's phase at progress 1 - t). others: models that the plan's phases name; those not here are loaded. texts:
    held-out ones, or (prompt, answer) pairs, of which the prompt is never masked; each is read once in each of `bins`
    bins of noise levels. max_tokens: texts are cut to this length, by default the models' own, but 512 at most.
    light_tokenizer: given to have it compared with `tokenizer`. batch_size: readings a forward; it changes no result
    beyond rounding. names: of the two models. on_progress(done, total) counts batches.

    Models are taken as they are, so a plan in force around this call counts for both.
    Raises UserError for models that are not masked diffusion models or do not share vocabulary, mask token and
    tokenizer, for a plan of another model, and when no text has two tokens.
    """
    lighter = _check_request(heavy, light, plan, bins, batch_size)
    own = names or (type(heavy).__name__, type(lighter).__name__)
    _check_pair(heavy, lighter, own, tokenizer, light_tokenizer)
    others = load_others(plan, heavy, tokenizer, others)
    length = max_tokens or min(512, *(_longest(model) for model in (heavy, lighter, *others.values())))
    # a plain text is all answer: nothing of it is given but what the tokenizer puts in front
    samples = tokenize(tokenizer, [("", text) if isinstance(text, str) else text for text in texts], length)
    _check_clean(samples, mask_token(heavy))
    work = batches(stratified_readings(samples, bins, seed), plan, batch_size)
    values = np.zeros((4, len(samples), bins))
    chances = np.zeros((len(samples), bins))
    for done, batch in enumerate(work):
        where = [reading.text for reading in batch], [reading.bin for reading in batch]
        values[:, *where] = _compare(heavy, lighter, plan, others, batch).T
        chances[where] = [reading.chance for reading in batch]
        if on_progress:
            on_progress(done + 1, len(work))
    _check_finite(values)
    first = next(heavy.parameters())
    return Importance(
        heavy=own[0],
        light=own[1],
        plan=plan,
        models=(find_contract(heavy).shape, find_contract(lighter).shape),
        **_averages(values, chances, seed),
        texts=len(samples),
        calibration=fingerprint(samples),
        settings={"bins": bins, "max_tokens": length, "mask_chance": "(1 - 0.001) t, one token for certain"},
        seeds={"noise": seed, "bootstrap": seed},
        device=first.device.type,
        dtype=str(first.dtype).removeprefix("torch."),
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )


def _averages(values: np.ndarray, chances: np.ndarray, seed: int) -> dict[str, Any]:
    """values: (4, texts, bins) heavy loss, light loss, KL, reverse KL; chances: (texts, bins) to be masked.

    Texts are drawn with replacement, the same draw at every noise level and for every curve.
    """
    counts = resamples(values.shape[1], seed) / values.shape[1]
    heavy, light, kl, reverse = values
    of_texts = dict(zip(CURVES, (heavy, light, light - heavy, kl, reverse), strict=True))
    views = {"token": of_texts, "step": {name: array * chances for name, array in of_texts.items()}}
    curves = {
        view: Curves(**{name: _bands(array, counts) for name, array in arrays.items()})
        for view, arrays in views.items()
    }
    totals = {name: interval(float(a.mean()), counts @ a.mean(1)) for name, a in of_texts.items()}
    return {**curves, "totals": totals, "thirds": _thirds(kl, counts)}


def _bands(array: np.ndarray, counts: np.ndarray) -> tuple[Interval, ...]:
    """(texts, bins), (resamples, texts) -> the mean over texts of every bin, with its band."""
    draws = counts @ array
    return tuple(interval(float(mean), draw) for mean, draw in zip(array.mean(0), draws.T, strict=True))


def _thirds(kl: np.ndarray, counts: np.ndarray) -> tuple[Interval, ...]:
    """(texts, bins), (resamples, texts) -> share of the KL in the early, middle and late third."""
    weights = np.stack([widths(kl.shape[1], i / 3, (i + 1) / 3) for i in range(3)])
    means = np.concatenate([kl.mean(0)[None], counts @ kl])  # the estimate, then its draws
    parts = means @ weights.T
    whole = parts.sum(1, keepdims=True)
    shares = np.divide(parts, whole, out=np.zeros_like(parts), where=whole != 0)
    return tuple(interval(float(third[0]), third[1:]) for third in shares.T)


@torch.no_grad()
def _compare(
    heavy: nn.Module,
    light: nn.Module,
    plan: Plan | None,
    others: Mapping[str, nn.Module],
    batch: Sequence[Reading],
) -> np.ndarray:
    """(readings, 4): heavy loss, light loss, KL(heavy || light), KL(light || heavy), means over masked positions."""
    clean = torch.tensor([reading.sample.ids for reading in batch])
    masked = torch.stack([reading.masked for reading in batch])
    levels = torch.tensor([reading.level for reading in batch])
    ours = _log_probabilities(heavy, clean, masked, levels)
    # the plan is entered anew every time, as the heavy model, which runs without it, may be the same object
    with denoising(light, plan, others) as denoiser:
        lighter = denoiser.named(denoiser.at(batch[0].progress).model)
        theirs = _log_probabilities(lighter, clean, masked, levels).to(ours.device)
    truth = clean[masked].to(ours.device)[:, None]
    losses = [-found.gather(1, truth)[:, 0] for found in (ours, theirs)]
    values = torch.stack([*losses, divergence(ours, theirs), divergence(theirs, ours)], 1).cpu().double()
    sums = torch.zeros(len(batch), 4, dtype=torch.float64).index_add_(0, masked.nonzero()[:, 0], values)
    return (sums / masked.sum(1, keepdim=True)).numpy()


def _log_probabilities(model: nn.Module, clean: Tensor, masked: Tensor, levels: Tensor) -> Tensor:
    """(masked positions, vocabulary) on the model's device, in float32; the mask token has no part in them (SUBS)."""
    device, mask = next(model.parameters()).device, mask_token(model)
    inputs = clean.masked_fill(masked, mask).to(device)
    logits = model(input_ids=inputs, **conditioning(model, levels, inputs)).logits[masked.to(device)].float()
    logits[:, mask] = NEVER
    return logits.log_softmax(-1)


def _longest(model: nn.Module) -> int:
    """How many tokens the model's config allows."""
    config: Any = model.config
    return getattr(config, "model_length", None) or getattr(config, "max_position_embeddings", None) or 512


def _check_request(
    heavy: nn.Module, light: nn.Module | None, plan: Plan | None, bins: int, batch_size: int
) -> nn.Module:
    """The module that is to be light."""
    for name, value in (("bins", bins), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value}: at least one is needed.")
    if light is None and plan is None:
        raise UserError("There is nothing to compare with; give a light model, or a plan of the heavy one.")
    if plan is not None and light is not None and light is not heavy:
        raise UserError("Give either a light model or a plan of the heavy one, not both.")
    return heavy if light is None else light


def _check_pair(
    heavy: nn.Module, light: nn.Module, names: tuple[str, str], tokenizer: Any, light_tokenizer: Any
) -> None:
    """Raise UserError unless both are masked diffusion models over the same tokens."""
    if kind_of(heavy) != "masked diffusion":
        raise UserError(
            f"{names[0]} is a {type(heavy).__name__} ({kind_of(heavy)}), so it has no noise levels; "
            "give a masked diffusion model, such as tiny-dllm."
        )
    if tokenizer is None:
        raise UserError(f"{names[0]} came without a tokenizer, which step importance needs; add its tokenizer files.")
    check_tokens(heavy, light, names[1], tokenizer, light_tokenizer)


def _check_clean(samples: Sequence[Sample], mask: int) -> None:
    if any(mask in sample.ids for sample in samples):
        raise UserError(f"A text holds the mask token ({mask}), which stands for noise; take it out of the texts.")


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError("A model's predictions are not finite; use dtype float32 or bfloat16, or check its weights.")
