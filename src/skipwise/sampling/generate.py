"""`generate`: decode with any language model, under a plan, and say what it took."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.cost import Prices, price_blocks
from skipwise.cuts import Cut
from skipwise.errors import UserError, unknown
from skipwise.examples import Size
from skipwise.models import end_of_text, fact, kind_of
from skipwise.plan import Plan
from skipwise.sampling import dream, llada, mdlm
from skipwise.sampling.accounts import Share, account
from skipwise.sampling.autoregressive import AutoregressiveSettings, decode_autoregressive, runs_with_cache
from skipwise.sampling.canvas import Settings
from skipwise.sampling.denoiser import Denoiser, Step, denoising
from skipwise.sampling.inputs import Ids, read_prompts
from skipwise.sampling.threads import worthwhile_threads
from skipwise.skipping import cut_now, skip
from skipwise.wrapping import unwrap


@dataclass(frozen=True)
class Statistics:
    """What a generation took. FLOPs are by formula (`skipwise.cost`), as they happened, for the whole batch: of the
    rows that were run, and in the head of the positions that logits were made for.

    forwards: calls of a model; block_flops: in the blocks alone; all_in_flops: head and attention included;
    whole_all_in_flops: what the same forwards of the plan's own model would have taken with no block skipped; seconds:
    measured wall-clock; warmup_seconds: what compiling took before that, 0 where it was compiled already or not at all.
    by_model: the share of every model that a plan's phases name, None is the plan's own. spared_flops: of all, those
    that were not taken: blocks are counted whole, and the last one runs where states are wanted alone; what MDLM makes
    of a noise level that stays the same is made once.
    """

    forwards: int
    block_flops: int
    all_in_flops: int
    whole_all_in_flops: int
    seconds: float
    by_model: Mapping[str | None, Share] = field(default_factory=dict)
    warmup_seconds: float = 0.0
    spared_flops: int = 0

    @property
    def taken_flops(self) -> int:
        """All-in FLOPs, less what was spared."""
        return self.all_in_flops - self.spared_flops


@dataclass(frozen=True)
class Generated:
    """sequences: (batch, prompt_length + new tokens), prompts included."""

    sequences: Tensor
    stats: Statistics


@dataclass(frozen=True)
class Family:
    """A decoding family: what it can be told, and its loop."""

    settings: type[Settings]
    decode: Callable[[Denoiser, Tensor, Any, Tensor | None], Tensor]


FAMILIES = {
    "llada": Family(llada.LLaDASettings, llada.decode),
    "dream": Family(dream.DreamSettings, dream.decode),
    "mdlm": Family(mdlm.MDLMSettings, mdlm.decode),
}


GEN_LENGTH = 128  # new tokens when nothing is said


def generate(
    model: nn.Module,
    input_ids: Ids,
    *,
    plan: Plan | None = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    gen_length: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
    family: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
    on_step: Callable[[Step], None] | None = None,
    compile: bool = False,
    **settings: Any,
) -> Generated:
    """Decode `gen_length` tokens after every prompt, with the sampler of the model's family or token by token.

    input_ids: (batch, prompt_length), prompts of unequal length padded on the left, or lists, which are padded here;
    attention_mask: the same shape, 0 on padding: what a tokenizer returns, as `**inputs`. gen_length: 128 when left
    out; max_new_tokens is the same. Masks in the prompt of a diffusion model are filled too (infilling; gen_length may
    then be 0).
    A plan's phases follow the trajectory; the models that they name are loaded by that name, unless they are in
    `others`. stop_at_eos: end when every row has ended; what a row says after its end of
    text becomes that token. Not under `compat`, as the official samplers go on.
    family: "llada", "dream" or "mdlm", the model's own by default; `settings` are those of its sampler (LLaDASettings,
    DreamSettings, MDLMSettings), for an autoregressive model those of AutoregressiveSettings; on_step is called before
    each denoising forward.
    compile: run the denoising step through `torch.compile`, one graph for each phase of the plan and shape of the
    batch; rows that have ended are then run along. What is compiled is kept for as long as the model is.
    Raises UserError for an empty list of prompts, padding on the right, settings that do not fit the model, and where
    there is nothing to compile with.
    """
    model = unwrap(model)
    input_ids, attention_mask = read_prompts(model, input_ids, attention_mask, token_type_ids)
    gen_length = _length(gen_length, max_new_tokens)
    if kind_of(model) != "masked diffusion":
        given = {"on_step": on_step, "family": family, "compile": compile}
        diffusion = [*(set(settings) - set(_OF_AUTOREGRESSIVE)), *(name for name, value in given.items() if value)]
        if diffusion:
            raise UserError(
                f"{type(model).__name__} is not a masked diffusion model; leave out {', '.join(sorted(diffusion))}."
            )
        plain = AutoregressiveSettings(**settings)
        return _continue(model, input_ids, attention_mask, plan, gen_length, seed, stop_at_eos, plain)
    chosen = family_of(model, family)
    if compile and settings.get("compat"):
        raise UserError(f"compat={settings['compat']!r} repeats the official arithmetic; leave out compile=True.")
    eos = end_of_text(model) if stop_at_eos and not settings.get("compat") else None
    own = {"gen_length": gen_length, "seed": seed, "eos_token_id": eos, **_own_block(model, chosen, gen_length)}
    resolved = chosen.settings.of({**own, **settings})
    return _diffuse(model, input_ids, attention_mask, plan, chosen, resolved, on_step, others, compile)


_OF_AUTOREGRESSIVE = AutoregressiveSettings.__dataclass_fields__


def _continue(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    plan: Plan | None,
    gen_length: int,
    seed: int,
    stop_at_eos: bool,
    settings: AutoregressiveSettings,
) -> Generated:
    """Token by token."""
    if kind_of(model) == "block diffusion":
        raise UserError(
            f"{type(model).__name__} has a sampler of its own; call its `generate` in `with sw.skip(model, plan)`."
        )
    if not hasattr(model, "generate"):
        raise UserError(f"{type(model).__name__} cannot generate text: it is neither autoregressive nor diffusion.")
    if plan and not plan.is_static:
        raise UserError(
            "A plan with several phases needs denoising steps; an autoregressive model takes a static plan."
        )
    if gen_length < 1:
        raise UserError(f"gen_length={gen_length}: {type(model).__name__} writes at least 1 token behind the prompt.")
    prices = price_blocks(model, Size(tokens=input_ids.shape[1] + gen_length))
    with skip(model, plan) if plan else nullcontext():
        began = time.perf_counter()
        sequences = decode_autoregressive(
            model, input_ids, attention_mask, gen_length, seed=seed, stop_at_eos=stop_at_eos, settings=settings
        )
        _synchronize(sequences.device)
        seconds = time.perf_counter() - began
        cut, cached = cut_now(model), runs_with_cache(model)
    batch, prompt = input_ids.shape
    new = sequences.shape[1] - prompt
    return Generated(sequences, _statistics(prices, cut, cached, batch, prompt, new, seconds))


def family_of(model: nn.Module, name: str | None = None) -> Family:
    """The sampler of this name, by default the model's own. Raises UserError for a name that is none."""
    name = name or fact(model, "family")
    if name not in FAMILIES:
        raise unknown("decoding family", name, FAMILIES)
    return FAMILIES[name]


