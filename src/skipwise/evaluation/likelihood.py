"""Log-likelihoods of continuations, for masked diffusion and for autoregressive language models.

An autoregressive model gives the exact value. A masked diffusion model gives a lower bound, an expectation over masks
of the continuation (`skipwise.evaluation.masking`). It is computed exactly where the continuation has no more than
mc_num masks (one token is one forward; up to 7 tokens at 128), else estimated from mc_num of them. Requests are run
together in batches, longest first, and every distinct input is run once: the options A, B, C, D of a question are one
forward. Masks depend on the seed, the prefix and the continuation's length alone: neither batching nor order changes a
result, and equally long options of a question are compared under the same masks.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipwise.errors import UserError
from skipwise.evaluation.masking import Noised, chain_masks, dream_masks, every_mask, llada_masks, stratified_masks
from skipwise.models import end_of_text, fact, kind_of, mask_token
from skipwise.sampling.llada import guided
from skipwise.typed import check_types

Request = tuple[Sequence[int], Sequence[int]]  # tokens of the prefix, tokens of the continuation
Likelihood = tuple[float, bool]  # in nats; whether greedy decoding gives the continuation
CHUNK = 512  # positions whose float32 log-probabilities are held at once


@dataclass(frozen=True)
class LikelihoodSettings:
    """How to estimate. All but batch_size are for masked diffusion models; an autoregressive model is exact.

    mc_num: masked inputs a continuation, at most; batch_size: inputs a forward; seed: of the masks.
    chain: the exact likelihood of decoding from left to right instead of the bound, one input a token.
    greedy: find out whether greedy decoding, one token a forward, gives the continuation; without it the answer is
    always False. cfg_scale: classifier-free guidance against the input with a masked prefix; doubles the forwards.
    compat: "llada" or "dream" draw masks as the official evaluation does, from one stream of random numbers in the
    order of the requests, so that order and batch_size matter; Dream's also appends an end-of-text token.
    """

    mc_num: int = 128
    batch_size: int = 8
    seed: int = 0
    chain: bool = False
    greedy: bool = False
    cfg_scale: float = 0.0
    compat: Literal["llada", "dream"] | None = None

    def check(self) -> None:
        """Raise UserError for a setting that cannot be."""
        check_types(self)
        for name in ("mc_num", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small; it must be 1 or more.")
        if self.compat and self.chain:
            raise UserError(f"chain draws no masks; leave out compat={self.compat!r}.")
        if self.compat == "llada" and self.mc_num % self.batch_size:
            raise UserError(
                f"compat='llada' needs mc_num to be a multiple of batch_size, but {self.mc_num} is none of "
                f"{self.batch_size}; try batch_size=1."
            )


@torch.no_grad()
def loglikelihoods(
    model: nn.Module,
    requests: Sequence[Request],
    settings: LikelihoodSettings | None = None,
    on_result: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """The log-likelihood of every request's continuation after its prefix, in the order given.

    For a model under a plan, use it inside `with skip(model, plan)`. `on_result(number, likelihood)` is called as soon
    as a request is done. Raises UserError for a model that has no likelihood, and for an empty prefix where nothing
    predicts the first token.
    """
    settings = settings or LikelihoodSettings()
    settings.check()
    predictor = _Predictor(model, settings.cfg_scale)
    jobs = [_Job(number, tuple(prefix), tuple(target)) for number, (prefix, target) in enumerate(requests)]
    if predictor.needs_prefix and not all(job.prefix for job in jobs):
        raise UserError(f"Nothing predicts the first token of {type(model).__name__}; give every request a prefix.")
    if settings.greedy and not predictor.causal:
        for part in _batches(sorted(jobs, key=_longest_first), settings.batch_size):
            _check_greedy(predictor, part)
    inputs = _causal_inputs(jobs) if predictor.causal else _masked_inputs(jobs, predictor.mask, settings, model)
    for batch in _batches(inputs, settings.batch_size):
        for read, value, best in _score(predictor, batch):
            job = read.job
            job.value += read.weight * value
            job.greedy = best if predictor.causal else job.greedy
            job.left -= 1
            if on_result and not job.left:
                on_result(job.number, (job.value, job.greedy))
    for job in jobs:
        if on_result and not job.reads:  # nothing to predict
            on_result(job.number, (job.value, job.greedy))
    return [(job.value, job.greedy) for job in jobs]


@dataclass
class _Job:
    """A request and what is known of it; `left` of its `reads` are still to be scored."""

    number: int
    prefix: tuple[int, ...]
    target: tuple[int, ...]
    value: float = 0.0
    greedy: bool = False
    reads: int = 0
    left: int = 0


@dataclass
class _Read:
    """What a job reads off an input: the log-probabilities of `tokens` at `positions`, summed, times `weight`."""

    job: _Job
    positions: list[int]
    tokens: list[int]
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.job.reads += 1
        self.job.left += 1


@dataclass
class _Input:
    ids: tuple[int, ...]
    prefix: int  # tokens of it that are the prefix
    reads: list[_Read] = field(default_factory=list)


def _longest_first(job: _Job) -> int:
    return -len(job.prefix) - len(job.target)


def _same_prefix(jobs: Iterable[_Job]) -> list[list[_Job]]:
    groups: dict[tuple[int, ...], list[_Job]] = {}
    for job in sorted(jobs, key=_longest_first):
        groups.setdefault(job.prefix, []).append(job)
    return list(groups.values())


def _causal_inputs(jobs: Sequence[_Job]) -> Iterator[_Input]:
    """All but the last token; position p holds the prediction of token p + 1."""
    for group in _same_prefix(jobs):
        found: dict[tuple[int, ...], _Input] = {}
        for job in filter(lambda job: job.target, group):
            start = len(job.prefix)
            ids = (*job.prefix, *job.target[:-1])
            positions = list(range(start - 1, start - 1 + len(job.target)))
            found.setdefault(ids, _Input(ids, start)).reads.append(_Read(job, positions, list(job.target)))
        yield from found.values()


def _masked_inputs(jobs: Sequence[_Job], mask: int, settings: LikelihoodSettings, model: nn.Module) -> Iterator[_Input]:
    """Noised targets after their prefix; position p holds the prediction of token p."""
    stream = torch.Generator().manual_seed(settings.seed)  # of the official draws, which follow the order of requests
    after = (_appended(model),) if settings.compat == "dream" else ()
    for group in [[job] for job in jobs] if settings.compat else _same_prefix(jobs):
        found: dict[tuple[int, ...], _Input] = {}
        for job in filter(lambda job: job.target, group):
            start = len(job.prefix)
            for masked, scored, weight in _draw(job, settings, stream):
                if not scored:
                    continue
                hidden = set(masked)
                noised = tuple(mask if i in hidden else token for i, token in enumerate(job.target))
                read = _Read(job, [start + i for i in scored], [job.target[i] for i in scored], weight)
                found.setdefault(noised, _Input((*job.prefix, *noised, *after), start)).reads.append(read)
        yield from found.values()


def _draw(job: _Job, settings: LikelihoodSettings, stream: torch.Generator) -> Iterator[Noised]:
    length, count = len(job.target), settings.mc_num
    if settings.chain:
        return chain_masks(length)
    if settings.compat == "llada":
        return llada_masks(length, count, settings.batch_size, stream)
    if settings.compat == "dream":
        return dream_masks(len(job.prefix), length, count, settings.batch_size, stream)
    if 2**length - 1 <= count:
        return every_mask(length)
    seed = hashlib.sha256(repr((settings.seed, job.prefix)).encode()).digest()[:7]
    return stratified_masks(length, count, torch.Generator().manual_seed(int.from_bytes(seed)))


def _appended(model: nn.Module) -> int:
    token = end_of_text(model)
    if token is None:
        raise UserError("compat='dream' appends an end-of-text token; set model.config.eos_token_id.")
    return token


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def pad(rows: Sequence[Sequence[int]], left: bool, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, present), both (batch, length): tokens padded with `fill` on one side; present is False on padding."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), fill)
    present = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, at] = torch.tensor(row)
        present[number, at] = True
    return ids, present


class _Predictor:
    """A model as a function from padded ids to the logits of some columns.

    Masked diffusion models are padded on the left, with an attention mask; causal ones on the right, where no
    position before can see it, so that learned positions stay right too.
    """

    def __init__(self, model: nn.Module, cfg_scale: float):
        kind = kind_of(model)
        if kind not in ("masked diffusion", "autoregressive"):
            raise UserError(f"{type(model).__name__} ({kind}) has no likelihood of text; give a language model.")
        self.model, self.causal = model, kind == "autoregressive"
        # with a shift, nothing predicts the first token
        self.needs_prefix = self.causal or fact(model, "shift") > 0
        self.predicts_mask = self.causal or fact(model, "predicts_mask")
        self.cfg_scale = 0.0 if self.causal else cfg_scale
        self.mask = 0 if self.causal else mask_token(model)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(ids, present), both (batch, length); present is False on padding."""
        ids, present = pad(rows, left=not self.causal)
        return ids.to(self.device), present.to(self.device)

    def __call__(self, ids: Tensor, present: Tensor, prefixes: Sequence[int], columns: Tensor) -> Tensor:
        """(batch, columns, vocabulary) logits. prefixes: tokens of each row's prefix, for guidance."""
        logits = self._forward(ids, present, columns)
        if self.cfg_scale:
            number = present.cumsum(1) - 1
            given = (number < torch.tensor(prefixes, device=ids.device)[:, None]) & present
            free = self._forward(ids.masked_fill(given, self.mask), present, columns)
            logits = guided(logits, free, self.cfg_scale)
        if not self.predicts_mask:
            logits[..., self.mask] = -torch.inf
        return logits

    def _forward(self, ids: Tensor, present: Tensor, columns: Tensor) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        if not self.causal and not present.all():
            options["attention_mask"] = present.long()
        if self.keeps:
            return self.model(input_ids=ids, logits_to_keep=columns, **options).logits
        return self.model(input_ids=ids, **options).logits[:, columns]


