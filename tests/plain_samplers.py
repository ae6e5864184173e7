"""The plain twins of the samplers: every step runs every row, with logits and noise of all positions.

They are the loops that the samplers in `skipwise.sampling` do with less work, and must give the same tokens. Quirks of
the official code are not here; those are in the transcriptions beside the compatibility tests.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.sampling import Denoiser, Step


def mixed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest())


class Twin:
    """A canvas with its noise; `of` fills it."""

    def __init__(self, denoiser: Denoiser, prompt: Tensor, present: Tensor | None, gen_length: int, s: dict[str, Any]):
        self.denoiser, self.s, self.mask = denoiser, s, denoiser.mask_token
        self.x = F.pad(prompt, (0, gen_length), value=self.mask)
        self.present = torch.ones_like(self.x) if present is None else F.pad(present, (0, gen_length), value=1)
        self.prompt, self.length = prompt.shape[1], self.x.shape[1]
        self.padding = (self.present == 0).sum(1).tolist()
        self.seed, self.eos = s.get("seed", 0), s.get("eos_token_id")

    @property
    def masked(self) -> Tensor:
        return (self.x == self.mask) & self.present.bool()

    def logits(self, step: Step, **others: Any) -> Tensor:
        logits = self.denoiser(step, self.x, self.present, **others).float()
        logits[..., self.mask] = -torch.inf
        return logits

    def uniform(self, draws: list[int], *rest: int, start: int = 0, stop: int | None = None, dtype: Any) -> Tensor:
        found = torch.full((len(self.x), (stop or self.length) - start, *rest), 0.5, dtype=dtype)
        for row, draw in enumerate(draws):
            begin = max(start, self.padding[row])
            generator = torch.Generator().manual_seed(mixed(self.seed + row, draw))
            values = torch.rand((stop or self.length) - begin, *rest, generator=generator, dtype=dtype)
            found[row, begin - start :] = values
        return found

    def finished(self) -> bool:
        if self.eos is None:
            return False
        for row, masked in zip(self.x.tolist(), self.masked.tolist(), strict=True):
            ends = [p for p in range(self.prompt, self.length) if row[p] == self.eos]
            if not ends or any(masked[: ends[0]]):
                return False
        return True

    def close(self) -> Tensor:
        if self.eos is not None:
            new = self.x[:, self.prompt :]
            new[(new == self.eos).cumsum(1) > 0] = self.eos
        return self.x


def quotas(masked: Tensor, steps: int) -> Tensor:
    """(batch, steps): evenly, the remainder first."""
    return (masked // steps)[:, None] + (torch.arange(steps) < (masked % steps)[:, None])


@torch.no_grad()
def plain_llada(denoiser: Denoiser, prompt: Tensor, present: Tensor | None, **s: Any) -> Tensor:
    """LLaDA's loop, by quota or by threshold."""
    t = Twin(denoiser, prompt, present, s["gen_length"], s)
    given, total = t.x != t.mask, int(t.masked.sum(1).max())
    length = s.get("block_length") or s["gen_length"]
    blocks = s["gen_length"] // length if length else 1
    steps = (s.get("steps") or (s["gen_length"] or total)) // blocks
    scale, temperature, threshold = s.get("cfg_scale", 0), s.get("temperature", 0), s.get("threshold")
    for block in range(blocks):
        window = slice(0 if block == 0 else t.prompt + block * length, t.prompt + (block + 1) * length)
        quota = quotas(t.masked[:, window].sum(1), steps)
        i = 0
        while t.masked[:, window].any() if threshold else i < steps:
            left = t.masked.sum(1)
            progress = 1 - int(left.max()) / total if threshold else (block * steps + i) / (blocks * steps)
            step = Step(i, total, t.x, progress)
            i += 1
            if not threshold and not quota[:, i - 1].any():
                continue
            z = (_guided(t, step, given, scale) if scale else t.logits(step))[:, window]
            for token in s.get("never", ()):
                z[..., token] = -torch.inf
            noisy, rest = z, {"start": window.start, "stop": window.stop}
            if temperature:
                u = t.uniform((2 * left).tolist(), z.shape[-1], dtype=torch.float64, **rest)
                noisy = z.double().exp() / (-u.log()) ** temperature
            chosen = noisy.argmax(-1)
            for token in s.get("last", ()):
                z[..., token] = -torch.inf
            confidence = z.softmax(-1).gather(-1, chosen[..., None])[..., 0]
            if s.get("remasking") == "random":
                confidence = t.uniform((2 * left + 1).tolist(), dtype=torch.float32, **rest)
            confidence = confidence.where(t.masked[:, window], -torch.inf)
            for row in range(len(t.x)):
                if threshold:
                    where = confidence[row] >= threshold
                    where[confidence[row].argmax()] |= bool(confidence[row].max() > -torch.inf)
                    t.x[row, window] = chosen[row].where(where, t.x[row, window])
                else:
                    best = confidence[row].sort(descending=True, stable=True).indices[: int(quota[row, i - 1])]
                    t.x[row, window.start + best] = chosen[row, best]
            if t.finished():
                return t.close()
    return t.close()


def _guided(t: Twin, step: Step, given: Tensor, scale: float) -> Tensor:
    both, mask = torch.cat([t.x, t.x.masked_fill(given, t.mask)]), t.present.repeat(2, 1)
    z, unguided = t.denoiser(step, both, mask).float().chunk(2)
    z = unguided + (scale + 1) * (z - unguided)
    z[..., t.mask] = -torch.inf
    return z


