"""What each exact trick of decoding brings alone: with all of them but one, against all. A section of speed.py.

A trick is switched off by putting what it replaced in its place. Where one would hide another, the other is switched
off on both sides.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from pairs import Prompts, Row, Run, Turns, compare, facts_of, ours
from subjects import llada_shape, random_prompts, zoo_prompts
from torch import Tensor

import skipwise as sw
from skipwise.models import bidirectional, heads, lean, linear
from skipwise.models.bidirectional import kept
from skipwise.models.lean import run
from skipwise.sampling import prediction
from skipwise.sampling.canvas import Canvas
from skipwise.sampling.denoiser import Denoiser
from skipwise.sampling.noise import Feed, Noise
from skipwise.sampling.prediction import Prediction

Switch = Callable[[], AbstractContextManager[Any]]


def every_logit() -> AbstractContextManager[Any]:
    """Logits of all positions."""
    predict = Denoiser.predict

    def whole(self: Denoiser, step: Any, inputs: Tensor, mask: Any, where: Any, **others: Any) -> Prediction:
        logits = predict(self, step, inputs, mask, None, **others).logits()
        return Prediction(logits[where], lambda logits: logits, logits.shape[-1])

    return patch.object(Denoiser, "predict", whole)


def wide_last_block() -> AbstractContextManager[Any]:
    """The last block runs all positions."""

    def wide(trunk: Any, ids: Tensor, mask: Any, past: Any, where: Any, *others: Any) -> Tensor:
        return kept(run(trunk, ids, mask, past, None, *others), where)

    return patch.object(bidirectional, "run", wide)


def long_forward() -> AbstractContextManager[Any]:
    """transformers' own forward of the decoder."""
    return patch.object(bidirectional, "is_lean", lambda *_: False)


def default_products() -> AbstractContextManager[Any]:
    """Matrix products by what torch takes by default."""
    return patch.object(linear, "PREFERRED", False)


def dense_mask() -> AbstractContextManager[Any]:
    """A mask of every query's own keys, written out at every forward."""

    def dense(mask: Tensor | None, config: Any) -> Tensor | None:
        return None if mask is None else mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1).contiguous()

    return patch.object(bidirectional, "key_mask", dense)


def head_as_it_is() -> AbstractContextManager[Any]:
    """A head's weight in torch's own order."""
    return patch.object(heads, "LARGE", 2**62)


def number_by_number() -> AbstractContextManager[Any]:
    """The largest logit by torch's argmax."""
    return patch.object(prediction, "MANY", 2**62)


def found_anew() -> AbstractContextManager[Any]:
    """Every forward finds out by itself what it can leave out, and where its positions are."""
    return patch.object(Denoiser, "_is_overheard", lambda *_: True)


def repeated_tables() -> AbstractContextManager[Any]:
    """Rotary tables of one head."""
    return patch.object(lean, "SPREAD", 0)


def noise_everywhere() -> AbstractContextManager[Any]:
    """Noise for all positions of the window."""

    def feed(self: Noise, draws: Any, words: int, where: Any, rows: Any, window: Any = None, **others: Any) -> Feed:
        return Feed(iter([self.uniform(draws, words, window=window, rows=rows, **others)[where]]))

    return patch.object(Noise, "feed", feed)


def ended_rows_run() -> AbstractContextManager[Any]:
    """Rows that have ended are run until the last has."""
    going = Canvas.going
    return patch.object(Canvas, "going", lambda self, rows, eos, together=False: going(self, rows, eos, True))


@dataclass(frozen=True)
class Trick:
    """A trick, what is done without it, and what it is measured at. both: off on both sides."""

    name: str
    off: Switch
    model: str
    prompts: Prompts
    settings: dict[str, Any]
    both: tuple[Switch, ...] = field(default=())

    def rows(self, model: Any, turns: Turns) -> Iterator[Row]:
        """Without it, and with it."""

        def under(which: Run, *switches: Switch) -> Run:
            def call() -> Tensor:
                with ExitStack() as stack:
                    for switch in switches:
                        stack.enter_context(switch())
                    return which.call()

            return Run(which.name, call)

        without = under(ours("without", model, self.prompts, **self.settings), *self.both, self.off)
        with_it = under(ours(self.name, model, self.prompts, **self.settings), *self.both)
        gen, steps = self.settings["gen_length"], self.settings.get("steps", self.settings["gen_length"])
        yield from compare(without, [with_it], turns, facts_of(self.model, self.prompts, gen, steps))


def padded(prompts: Prompts) -> Prompts:
    """Row r lacks its first 8 r tokens."""
    mask = torch.ones_like(prompts.ids)
    for row in range(len(mask)):
        mask[row, : min(8 * row, mask.shape[1] - 1)] = 0
    return Prompts(prompts.ids.masked_fill(mask == 0, 0), mask)


def tricks(tokenizer: Any, quick: bool) -> Iterator[Trick]:
    """Each where it matters: head and products on the shape, calls of kernels on an embedded model."""
    shape, one, four = "LLaDA shape", random_prompts(1, 8 if quick else 128), random_prompts(4, 8 if quick else 128)
    long = {"gen_length": 64 if quick else 128, "steps": 4 if quick else 16, "block_length": 32}
    few = {**long, "steps": 4}
    task, tasks = zoo_prompts(tokenizer, 1, False), zoo_prompts(tokenizer, 16, False)
    short = {"gen_length": 4 if quick else 32}
    yield Trick("logits where a token can be committed", every_logit, shape, one, long, (wide_last_block,))
    yield Trick("the last block there alone", wide_last_block, shape, one, long)
    yield Trick("oneDNN's products", default_products, shape, one, long)
    yield Trick("a packed head", head_as_it_is, shape, one, long)
    yield Trick("the largest by runs", number_by_number, shape, one, long)
    yield Trick("noise where a token can be committed", noise_everywhere, shape, one, {**few, "temperature": 1.0})
    yield Trick("one mask of the keys", dense_mask, shape, padded(four), few, (long_forward,))
    yield Trick("fewer operations", long_forward, "tiny-dllm", task, short, (wide_last_block,))
    yield Trick("fewer operations", long_forward, "tiny-dllm", tasks, short, (wide_last_block,))
    for prompts in (task, tasks):
        yield Trick("a generation's workspace", found_anew, "tiny-dllm", prompts, short)
        yield Trick("rotary tables of all heads", repeated_tables, "tiny-dllm", prompts, short)
    yield Trick("oneDNN's products", default_products, "tiny-dllm", tasks, short)
    # the tasks' answers have no end, so a digit is taken for it
    ends = {"gen_length": 4 if quick else 14, "block_length": 2, "eos_token_id": tokenizer.convert_tokens_to_ids("4")}
    yield Trick("rows that have ended leave", ended_rows_run, "tiny-dllm", tasks, ends)


def exact(options: argparse.Namespace) -> Iterator[Row]:
    """The section."""
    embedded, tokenizer = sw.load("tiny-dllm")
    models = {"tiny-dllm": embedded, "LLaDA shape": llada_shape(options.quick)}
    for trick in tricks(tokenizer, options.quick):
        yield from trick.rows(models[trick.model], Turns.of(options, 7 if trick.model == "tiny-dllm" else 3))
