"""The task `Writing`: a model writes, a judge reads: generative perplexity, and beside it how varied the texts are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.errors import UserError, unknown
from skipwise.evaluation.diversity import distinct, token_entropy
from skipwise.evaluation.judge import RULES, Judge
from skipwise.evaluation.likelihood import pad
from skipwise.evaluation.measure import Measured
from skipwise.models import fact, kind_of
from skipwise.sampling.autoregressive import AutoregressiveSettings, decode_autoregressive
from skipwise.sampling.canvas import Settings
from skipwise.sampling.denoiser import Denoiser
from skipwise.sampling.generate import FAMILIES

AUTOREGRESSIVE = "autoregressive"
OWN = {"gen_length", "steps", "seed"}  # settings of samplers that are fields of the task
NOTHING = 1e-6  # weight, in tokens, of a sample that holds no text


def family_of(model: nn.Module) -> str:
    """The family of samplers that a model is decoded with unless another is asked for.

    Raises UserError for a model that does not write text.
    """
    kind = kind_of(model)
    if kind not in ("masked diffusion", AUTOREGRESSIVE):
        raise UserError(
            f"{type(model).__name__} is of the kind {kind!r} and does not write text; give a language model."
        )
    return AUTOREGRESSIVE if kind == AUTOREGRESSIVE else fact(model, "family")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Samples of a stream of texts that a model writes, read by a judge.

    judge: name of the judge, see `Judge.load`; judge_dtype: of its weights. samples: how many, from number `first` of
    the stream on: sample i is drawn under seed + i, whatever the batch is. length: new tokens of a sample; steps: of
    denoising, the family's default when left out. prefixes: texts that samples continue, one after the other; prefixes
    stay and are not scored; without any, samples begin from nothing but masks (an autoregressive model: from its
    begin-of-text token). To a model of relative positions all masks are alike then, so that a sampler that goes by
    confidence alone leaves their order to rounding, which batches do change. family: of the sampler, see `family_of`;
    settings: its other settings, such as sampler or noise_dtype of MDLM's; temperature is 1 where the family has one.
    end_of_text: a rule of `RULES`.
    Raises UserError for settings that the family does not take.
    """

    judge: str
    samples: int = 64
    first: int = 0
    length: int = 128
    steps: int | None = None
    batch_size: int = 16
    seed: int = 0
    prefixes: tuple[str, ...] = ()
    family: str = "mdlm"
    settings: Mapping[str, Any] = field(default_factory=dict)
    end_of_text: str = "cut"
    judge_dtype: str | None = "float32"
    name: str = "writing"

    def __post_init__(self) -> None:
        for what in ("samples", "length", "batch_size"):
            if getattr(self, what) < 1:
                raise UserError(f"{what}={getattr(self, what)}; at least 1 is needed.")
        if self.first < 0:
            raise UserError(f"first={self.first}; samples are numbered from 0.")
        if self.end_of_text not in RULES:
            raise unknown("end-of-text rule", self.end_of_text, RULES)
        if not all(prefix.strip() for prefix in self.prefixes):
            raise UserError("A prefix is empty; give text to continue, or no prefixes at all.")
        self._resolve()

    @property
    def tokens(self) -> int:
        """Length of what is written; a prefix, whose length depends on the tokenizer, is not counted."""
        return self.length

    @property
    def facts(self) -> dict[str, Any]:
        """What the scores depend on besides model and plan."""
        resolved = self._resolve()
        others = {f.name: getattr(resolved, f.name) for f in fields(resolved) if f.name not in OWN}
        return {
            "judge": self.judge,
            "judge_dtype": self.judge_dtype or "the checkpoint's",
            "end_of_text": RULES[self.end_of_text],
            "family": self.family,
            "sampler": _sampler(resolved),
            "noise_dtype": _noise_dtype(resolved),
            "samples": self.samples,
            "first": self.first,
            "seed": self.seed,
            "length": self.length,
            "steps": self._steps(resolved),
            "prefixes": len(self.prefixes),
            "prefixes_sha256": _fingerprint(self.prefixes),
            "settings": {key: value for key, value in others.items() if isinstance(value, str | int | float)},
        }

    def run(self, denoiser: Denoiser, tokenizer: Any) -> list[Measured]:
        """Generative perplexity, token entropy in nats, distinct-2, and tokens scored, of every sample.

        Raises UserError, before anything is written, for a judge that is none.
        """
        judge = self.judge_for(denoiser.model)
        return self.score(self.write(denoiser, tokenizer), tokenizer, judge)

    def judge_for(self, model: nn.Module) -> Judge:
        """The judge, on the device of the model that writes."""
        return Judge.load(self.judge, str(next(model.parameters()).device), self.judge_dtype)

    def write(self, denoiser: Denoiser, tokenizer: Any) -> Tensor:
        """(samples, length): new tokens, on the CPU, nothing dropped; an autoregressive model's filled up with ends."""
        if tokenizer is None:
            raise UserError("Writing needs the model's tokenizer, and this model came without one.")
        kind = kind_of(denoiser.model)
        if (kind == AUTOREGRESSIVE) != (self.family == AUTOREGRESSIVE):
            raise UserError(
                f"family={self.family!r} does not decode {type(denoiser.model).__name__} ({kind}); "
                f"choose family={family_of(denoiser.model)!r}."
            )
        numbers = range(self.first, self.first + self.samples)
        # official random numbers and transformers' belong to a whole batch, so that each sample is drawn by itself
        size = 1 if self.family == AUTOREGRESSIVE or self.settings.get("compat") else self.batch_size
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        write = self._continue if self.family == AUTOREGRESSIVE else self._denoise
        return torch.cat([write(denoiser, tokenizer, batch) for batch in batches])

    def texts(self, ids: Tensor, tokenizer: Any) -> list[str]:
        """What samples `ids` (samples, length), as `write` gives them, say by the end-of-text rule, without prefix."""
        said = self._said(ids, tokenizer)
        prompts = (self._prompt(tokenizer, number) for number in range(self.first, self.first + len(ids)))
        return [self._text(tokenizer, prompt, new) for prompt, new in zip(prompts, said, strict=True)]

    def score(self, ids: Tensor, tokenizer: Any, judge: Judge | None = None) -> list[Measured]:
        """The metrics of `run` of samples `ids` (samples, length), as `write` gives them. judge: `judge_for` a model.

        A sample that holds no text has next to no weight in the perplexity; where there is nothing but such samples,
        the perplexity is that of guessing, the size of the judge's vocabulary.
        """
        judge = judge or Judge.load(self.judge, dtype=self.judge_dtype)
        texts, said = self.texts(ids, tokenizer), self._said(ids, tokenizer)
        prefixes = [self.prefix(self.first + i) for i in range(len(ids))]
        nll, tokens = judge.score(texts, prefixes, self.end_of_text)
        empty = tokens == 0
        guess = NOTHING * np.log(judge.vocabulary)
        ones = np.ones(len(ids))
        return [
            Measured("generative perplexity", np.where(empty, guess, nll), np.where(empty, NOTHING, tokens), True),
            Measured("token entropy", np.array([token_entropy(new) for new in said]), ones),
            Measured("distinct-2", np.array([distinct(new, 2) for new in said]), ones),
            Measured("tokens scored", tokens, ones),
        ]

    def _resolve(self, seed: int | None = None) -> Settings | AutoregressiveSettings:
        """The sampler's settings. Raises UserError for those that it does not take."""
        for key in OWN & set(self.settings):
            raise UserError(f"{key} is not a setting of the sampler here; give {key.removeprefix('gen_')} itself.")
        if self.family == AUTOREGRESSIVE:
            return self._resolve_autoregressive()
        if self.family not in FAMILIES:
            raise unknown("decoding family", self.family, [*FAMILIES, AUTOREGRESSIVE])
        kind = FAMILIES[self.family].settings
        warm = {"temperature": 1.0} if "temperature" in {f.name for f in fields(kind)} else {}
        own = {"gen_length": self.length, "steps": self.steps, "seed": self.seed if seed is None else seed}
        return kind.of({**warm, **self.settings, **own})

    def _resolve_autoregressive(self) -> AutoregressiveSettings:
        if self.steps is not None:
            raise UserError(f"steps={self.steps}: an autoregressive model writes a token a forward; leave out steps.")
        for key in set(self.settings) - {"temperature"}:
            raise unknown("setting of an autoregressive model", key, ["temperature"])
        return AutoregressiveSettings(**{"temperature": 1.0, **self.settings})

    def _steps(self, resolved: Settings | AutoregressiveSettings) -> int | str:
        if self.steps is not None:
            return self.steps
        sampler = getattr(resolved, "sampler", None)
        if sampler is None:
            return "one a token"
        return "continuous time" if sampler == "first_hitting" else 1000

    def _denoise(self, denoiser: Denoiser, tokenizer: Any, numbers: range) -> Tensor:
        prompts = [self._prompt(tokenizer, number) for number in numbers]
        device = next(denoiser.model.parameters()).device
        ids, present = (tensor.to(device) for tensor in pad(prompts, left=True))
        mask = None if bool(present.all()) else present.long()
        settings = self._resolve(self.seed + numbers[0])
        return FAMILIES[self.family].decode(denoiser, ids, settings, mask)[:, ids.shape[1] :].cpu()

    def _continue(self, denoiser: Denoiser, tokenizer: Any, numbers: range) -> Tensor:
        prompt = self._prompt(tokenizer, numbers[0]) or _beginning(tokenizer)
        settings = self._resolve()
        assert isinstance(settings, AutoregressiveSettings)
        ids = torch.tensor([prompt], device=next(denoiser.model.parameters()).device)
        seed, end = self.seed + numbers[0], tokenizer.eos_token_id
        whole = decode_autoregressive(denoiser.model, ids, None, self.length, seed=seed, settings=settings)
        new = whole[:, len(prompt) :]
        return F.pad(new.cpu(), (0, self.length - new.shape[1]), value=0 if end is None else end)

    def prefix(self, number: int) -> str:
        """What sample `number` of the stream continues; empty where there are no prefixes."""
        return self.prefixes[number % len(self.prefixes)] if self.prefixes else ""

    def _prompt(self, tokenizer: Any, number: int) -> list[int]:
        return tokenizer(self.prefix(number))["input_ids"] if self.prefixes else []

    def _said(self, ids: Tensor, tokenizer: Any) -> list[list[int]]:
        """The tokens of every sample that count by the end-of-text rule."""
        rows = ids.tolist()
        if self.end_of_text == "mdlm":
            return rows
        begin = None if self.prefixes else tokenizer.bos_token_id
        return [until_end(row, tokenizer.eos_token_id, begin) for row in rows]

    def _text(self, tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
        """`new` tokens in words, decoded behind the prompt: some tokenizers drop the space that a text begins with."""
        skip = self.end_of_text != "mdlm"

        def decode(ids: Sequence[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

        before, whole = decode(prompt), decode([*prompt, *new])
        return whole[len(before) :] if whole.startswith(before) else decode(new)


def until_end(ids: Sequence[int], eos: int | None, begin: int | None = None) -> list[int]:
    """The tokens before the first end of text. A first token that is `begin` opens the text, even if it is `eos` too.

    MDLM's texts begin so: GPT-2's tokenizer has one token for both.
    """
    found = list(ids[1:]) if begin is not None and len(ids) and ids[0] == begin else list(ids)
    return found[: found.index(eos)] if eos in found else found


def _beginning(tokenizer: Any) -> list[int]:
    """What an autoregressive model begins from where there is no prefix."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise UserError("The tokenizer has no token to begin a text with; give prefixes to continue.")


def _fingerprint(prefixes: Sequence[str]) -> str | None:
    return hashlib.sha256(json.dumps(prefixes).encode()).hexdigest() if prefixes else None


def _sampler(settings: Settings | AutoregressiveSettings) -> str:
    """The part of the settings that names the algorithm."""
    if isinstance(settings, AutoregressiveSettings):
        return "token by token"
    names = (getattr(settings, key, None) for key in ("sampler", "remasking", "alg"))
    return next(name for name in names if name is not None)


def _noise_dtype(settings: Settings | AutoregressiveSettings) -> str:
    """Of the Gumbel noise that tokens are drawn with."""
    if getattr(settings, "temperature", 1.0) == 0:
        return "none (greedy)"
    if isinstance(settings, AutoregressiveSettings) or (settings.family == "dream" and settings.compat):
        return "none (torch.multinomial)"
    return str(getattr(settings, "dtype", torch.float64)).removeprefix("torch.")