def _own_block(model: nn.Module, family: Family, gen_length: int) -> dict[str, int]:
    """The block length that the model was made for, where it says one and its sampler knows any."""
    length = fact(model, "block_length")
    known = "block_length" in {field.name for field in fields(family.settings)}
    return {"block_length": length} if length and known and gen_length else {}


def _length(gen_length: int | None, max_new_tokens: int | None) -> int:
    if gen_length is not None and max_new_tokens not in (None, gen_length):
        raise UserError(f"gen_length={gen_length} and max_new_tokens={max_new_tokens} are the same; give one of them.")
    given = [length for length in (gen_length, max_new_tokens) if length is not None]
    return given[0] if given else GEN_LENGTH


def _diffuse(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    plan: Plan | None,
    family: Family,
    settings: Settings,
    on_step: Callable[[Step], None] | None,
    others: Mapping[str, nn.Module] | None,
    compile: bool,
) -> Generated:
    tokens = input_ids.shape[0] * (input_ids.shape[1] + settings.gen_length)
    with denoising(model, plan, others, on_step, compile=compile) as denoiser, worthwhile_threads(model, tokens):
        began = time.perf_counter()
        sequences = family.decode(denoiser, input_ids, settings, attention_mask)
        _synchronize(sequences.device)
        seconds = time.perf_counter() - began
    shares = account(denoiser)
    total = sum(shares.values(), Share())
    flops = total.block_flops, total.all_in_flops, total.whole_all_in_flops
    warmup = denoiser.compiled.seconds if denoiser.compiled else 0.0
    return Generated(
        sequences, Statistics(total.forwards, *flops, seconds - warmup, shares, warmup, total.spared_flops)
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _statistics(
    prices: Prices, cut: Cut, cached: bool, batch: int, prompt: int, new: int, seconds: float
) -> Statistics:
    """FLOPs of decoding with a KV cache or without, from the prices of one forward at the full length.

    The last new token is never run through the model, so prompt + new - 1 positions are, with a cache each once; the
    prompt's attend to the whole prompt at once, each later one to all before it and itself. Without a cache each
    forward runs all positions anew. The head runs on the last prompt position and each later one.
    """
    last = prompt + new - 1
    length = prices.size.tokens if prices.size else last
    lengths = range(prompt, last + 1)
    positions = last if cached else sum(lengths)
    pairs = prompt**2 + sum(lengths[1:]) if cached else sum(each**2 for each in lengths)

    def blocks(cut: Cut) -> int:
        price = prices.of_blocks(cut.skipped, cut.linear)
        linear = (price.flops - price.attention_flops) * positions // length
        return linear + price.attention_flops * pairs // length**2

    head = prices.outside.flops * new // length
    return Statistics(
        forwards=new,
        block_flops=batch * blocks(cut),
        all_in_flops=batch * (blocks(cut) + head),
        whole_all_in_flops=batch * (blocks(Cut()) + head),
        seconds=seconds,
    )