def _score(predictor: _Predictor, batch: Sequence[_Input]) -> Iterator[tuple[_Read, float, bool]]:
    """(read, sum of its log-probabilities, whether all its tokens are the most probable) of all reads of a batch."""
    ids, present = predictor.pad([each.ids for each in batch])
    offsets = [0 if predictor.causal else ids.shape[1] - len(each.ids) for each in batch]
    reads = [(row, read) for row, each in enumerate(batch) for read in each.reads]
    rows = torch.tensor([row for row, read in reads for _ in read.positions])
    places = torch.tensor([offsets[row] + position for row, read in reads for position in read.positions])
    tokens = torch.tensor([token for _, read in reads for token in read.tokens], device=ids.device)
    columns, places = places.unique(return_inverse=True)
    logits = predictor(ids, present, [each.prefix for each in batch], columns.to(ids.device))
    values, best = _log_probabilities(logits, rows.to(ids.device), places.to(ids.device), tokens)
    lengths = [len(read.positions) for _, read in reads]
    for (_, read), value, hits in zip(reads, values.split(lengths), best.split(lengths), strict=True):
        yield read, float(value.sum()), bool(hits.all())


def _log_probabilities(logits: Tensor, rows: Tensor, places: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """logits (batch, columns, vocabulary), the rest (reads,) -> log-probabilities and whether it is the largest."""
    values, best = [], []
    for row, place, token in zip(rows.split(CHUNK), places.split(CHUNK), tokens.split(CHUNK), strict=True):
        z = logits[row, place].float()
        values.append(z.gather(1, token[:, None])[:, 0] - z.logsumexp(1))
        best.append(z.argmax(1) == token)
    return torch.cat(values).double().cpu(), torch.cat(best).cpu()


def _check_greedy(predictor: _Predictor, jobs: Sequence[_Job]) -> None:
    """LLaDA's greedy decoding: each forward commits the one most confident token; all must be the target's."""
    ids, present = predictor.pad([job.prefix + (predictor.mask,) * len(job.target) for job in jobs])
    target, _ = predictor.pad([job.prefix + job.target for job in jobs])
    width = max(len(job.target) for job in jobs)
    columns = torch.arange(ids.shape[1] - width, ids.shape[1], device=ids.device)
    lengths = torch.tensor([len(job.target) for job in jobs], device=ids.device)
    hidden = torch.arange(width, 0, -1, device=ids.device) <= lengths[:, None]  # (batch, width), targets at the right
    alive = torch.ones(len(jobs), dtype=torch.bool, device=ids.device)
    every = torch.arange(len(jobs), device=ids.device)
    while (hidden.any(1) & alive).any():
        logits = predictor(ids, present, [len(job.prefix) for job in jobs], columns)
        confidence, chosen = logits.float().softmax(-1).max(-1)
        place = confidence.where(hidden, -1.0).argmax(1)
        open_rows = every[hidden.any(1)]
        place = place[open_rows]
        ids[open_rows, columns[place]] = chosen[open_rows, place]
        alive[open_rows] &= chosen[open_rows, place] == target[open_rows, columns[place]]
        hidden[open_rows, place] = False
    for job, right in zip(jobs, alive.tolist(), strict=True):
        job.greedy = right
