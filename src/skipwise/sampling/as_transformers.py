"""transformers' `model.generate(...)` of the native models: its arguments, made into those of `skipwise.generate`."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from skipwise.errors import UserError
from skipwise.models import end_of_text, mask_token
from skipwise.sampling.denoiser import Step
from skipwise.sampling.generate import GEN_LENGTH, Family, family_of
from skipwise.sampling.generate import generate as decode
from skipwise.sampling.inputs import read_prompts

# what does not change which tokens come out, or is done otherwise here
IDLE = {"use_cache", "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version", "tokenizer"}
# what asks for nothing: None and False do so everywhere
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "top_p": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "logits_processor": [],
    "stopping_criteria": [],
}
OURS = {"plan", "gen_length", "seed", "stop_at_eos", "family", "others", "on_step", "compile"}


@torch.no_grad()
def generate(
    model: nn.Module,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    streamer: Any = None,
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`skipwise.generate` by the arguments of transformers' `generate`: (batch, prompt_length + new tokens).

    inputs or input_ids, attention_mask: as `skipwise.generate` takes them. generation_config and `options`, which come
    first: max_new_tokens, or max_length with the prompt; do_sample and temperature (do_sample=True alone is temperature
    1); eos_token_id; return_dict_in_generate; and all that `skipwise.generate` takes: seed, plan, and the settings of
    the family's sampler (steps, block_length, threshold ...). The model's own generation_config gives no more than a
    length: what it says about sampling is of autoregressive decoding. Draws are those of `seed`, 0 by default.
    streamer: gets the prompt (1, length), then the new tokens (n,), as soon as all before them are final.
    Raises UserError for what a denoising sampler cannot do, such as num_beams.
    """
    if (inputs is None) == (input_ids is None):
        raise UserError(f"{type(model).__name__}.generate takes prompts as input_ids, once: (batch, prompt_length).")
    ids, mask = read_prompts(model, inputs if input_ids is None else input_ids, attention_mask, token_type_ids)
    family = family_of(model, options.get("family"))
    asked = _asked(model, generation_config, options)
    as_dict = bool(asked.pop("return_dict_in_generate", False))
    asked["gen_length"] = _length(model, asked, ids.shape[1])
    asked |= _sampling(family, asked.pop("do_sample", None), asked.pop("temperature", None))
    _check_known(model, family, asked)
    stream = None if streamer is None else _Stream(model, streamer, ids, asked)
    if stream is not None:
        asked["on_step"] = stream.watching(asked.get("on_step"))
    sequences = decode(model, ids, attention_mask=mask, **asked).sequences
    if stream is not None:
        stream.end(sequences)
    return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences)) if as_dict else sequences


def _asked(model: nn.Module, config: GenerationConfig | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the call asks for by name, without what changes nothing."""
    given = {} if config is None else config.to_diff_dict()
    given |= options
    eos = given.pop("eos_token_id", None)
    if eos is not None:
        given["eos_token_id"] = _one(eos)
    return {key: value for key, value in given.items() if key not in IDLE and not _is_neutral(key, value)}


def _is_neutral(key: str, value: Any) -> bool:
    if value is None or (key in NEUTRAL and value == NEUTRAL[key]):
        return True
    return value is False and key not in ("do_sample", "stop_at_eos")


def _one(eos: Any) -> int:
    tokens = torch.as_tensor(eos).flatten().tolist()
    if len(tokens) != 1:
        raise UserError(f"eos_token_id={eos!r}: a denoising sampler ends a text at one token; give one.")
    return int(tokens[0])


def _length(model: nn.Module, asked: dict[str, Any], prompt: int) -> int:
    """New tokens: as the call says, or else the model's own generation config, or else as many as `generate` makes."""
    own = getattr(model, "generation_config", None)
    own = {key: getattr(own, key, None) for key in ("max_new_tokens", "max_length")}
    for source in (asked, own):
        for name in ("gen_length", "max_new_tokens"):
            if source.get(name) is not None:
                length = source[name]
                asked.pop("max_length", None), asked.pop("max_new_tokens", None)
                return length
        if source.get("max_length") is not None:
            longest = source["max_length"]
            asked.pop("max_length", None)
            if longest < prompt:
                raise UserError(f"max_length={longest} is less than the prompt's {prompt}; give max_new_tokens.")
            return longest - prompt
    return GEN_LENGTH


def _sampling(family: Family, do_sample: bool | None, temperature: float | None) -> dict[str, Any]:
    """The sampler's temperature, where it has one."""
    if "temperature" not in {field.name for field in fields(family.settings)}:
        if do_sample is False:
            raise UserError(f"do_sample=False: the {family.settings.family} sampler always draws; leave it out.")
        return {} if temperature in (None, 1.0) else {"temperature": temperature}
    if do_sample is None:
        return {} if temperature is None else {"temperature": temperature}
    if temperature is not None and bool(do_sample) != (temperature > 0):
        raise UserError(f"do_sample={do_sample} and temperature={temperature} contradict each other; give one of them.")
    return {"temperature": (1.0 if temperature is None else temperature) if do_sample else 0.0}


def _check_known(model: nn.Module, family: Family, asked: Mapping[str, Any]) -> None:
    """Raise UserError for what of transformers' arguments has no meaning here."""
    settings = {field.name for field in fields(family.settings)}
    foreign = [key for key in asked if key not in settings | OURS]
    if foreign:
        key = foreign[0]
        raise UserError(
            f"{type(model).__name__}.generate denoises and takes no {key}={asked[key]!r}; it takes max_new_tokens, "
            f"max_length, do_sample, {', '.join(sorted(OURS))} and its sampler's {', '.join(sorted(settings - OURS))}."
        )


class _Stream:
    """Hands a streamer the prompt and then each new token as soon as it and all before it are final."""

    def __init__(self, model: nn.Module, streamer: Any, ids: Tensor, asked: Mapping[str, Any]):
        if len(ids) != 1:
            raise UserError(f"A streamer follows one text and input_ids hold {len(ids)}; give one prompt.")
        self.streamer, self.prompt, self.sent, self.mask = streamer, ids.shape[1], 0, mask_token(model)
        self.eos = asked.get("eos_token_id", end_of_text(model))
        self.early = asked.get("tokens_hook") is None and not bool((ids == self.mask).any())
        if self.early:
            streamer.put(ids.cpu())

    def watching(self, on_step: Callable[[Step], None] | None) -> Callable[[Step], None]:
        """A callback of steps that also calls the caller's own."""

        def look(step: Step) -> None:
            if self.early:
                self._put(step.sequences[0, self.prompt :].cpu())
            if on_step is not None:
                on_step(step)

        return look

    def end(self, sequences: Tensor) -> None:
        """Hand over the rest."""
        if not self.early:
            self.streamer.put(sequences[:, : self.prompt].cpu())
        self._put(sequences[0, self.prompt :].cpu(), whole=True)
        self.streamer.end()

    def _put(self, new: Tensor, whole: bool = False) -> None:
        """What is new of `new` (tokens,) and has no mask before it; what follows the end of a text comes last."""
        open_ = (new == self.mask).nonzero()
        ready = len(new) if whole or not len(open_) else int(open_[0])
        ends = (new[:ready] == self.eos).nonzero() if self.eos is not None else open_[:0]
        if not whole and len(ends):
            ready = int(ends[0]) + 1
        if ready > self.sent:
            self.streamer.put(new[self.sent : ready])
            self.sent = ready