@torch.no_grad()
def plain_dream(denoiser: Denoiser, prompt: Tensor, present: Tensor | None, **s: Any) -> Tensor:
    """Dream's loop; `filtered` and `confidence_of` are held to the official code elsewhere."""
    from skipwise.sampling.dream import DreamSettings, confidence_of, filtered

    t = Twin(denoiser, prompt, present, s["gen_length"], s)
    settings = DreamSettings(**s)
    steps, every = s.get("steps") or int(t.masked.sum(1).max()), len(t.x)
    quota = quotas(t.masked.sum(1), steps)
    lifted = (t.uniform([0] * every, dtype=torch.float64) * steps).long()
    for i in range(steps):
        now = t.masked & (lifted == i)
        if not (now if settings.alg == "origin" else quota[:, i]).any():
            continue
        z = t.logits(Step(i, steps, t.x, i / steps))
        time = torch.linspace(1, settings.eps, steps + 1)[i]
        z[..., t.denoiser.model.config.pad_token_id] += settings.eos_penalty * (1 - time + settings.eps).log()
        z = filtered(z, settings)
        p = z.softmax(-1)
        chosen = z.argmax(-1)
        if settings.temperature:
            chosen = (p.double() / -t.uniform([3 * i + 1] * every, z.shape[-1], dtype=torch.float64).log()).argmax(-1)
        if settings.alg == "origin":
            t.x = chosen.where(now, t.x)
        else:
            confidence = confidence_of(p, chosen, settings.alg).where(t.masked, -torch.inf)
            if settings.alg_temp:
                u = t.uniform([3 * i + 2] * every, dtype=torch.float64)
                confidence = confidence / settings.alg_temp - (-u.log()).log()
            if settings.confidence_eos_eot_inf:
                config = t.denoiser.model.config
                ends = (chosen == config.eos_token_id) | (chosen == config.eot_token_id)
                confidence = confidence.where(~ends | ~t.masked, torch.finfo(confidence.dtype).min)
            for row in range(every):
                best = confidence[row].sort(descending=True, stable=True).indices[: int(quota[row, i])]
                t.x[row, best] = chosen[row, best]
        if t.finished():
            break
    return t.close()


@torch.no_grad()
def plain_mdlm(denoiser: Denoiser, prompt: Tensor, present: Tensor | None, **s: Any) -> Tensor:
    """MDLM's three samplers."""
    t = Twin(denoiser, prompt, present, s["gen_length"], s)
    dtype = getattr(torch, s.get("noise_dtype", "float64"))
    (_hitting if s.get("sampler", "first_hitting") == "first_hitting" else _ancestral)(t, s, dtype)
    return t.close()


def _p(t: Twin, step: Step, time: Tensor) -> Tensor:
    others = {}
    if getattr(t.denoiser.model.config, "time_conditioning", False):
        others = {"sigma": -torch.log1p(-(1 - 1e-3) * time).float().expand(len(t.x))}
    z = t.logits(step, **others)
    return (z - z.logsumexp(-1, keepdim=True)).exp()


def _hitting(t: Twin, s: dict[str, Any], dtype: torch.dtype) -> None:
    progress = t.uniform([0] * len(t.x), dtype=torch.float64)
    if s.get("steps"):
        progress = (progress * s["steps"] / (1 - 1e-5)).floor() / s["steps"]
    total = int(t.masked.sum(1).max())
    while t.masked.any():
        due = progress.masked_fill(~t.masked, torch.inf).amin(1)
        first = min(float(due.min()), 1.0)
        border = t.denoiser.border(first)
        p = _p(t, Step(0, total, t.x, first), (1 - due.clamp_max(1)).clamp_min(1e-5))
        for row in range(len(t.x)):
            if not due[row] < (border if border < 1 else torch.inf):
                continue
            for position in (t.masked[row] & (progress[row] == due[row])).nonzero()[:, 0].tolist():
                generator = torch.Generator().manual_seed(mixed(t.seed + row, 0, position - t.padding[row]))
                u = torch.empty(p.shape[-1], dtype=dtype).uniform_(generator=generator)
                q = p[row, position]
                t.x[row, position] = (q.to(dtype) / -u.log()).argmax() if due[row] < 1 else q.argmax()
        if t.finished():
            return


def _ancestral(t: Twin, s: dict[str, Any], dtype: torch.dtype) -> None:
    steps = s.get("steps") or 1000
    times, dt = torch.linspace(1, 1e-5, steps + 1), (1 - 1e-5) / steps
    for i in range(steps):
        masked_now, masked_then = times[i], times[i] - dt
        if s["sampler"] == "ddpm":
            masked_now, masked_then = ((1 - 1e-3) * time for time in (masked_now, masked_then))
            masked_now, masked_then = (1 - (torch.log1p(-time)).exp() for time in (masked_now, masked_then))
        q = _p(t, Step(i, steps, t.x, i / steps), times[i]) * (masked_now - masked_then)
        q[..., t.mask] = masked_then
        u = t.uniform([i] * len(t.x), q.shape[-1], dtype=dtype)
        t.x = (q.to(dtype) / -u.log()).argmax(-1).where(t.masked, t.x)
        if not t.masked.any() or t.finished():
            return
    t.x = _p(t, Step(steps - 1, steps, t.x, (steps - 1) / steps), times[-1]).argmax(-1).where(t.masked, t.x)


PLAIN = {"llada": plain_llada, "dream": plain_dream, "mdlm": plain_mdlm}
