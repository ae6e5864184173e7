"""The official decoding loops of LLaDA, Dream and MDLM, written out from descriptions of what they do, costs included.

Logits of all positions at every step, the softmax of whole rows to read one probability, Gumbel noise in float64 over
the whole vocabulary, one top-k a row, a dense mask of batch x length x length where there is padding, steps that commit
nothing, no early end. They are what `compat=` must repeat token for token (tests) and what decoding is timed against
(benchmarks/speed.py). Each takes (model, prompts, attention mask, settings) and returns (batch, prompt + gen_length).
Sources: arXiv 2502.09992, 2508.15487, 2406.07524 and the papers' repositories. Nothing of them is copied.

Two departures, in what does not change the cost: the models are skipwise's, and a row's padding counts in its rotary
positions, as it does in LLaDA's official code and does not in Dream's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.sampling import DreamSettings, LLaDASettings, MDLMSettings


def extended(attention_mask: Tensor | None, gen_length: int) -> Tensor | None:
    """(batch, prompt) -> (batch, prompt + gen_length), or None where nothing is padding, as the official code finds."""
    if attention_mask is None or not bool((attention_mask == 0).any()):
        return None
    return F.pad(attention_mask, (0, gen_length), value=1)


# LLaDA


def llada_logits(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, vocabulary). Padding makes a dense additive bias (batch, 1, length, length)."""
    if mask is None:
        return model(input_ids=x).logits
    dtype = next(model.parameters()).dtype
    bias = (1.0 - mask[:, None, None, :].float()).expand(-1, 1, x.shape[1], -1) * torch.finfo(dtype).min
    return model(input_ids=x, attention_mask=bias.to(dtype).contiguous()).logits


def gumbel(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """What argmax is taken of. The noise is float64 over the whole vocabulary; without temperature there is none."""
    if temperature == 0:
        return logits
    logits = logits.to(torch.float64)
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator, device=logits.device)
    return logits.exp() / (-torch.log(noise)) ** temperature


@torch.no_grad()
def llada(model: nn.Module, prompt: Tensor, attention_mask: Tensor | None, s: LLaDASettings) -> Tensor:
    """LLaDA's `generate`."""
    generator = torch.Generator(prompt.device).manual_seed(s.seed)
    token, eos, eot = (getattr(model.config, f"{name}_token_id", None) for name in ("mask", "eos", "eot"))
    (b, p), g, k = prompt.shape, s.gen_length, s.block_length or s.gen_length
    blocks = g // k
    steps = (s.steps or g) // blocks
    x = F.pad(prompt, (0, g), value=token)
    prompt_index = x != token
    mask = extended(attention_mask, g)
    for block in range(blocks):
        end = p + (block + 1) * k
        count = (x[:, end - k : end] == token).sum(1)
        n = (count // steps)[:, None].repeat(1, steps)
        for row in range(b):
            n[row, : int(count[row] % steps)] += 1
        for i in range(steps):
            masked = x == token
            if s.cfg_scale > 0:
                without = x.clone()
                without[prompt_index] = token
                both = llada_logits(model, torch.cat([x, without]), None if mask is None else torch.cat([mask, mask]))
                z, zu = both.chunk(2)
                z = zu + (s.cfg_scale + 1) * (z - zu)
            else:
                z = llada_logits(model, x, mask)
            if s.logits_eos_inf:
                z[:, :, eos] = -torch.inf
            noisy = gumbel(z, s.temperature, generator)
            x0 = noisy.argmax(-1)
            if s.confidence_eos_eot_inf:
                noisy[:, :, eos] = -torch.inf
                if eot is not None:  # the official code has both tokens' numbers in it
                    z[:, :, eot] = -torch.inf
            if s.remasking == "low_confidence":
                conf = torch.softmax(z, -1).gather(-1, x0[..., None]).squeeze(-1)
            else:
                conf = torch.rand(x.shape, generator=generator, device=x.device)
            conf[:, end:] = -torch.inf
            x0 = torch.where(masked, x0, x)
            conf = torch.where(masked, conf, torch.tensor(-torch.inf, dtype=conf.dtype, device=x.device))
            for row in range(b):
                index = torch.topk(conf[row], k=int(n[row, i])).indices
                x[row, index] = x0[row, index]
    return x


# Dream


def dream_logits(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, vocabulary), made of all states and then shifted by one, as a copy."""
    if mask is not None:
        mask = mask[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1).contiguous()
    unshifted = model.lm_head(model.model(x, attention_mask=mask).last_hidden_state)
    return torch.cat([unshifted[:, :1], unshifted[:, :-1]], dim=1)


def dream_tokens(logits: Tensor, s: DreamSettings) -> tuple[Tensor, Tensor]:
    """(confidence, token) of logits (positions, vocabulary); draws are of torch's global random state."""
    if s.temperature > 0:
        logits = logits / s.temperature
    if s.top_p is not None and s.top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        remove = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > s.top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, remove)
        logits = logits.masked_fill(dropped, torch.finfo(logits.dtype).min)
    if s.top_k is not None:
        remove = logits < torch.topk(logits, s.top_k)[0][..., -1, None]
        logits = logits.masked_fill(remove, torch.finfo(logits.dtype).min)
    probs = torch.softmax(logits, dim=-1)
    confidence, x0 = probs.max(dim=-1)
    if s.temperature > 0:
        try:
            x0 = torch.distributions.Categorical(probs=probs).sample()
            confidence = torch.gather(probs, -1, x0.unsqueeze(-1)).squeeze(-1)
        except (ValueError, RuntimeError):  # of numbers that are none: the official code goes on, greedily
            pass
    if s.alg == "topk_margin":
        ordered = torch.sort(probs, dim=-1, descending=True)[0]
        confidence = ordered[:, 0] - ordered[:, 1]
    if s.alg == "entropy":
        confidence = torch.sum(probs * torch.log(probs + 1e-10), dim=-1)
    return confidence, x0


