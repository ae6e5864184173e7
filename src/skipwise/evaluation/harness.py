"""lm-eval's model `skipwise`: any of its tasks on any language model that `skipwise.load` takes, under a plan.

lm-eval finds models by a table of its own, without entry points, so that its command does not know this one. Importing
this module registers it. `skipwise lm-eval ARGUMENTS` does that and hands the arguments to lm-eval's command line; in
Python, `import skipwise.evaluation.harness` comes before `lm_eval.simple_evaluate(model="skipwise", ...)`.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models import utils as lm_eval_models
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from skipwise.cost import estimate
from skipwise.errors import UserError
from skipwise.evaluation.arguments import check_peft, largest_batch, load_model, longest, read_batch_size, with_peft
from skipwise.evaluation.distributed import Distributed
from skipwise.evaluation.likelihood import Likelihood, LikelihoodSettings, Request, loglikelihoods, pad
from skipwise.examples import Size
from skipwise.identity import identity
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.sampling import generate
from skipwise.sampling.others import load_others
from skipwise.skipping import skip
from skipwise.versions import versions

GEN_LENGTH = 256  # new tokens where neither model_args nor the task say; lm-eval's own default
PRICED_TOKENS = 1024  # length that the saved all-in FLOPs are reported for, or the longest that the model takes
FINGERPRINT = "skipwise"  # key, in lm-eval's cache of answers, of what the answers depend on

logger = logging.getLogger(__name__)


class _TrialOverError(Exception):
    """Ends a trial of settings before its first forward."""


@register_model("skipwise")
class SkipwiseLM(Distributed, TemplateLM):
    """A language model under a plan. Every argument may stand in lm-eval's `--model_args`.

    pretrained: what `skipwise.load` takes (an embedded name, a folder, a hub id, a GGUF file), or a loaded model.
    plan: a plan file. tokenizer, dtype, device, revision: of `load`; dtype=auto is the checkpoint's own. peft: a folder
    with an adapter as peft writes it, merged into the weights. batch_size: prompts or masked inputs a forward; auto is
    the largest that fits, up to max_batch_size. max_length: tokens of prompt and answer; a longer prompt loses its
    beginning. seed: of masks and sampling noise.
    add_bos_token: begin every text with the tokenizer's begin of text (its end where it has none, as lm-eval does), or
    never; as the tokenizer does by default.
    escape_until: do not cut a generation at a task's `until` strings, only at its end of text; with add_bos_token it is
    how Dream's official evaluation runs.
    mc_num, chain, greedy: of likelihoods of masked diffusion models (`LikelihoodSettings`).
    All others, such as gen_length, steps, block_length, temperature, go to `skipwise.generate`, and cfg_scale and
    compat to likelihoods too. They win over a task's generation_kwargs, gen_length over its max_gen_toks.
    Raises UserError for what does not fit the model, before any request is run.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: str | Plan | None = None,
        tokenizer: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        peft: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        escape_until: bool = False,
        seed: int = 0,
        **settings: Any,
    ):
        super().__init__()
        if settings.pop("trust_remote_code", False):
            raise UserError("trust_remote_code=True: remote code is never run; leave it out.")
        self._bare, self._peft = Plan.load(plan) if isinstance(plan, str) else plan, peft
        check_peft(self._bare, peft)
        rows = read_batch_size(batch_size)
        self.join_processes()
        device = str(self.accelerator.device) if self.accelerator else device
        self.name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self.model, self.tokenizer = load_model(pretrained, tokenizer, dtype, device, revision)
        self._device = next(self.model.parameters()).device
        self.kind = kind_of(self.model)
        self.max_length = max_length or longest(self.model.config, self.tokenizer)
        self.batch_size = rows or largest_batch(self.model, self.max_length, max_batch_size)
        self.add_bos_token, self.escape_until = add_bos_token, escape_until
        self.seed, self.settings = seed, settings
        self.likelihood = self._likelihood_settings()
        self.generated: Counter[str] = Counter()
        self._try_settings()

    @cached_property
    def plan(self) -> Plan | None:
        """What runs, with peft's adapter, read when the model is first asked: a training may still write it."""
        return with_peft(self._bare, self.model, self._peft) if self._peft else self._bare

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "SkipwiseLM":
        """Model arguments win over lm-eval's own options, which always bring a batch size."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**given | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "SkipwiseLM":
        """`create_from_arg_obj` of `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _likelihood_settings(self) -> LikelihoodSettings:
        given = {name: self.settings.pop(name) for name in ("mc_num", "chain", "greedy") if name in self.settings}
        if given and self.kind != "masked diffusion":
            raise UserError(f"{self.name} is not a masked diffusion model; leave out {', '.join(given)}.")
        compat = self.settings.get("compat")
        return LikelihoodSettings(
            **given,
            batch_size=self.batch_size,
            seed=self.seed,
            cfg_scale=self.settings.get("cfg_scale", 0.0),
            compat=compat if compat in ("llada", "dream") else None,  # other families' are about sampling alone
        )

    def _try_settings(self) -> None:
        """Let `generate` say now what it would say about the plan and the settings at the first batch."""
        if self.kind not in ("masked diffusion", "autoregressive"):
            raise UserError(f"{self.name} is of the kind {self.kind!r}; lm-eval needs a language model.")
        trial: dict[str, Any] = {"gen_length": self.settings.get("block_length") or 1, **self.settings}
        if self.kind == "masked diffusion":
            trial["on_step"] = _end_trial
        else:
            trial["gen_length"] = 1
        self._room(self.settings.get("gen_length", 0))
        with suppress(_TrialOverError):
            generate(self.model, torch.tensor([[self.prefix_token_id]], device=self.device), plan=self._bare, **trial)

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the tokenizer's begin, or else its end of text."""
        token = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id
        if token is None:
            raise UserError(f"{self.name}'s tokenizer has neither a begin nor an end of text; give another tokenizer.")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text already begins with one.

        With add_bos_token it is the prefix token alone, or nothing, that is added.
        """
        if add_special_tokens is None and self.add_bos_token is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        begins = self.add_bos_token and add_special_tokens is None and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id, *ids] if begins else ids

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template. Raises UserError when it has none."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.name}'s tokenizer has no chat template; leave out --apply_chat_template.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[Likelihood]:
        """requests: ((context, continuation), their tokens, their tokens)."""
        # an autoregressive model is not shown the last token
        room = self.max_length + (self.kind == "autoregressive")
        tokens = [_fit(context, target, room) for _, context, target in requests]
        with self._bar(len(requests), "loglikelihood", disable_tqdm) as bar:

            def keep(number: int, result: Likelihood) -> None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update()

            return self._likelihoods(tokens, keep)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length as lm-eval cuts them, each after the last token of the one before.

        For a masked diffusion model a window's value is its bound given that context, and their sum is a bound for the
        text. It is no perplexity that compares with an autoregressive model's, which is exact.
        """
        longest = self.max_length - (self.kind == "masked diffusion")  # the token of context has a place of its own
        windows = [
            (number, make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self._whole_text(request.args[0]), self.prefix_token_id, longest, context_len=1
            )
        ]
        totals, left = [0.0] * len(requests), Counter(number for number, _ in windows)
        with self._bar(len(windows), "loglikelihood_rolling", disable_tqdm) as bar:

            def keep(window: int, result: Likelihood) -> None:
                number = windows[window][0]
                totals[number] += result[0]
                left[number] -= 1
                if not left[number]:
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, totals[number])
                bar.update()

            self._likelihoods([window for _, window in windows], keep)
        return totals

    def _whole_text(self, text: str) -> list[int]:
        """Token ids of a text that `prefix_token_id` is put before, which is the begin of text where there is one."""
        return self.tok_encode(text, add_special_tokens=False if self.add_bos_token else None)

    def _likelihoods(
        self, requests: Sequence[Request], on_result: Callable[[int, Likelihood], None]
    ) -> list[Likelihood]:
        if self.plan and not self.plan.is_static:
            raise UserError("A plan with several phases needs denoising steps; log-likelihoods take a static plan.")
        with skip(self.model, self.plan) if self.plan else nullcontext():
            return loglikelihoods(self.model, requests, self.likelihood, on_result)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each cut at its end of text and at the first of its `until` strings.

        Prompts with the same settings are batched, longest first, padded on the left.
        """
        texts = [""] * len(requests)
        with self._bar(len(requests), "generate_until", disable_tqdm) as bar:
            for arguments, numbers in _same_arguments(requests):
                until, settings = self._generation(arguments)
                prompts = {number: self._prompt(requests[number].args[0], settings) for number in numbers}
                numbers.sort(key=lambda number: -len(prompts[number]))
                for start in range(0, len(numbers), self.batch_size):
                    part = numbers[start : start + self.batch_size]
                    # request number `start` of a group draws its own noise, so that repeats of a prompt differ
                    seed = self.seed + 2**20 * self.rank + start
                    found = self._complete([prompts[number] for number in part], until, settings | {"seed": seed})
                    for number, text in zip(part, found, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                        bar.update()
        return texts

    def _generation(self, arguments: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """A task's generation_kwargs -> its `until` strings and the settings of `generate`."""
        given: dict[str, Any] = dict(lm_eval_models.normalize_gen_kwargs(arguments, GEN_LENGTH))
        until = lm_eval_models.handle_stop_sequences(given.pop("until"), eos=self.tokenizer.eos_token)
        until = [] if self.escape_until else until
        given.pop("do_sample")
        settings = {"gen_length": given.pop("max_gen_toks"), **given, **self.settings}
        if not settings.get("temperature"):
            settings.pop("temperature", None)  # greedy is every sampler's default; not every one takes a temperature
        return until, settings

    def _room(self, gen_length: int) -> int:
        """Tokens that a prompt may have."""
        if gen_length < self.max_length:
            return self.max_length - gen_length
        raise UserError(
            f"gen_length={gen_length} leaves no room for a prompt in max_length={self.max_length}; "
            "set gen_length in model_args."
        )

    def _prompt(self, context: str, settings: dict[str, Any]) -> list[int]:
        room = self._room(settings["gen_length"])
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            logger.warning("A prompt of %d tokens loses its beginning: there is room for %d.", len(tokens), room)
        return tokens[-room:]

    def _complete(self, prompts: list[list[int]], until: list[str], settings: dict[str, Any]) -> list[str]:
        ids, present = pad(prompts, left=True, fill=self.tokenizer.pad_token_id or 0)
        length = ids.shape[1]
        if until and kind_of(self.model) == "autoregressive":  # a diffusion model writes all of its text at once
            criteria = stop_sequences_criteria(self.tokenizer, until, length, len(prompts))
            settings = settings | {"stopping_criteria": criteria}
        out = generate(
            self.model, ids.to(self.device), plan=self.plan, attention_mask=present.long().to(self.device), **settings
        )
        took = {key: value for key, value in asdict(out.stats).items() if key != "by_model"}
        self.generated.update({"texts": len(prompts), **took})
        return [self._text(tokens, until) for tokens in out.sequences[:, length:]]

    def _text(self, tokens: Tensor, until: list[str]) -> str:
        row = tokens.tolist()
        end = min((row.index(token) for token in self._ends if token in row), default=None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
        return lm_eval_models.postprocess_generated_text(text, until, None)

    @property
    def _ends(self) -> set[int]:
        """All tokens that end a text, by the tokenizer and by the model's configs."""
        configs = (self.tokenizer, self.model.config, getattr(self.model, "generation_config", None))
        found = [getattr(config, "eos_token_id", None) for config in configs]
        return {token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])}

    def _bar(self, total: int, what: str, disabled: bool) -> Any:
        return tqdm(total=total, desc=f"Running {what} requests", disable=disabled or self.rank > 0)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval keeps answers by request alone; a cache that another model or plan filled is refused here."""
        super().set_cache_hook(cache_hook)
        cache = cache_hook.dbdict
        if cache is None:
            return
        fingerprint = self.fingerprint
        if len(cache) and cache.get(FINGERPRINT) != fingerprint:
            raise UserError(
                f"The cache {cache.filename} holds the answers of another model, plan or settings; "
                "give --use_cache another path."
            )
        cache[FINGERPRINT] = fingerprint

    @property
    def fingerprint(self) -> str:
        """A hash of what answers depend on besides the request. batch_size counts where draws follow batches."""
        likelihood = self.likelihood if self.likelihood.compat else replace(self.likelihood, batch_size=1)
        settings = self.settings | asdict(likelihood) | {"max_length": self.max_length}
        settings |= {"texts": [self.add_bos_token, self.escape_until]}
        others = load_others(self.plan, self.model, self.tokenizer)
        parts = identity(self.model, self.plan, self.tokenizer, settings, others)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the config of its results.

        Saved FLOPs are fractions by formula; `generated` is what process 0 generated, in FLOPs as they happened and in
        measured seconds.
        """
        size = Size(tokens=min(PRICED_TOKENS, self.max_length))
        cost = estimate(self.model, self.plan, size, load_others(self.plan, self.model, self.tokenizer))
        info: dict[str, Any] = {
            "kind": self.kind,
            "plan": self.plan.model_dump(mode="json") if self.plan else None,
            "skipped": self.plan.describe() if self.plan else "run all blocks",
            "saved_block_flops": cost.saved_block_flops,
            "saved_head_flops": cost.saved_head_flops,
            "saved_all_in_flops": cost.saved_all_in_flops,
            "saved_all_in_flops_at_tokens": size.tokens,
            "settings": self.settings,
            "add_bos_token": self.add_bos_token,
            "escape_until": self.escape_until,
            "likelihood": asdict(self.likelihood),
            "generated": dict(self.generated),
            "versions": versions(),
        }
        first = next(self.model.parameters())
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model_num_parameters": count, "model_dtype": str(first.dtype), "skipwise": info}


def _end_trial(_: Any) -> None:
    raise _TrialOverError


def _fit(context: list[int], target: list[int], room: int) -> Request:
    """Cut the context from the left so that both fit."""
    if len(target) >= room:
        raise UserError(f"A continuation has {len(target)} tokens, more than fit in max_length; raise max_length.")
    return context[-(room - len(target)) :], target


def _same_arguments(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """(generation_kwargs, numbers of the requests that have them)."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    for numbers in groups.values():
        yield requests[numbers[0]].args[1], numbers
