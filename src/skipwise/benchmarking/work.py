"""What `bench` decodes: prompts and settings that all modes share, one run of a mode, and the row it makes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from skipwise.benchmarking.memory import measuring_peak
from skipwise.benchmarking.modes import AUTOREGRESSIVE, BLOCKS, EXACT, THRESHOLD, Mode, family_for
from skipwise.benchmarking.result import Ceiling, Interval, Row, Workload
from skipwise.benchmarking.subject import Subject, lengths, prompts
from skipwise.benchmarking.timing import ratio
from skipwise.cost import price_blocks
from skipwise.errors import UserError, unknown
from skipwise.examples import Size
from skipwise.plan import Plan
from skipwise.sampling import FAMILIES, Generated, Statistics, generate
from skipwise.sampling.agreement import agreement
from skipwise.sampling.others import load_others
from skipwise.twins import meta_twin
from skipwise.typed import check_types

BLOCK = 32  # tokens decoded together, as the official evaluations have it


@dataclass(frozen=True)
class BenchSettings:
    """What is decoded, and how often.

    prompt_length, gen_length: tokens; up to 128 each where left out. block_length: of block-wise decoding, up to 32
    where left out. family: of samplers; LLaDA's where left out, which decodes any masked diffusion model block by
    block. threshold: of the parallel mode. compile: also time exact decoding through `torch.compile`. rounds: every
    mode runs once in each, in turns.
    """

    batch: int = 1
    prompt_length: int | None = None
    gen_length: int | None = None
    block_length: int | None = None
    family: str | None = None
    threshold: float = THRESHOLD
    compile: bool = False
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; at least 1 is needed.")
        if self.family is not None and self.family not in FAMILIES:
            raise unknown("decoding family", self.family, FAMILIES)


@dataclass(frozen=True)
class First:
    """The first run of a mode: tokens (batch, new), what it took, and seconds with all that came first."""

    tokens: Tensor
    stats: Statistics
    seconds: float
    peak: int | None


@dataclass
class Work:
    """The same prompts for every mode."""

    subject: Subject
    inputs: Tensor
    gen_length: int
    family: str
    settings: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)

    def run(self, mode: Mode, gen_length: int | None = None) -> Generated:
        """Decode once."""
        given = {**self.settings, **mode.settings}
        if self.family != AUTOREGRESSIVE:
            given |= {"family": self.family, "others": self.others}
        return generate(
            self.subject.model,
            self.inputs,
            plan=mode.plan,
            gen_length=gen_length or self.gen_length,
            stop_at_eos=False,
            **given,
        )

    def warm_up(self, mode: Mode) -> None:
        """Decode a block, or two tokens."""
        self.run(mode, min(self.gen_length, self.settings.get("block_length", 2)))

    def first(self, mode: Mode) -> First:
        """Decode once, alone, and watch the memory."""
        began = time.perf_counter()
        with measuring_peak(self.subject.device) as peak:
            out = self.run(mode)
        seconds = time.perf_counter() - began
        return First(out.sequences[:, self.inputs.shape[1] :], out.stats, seconds, peak.bytes)

    def calls(self, mode: Mode) -> dict[str, Callable[[], Generated]]:
        """What is timed; of a model with a KV cache also the prompt's forward, which makes the first token."""
        timed: dict[str, Callable[[], Generated]] = {mode.name: lambda: self.run(mode)}
        if self.has_prefill:
            timed[_prefill(mode)] = lambda: self.run(mode, 1)
        return timed

    @property
    def has_prefill(self) -> bool:
        """Whether the prompt has a forward of its own, which is not part of decoding."""
        return self.family == AUTOREGRESSIVE and self.gen_length > 1

    def row(self, mode: Mode, first: First, exact: First, seconds: dict[str, list[float]], ceiling: Ceiling) -> Row:
        """What was measured of a mode; seconds: of every call, round by round, exact decoding's first."""
        times, forwards = seconds[mode.name], first.stats.forwards
        took = statistics.median(times)
        compared = ratio(times, seconds[EXACT])
        new, decoding = self.gen_length, took
        if self.has_prefill:
            alone = zip(times, seconds[_prefill(mode)], strict=True)
            new, decoding = new - 1, max(statistics.median(whole - prompt for whole, prompt in alone), 1e-9)
        return Row(
            mode=mode.name,
            exact=mode.exact,
            settings=mode.settings,
            plan=mode.plan.describe() if mode.plan else None,
            seconds=took,
            seconds_to_exact=Interval(value=compared.value, low=compared.low, high=compared.high),
            first_seconds=first.seconds,
            tokens_per_second=len(self.inputs) * new / decoding,
            forwards=forwards,
            seconds_per_forward=took / forwards,
            forwards_per_token=forwards / self.gen_length,
            agreement=agreement(first.tokens, exact.tokens, prompt_length=0),
            peak_bytes=first.peak,
            block_flops=first.stats.block_flops,
            all_in_flops=first.stats.all_in_flops,
            share_of_matrix_rate=first.stats.taken_flops / took / ceiling.matrix_flops,
            share_of_bandwidth=forwards * self.bytes_read(mode.plan) / took / ceiling.bandwidth,
        )

    def bytes_read(self, plan: Plan | None) -> float:
        """Weights that a forward must read, on average over the trajectory: all but the table that tokens are looked
        up in. Keys and values that a cache holds are not counted.
        """
        if plan is None:
            return self._weights(None, {})
        total = begun = 0.0
        for phase in plan.phases:
            total += (phase.until - begun) * self._weights(phase.model, phase.skip)
            begun = phase.until
        return total

    def _weights(self, name: str | None, skip: Any) -> int:
        model = self.subject.model if name is None else self.others[name]
        size = Size(tokens=self.inputs.shape[1] + self.gen_length)
        return price_blocks(model, size).forward(skip).weight_bytes - _lookup_bytes(model)

    def describe(self, settings: BenchSettings) -> Workload:
        """The workload, for the result."""
        parameters = list(meta_twin(self.subject.model).parameters())  # a quantised one by its shape
        return Workload(
            model=self.subject.name,
            architecture=type(self.subject.model).__name__,
            weights="random" if self.subject.random else "trained",
            parameters=sum(p.numel() for p in parameters),
            weight_bytes=price_blocks(self.subject.model).forward().weight_bytes,
            batch=len(self.inputs),
            prompt_length=self.inputs.shape[1],
            gen_length=self.gen_length,
            block_length=self.settings.get("block_length"),
            family=self.family,
            seed=settings.seed,
        )


def prepare_work(subject: Subject, plan: Plan | None, settings: BenchSettings) -> Work:
    """Prompts, lengths and sampler. Raises UserError for what the model was not made for."""
    family = family_for(subject.model, settings.family)
    prompt, gen = lengths(subject.model, settings.prompt_length, settings.gen_length)
    inputs = prompts(subject, settings.batch, prompt, settings.seed)
    given: dict[str, Any] = {"seed": settings.seed}
    if family == BLOCKS:
        given["block_length"] = settings.block_length or max(n for n in range(1, min(BLOCK, gen) + 1) if gen % n == 0)
    elif settings.block_length:
        raise UserError(f"block_length={settings.block_length} is for block-wise decoding (family 'llada').")
    return Work(subject, inputs, gen, family, given, load_others(plan, subject.model, subject.tokenizer))


def _prefill(mode: Mode) -> str:
    return f"{mode.name}: prompt"


def _lookup_bytes(model: Any) -> int:
    """Of the table of token embeddings, unless the head is the same one and reads it whole."""
    if getattr(model.config, "tie_word_embeddings", False):
        return 0
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return 0
    return sum(p.numel() * p.element_size() for p in table.parameters())