@torch.no_grad()
def dream(model: nn.Module, prompt: Tensor, attention_mask: Tensor | None, s: DreamSettings) -> Tensor:
    """Dream's `diffusion_generate`, under torch's global random state, which it seeds."""
    torch.manual_seed(s.seed)
    token, steps = model.config.mask_token_id, s.steps or s.gen_length
    x = F.pad(prompt, (0, s.gen_length), value=token)
    mask = extended(attention_mask, s.gen_length)
    times = torch.linspace(1, s.eps, steps + 1)
    if s.tokens_hook:
        x = s.tokens_hook(None, x, None)
    for i in range(steps):
        masked = x == token
        logits = dream_logits(model, x, mask)
        if s.logits_hook:
            logits = s.logits_hook(i, x, logits)
        mask_logits = logits[masked]
        if s.eos_penalty:  # Dream-Coder's
            mask_logits[:, model.config.pad_token_id] += s.eos_penalty * torch.log(1 - times[i] + s.eps)
        part = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        if s.alg == "origin":
            x0 = torch.zeros_like(x[masked]) + token
            transfer = torch.rand(*x0.shape, device=x.device) < part
            _, x0[transfer] = dream_tokens(mask_logits[transfer], s)
            x[masked] = x0
        else:
            confidence, x0 = dream_tokens(mask_logits, s)
            mean = masked.sum() / masked.shape[0]
            count = int(mean * part) if i < steps - 1 else int(mean)
            full = torch.full_like(x, -torch.inf, dtype=logits.dtype)
            full[masked] = confidence
            if count > 0:
                if s.alg_temp == 0:
                    _, index = torch.topk(full, count)
                else:
                    index = torch.multinomial(F.softmax(full / s.alg_temp, dim=-1), num_samples=count)
                filled = torch.zeros_like(x) + token
                filled[masked] = x0
                rows = torch.arange(x.size(0), device=x.device).unsqueeze(1).expand_as(index)
                x[rows, index] = filled[rows, index]
        if s.tokens_hook:
            x = s.tokens_hook(i, x, logits)
    return x


# MDLM


def mdlm_log_p(model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    """Log-probabilities (batch, length, vocabulary) with the SUBS rules, in passes over the whole tensor."""
    z = model(x, sigma=sigma.expand(len(x))).logits.float()
    z[:, :, model.config.mask_token_id] += -1e6
    z = z - torch.logsumexp(z, dim=-1, keepdim=True)
    unmasked = x != model.config.mask_token_id
    z[unmasked] = -1e6
    z[unmasked, x[unmasked]] = 0
    return z


def mdlm_draw(q: Tensor) -> Tensor:
    """One token a position from q (batch, length, vocabulary), which need not add up to 1."""
    return (q / (1e-10 - (torch.rand_like(q) + 1e-10).log())).argmax(dim=-1)


@torch.no_grad()
def mdlm(model: nn.Module, prompt: Tensor, attention_mask: Tensor | None, s: MDLMSettings) -> Tensor:
    """MDLM's `_sample`, under torch's global random state, which it seeds. It knows no padding: the mask is ignored."""
    torch.manual_seed(s.seed)
    token, steps = model.config.mask_token_id, s.steps or 1000
    x = F.pad(prompt, (0, s.gen_length), value=token)
    times = torch.linspace(1, 1e-5, steps + 1, device=x.device)
    dt = (1 - 1e-5) / steps

    def sigma(t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - 1e-3) * t)

    cache = None
    for i in range(steps):
        t = times[i]
        if s.sampler == "ddpm":
            m_t, m_s = 1 - torch.exp(-sigma(t)), 1 - torch.exp(-sigma(t - dt))
            p = mdlm_log_p(model, x, sigma(t)).exp()
        else:
            m_t, m_s = t, t - dt
            p = mdlm_log_p(model, x, sigma(t)).exp() if cache is None else cache
            cache = p
        q = p * (m_t - m_s)
        q[:, :, token] = m_s
        following = torch.where(x != token, x, mdlm_draw(q))
        if not torch.equal(following, x) or model.config.time_conditioning:
            cache = None
        x = following
    return mdlm_log_p(model, x, sigma(times[-1])).argmax(dim=-1)


LOOPS = {"llada": llada, "dream": dream, "mdlm": mdlm}
