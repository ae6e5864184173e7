"""The forwards of an analysis, and which statistics see their states."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.attention import AttentionStatistics, watching
from skipwise.analysis.lens import tail_of
from skipwise.analysis.processes import add_up, my_share
from skipwise.analysis.samples import Batch, Sample, first_batch
from skipwise.analysis.states import StateReader, outlier_channels
from skipwise.analysis.statistics import Statistics
from skipwise.blocks import Contract, module_list
from skipwise.models import head_of, kind_of, mask_token
from skipwise.models.hooks import watched
from skipwise.models.lean import is_lean, run
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.llada import LLaDASettings, decode
from skipwise.wrapping import class_of


@dataclass
class Run:
    """One analysis of one stack of a model. on_progress(done, total) counts this process's batches."""

    model: nn.Module
    contract: Contract
    stack: str
    samples: Sequence[Sample]
    batches: Sequence[Batch]
    parts: Sequence[str]
    outliers: int
    noise_levels: int
    step_bins: int
    max_steps: int
    seed: int
    on_progress: Callable[[int, int], None] | None = None
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.reader = StateReader(self.model, self.contract.stacks[self.stack])
        self.device = next(self.model.parameters()).device
        self.diffusion = kind_of(self.model) == "masked diffusion"
        self.mine = my_share(self.batches)
        self.probes = my_share([sample for sample in self.samples if sample.probe])
        self.channels = torch.zeros(0, dtype=torch.long)

    def tensors(self) -> dict[str, Tensor]:
        """Run everything that the parts ask for."""
        found: dict[str, Tensor] = {}
        if {"layers", "tokens", "lens"} & set(self.parts):
            with self.reader.reading():
                found |= self._states()
        if "attention" in self.parts:
            found |= self._attention()
        return found

    def _states(self) -> dict[str, Tensor]:
        if "layers" in self.parts and self.outliers:
            self.channels = self._find_outliers()
        found = self._diffusion() if self.diffusion else self._plain()
        return found | ({"outlier_channels": self.channels} if len(self.channels) else {})

    def _new(self, *parts: str) -> Statistics:
        longest = max(len(sample.ids) for sample in self.samples)
        return Statistics(parts, self.contract.stacks[self.stack].length, self.channels, longest)

    def _all(self) -> Statistics:
        return self._new(*self.parts, *(["cka"] if "layers" in self.parts else []))

    def _find_outliers(self) -> Tensor:
        """From a forward of its own, so that they depend neither on the batches nor on how these are shared."""
        batch = first_batch(self.samples)
        ids = batch.ids.to(self.device)
        self._forward(self._masked(batch, ids, 0.5) if self.diffusion else ids)
        return outlier_channels(torch.stack(self.reader.take()).flatten(1, 2), self.outliers).cpu()

    def _forward(self, ids: Tensor) -> None:
        """For what the reader takes of it: no logits where the model can be run without."""
        model: Any = self.model
        if head_of(model):
            model(input_ids=ids, states=True)
        elif self.stack == "model.layers" and not watched(model) and is_lean(model.model, None):
            run(model.model, ids)
        else:
            model(**self._reads(ids))

    def _reads(self, ids: Tensor) -> dict[str, Any]:
        """The inputs of one forward; an encoder-decoder reads a text and is given the same text to write."""
        both = getattr(self.model.config, "is_encoder_decoder", False)
        caches = "use_cache" in inspect.signature(class_of(self.model).forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids} | ({"decoder_input_ids": ids} if both else {})
        return inputs | ({"use_cache": False} if caches else {})  # nothing comes after this forward

    def _masked(self, batch: Batch, ids: Tensor, level: float) -> Tensor:
        return ids.masked_fill((batch.noise(self.seed) < level).to(self.device), mask_token(self.model))

    def _read(self, statistics: Statistics, batch: Batch, ids: Tensor, predicted: Tensor) -> None:
        """Take the last forward's states; predicted: (batch, length), positions whose prediction means something."""
        states = self.reader.take()
        statistics.add(states)
        probes = batch.probes.to(self.device)
        if statistics.lens and bool(probes.any()):
            tail = tail_of(self.model, self.contract, self.stack, self.reader.stream)
            statistics.look(tail, ids[probes], [state[probes] for state in states], predicted[probes])

    def _tick(self) -> None:
        self.done += 1
        if self.on_progress:
            states = {"layers", "tokens", "lens"} & set(self.parts)
            passes = (1 + (self.diffusion and "layers" in self.parts)) if states else 0
            self.on_progress(self.done, passes * len(self.mine) + ("attention" in self.parts) * len(self.probes))

    def _plain(self) -> dict[str, Tensor]:
        """One forward over each text."""
        statistics = self._all()
        for batch in self.mine:
            ids = batch.ids.to(self.device)
            self._forward(ids)
            self._read(statistics, batch, ids, torch.ones_like(ids, dtype=torch.bool))
            self._tick()
        add_up(statistics.sums)
        return statistics.tensors()

    def _diffusion(self) -> dict[str, Tensor]:
        """The model's own trajectories, over all steps and by step; and, for the layers, noised texts by level."""
        by_step = [self._all() for _ in range(self.step_bins)]
        for batch in self.mine:
            self._trajectories(batch, by_step)
            self._tick()
        by_level = [self._new("layers") for _ in range(self.noise_levels if "layers" in self.parts else 0)]
        for batch in self.mine if by_level else ():
            for i, statistics in enumerate(by_level):
                self._forward(self._masked(batch, batch.ids.to(self.device), _middle(i, len(by_level))))
                statistics.add(self.reader.take())
            self._tick()
        add_up(each for statistics in (*by_step, *by_level) for each in statistics.sums)
        steps = [i for i, statistics in enumerate(by_step) if statistics.used]
        found = Statistics.combined(by_step).tensors() | _profile("step", [by_step[i] for i in steps])
        found |= {"progress": torch.tensor([_middle(i, len(by_step)) for i in steps], dtype=torch.float64)}
        if by_level:
            levels = [_middle(i, len(by_level)) for i in range(len(by_level))]
            found |= _profile("noise", by_level) | {"noise_levels": torch.tensor(levels, dtype=torch.float64)}
        return found

    def _trajectories(self, batch: Batch, by_step: list[Statistics]) -> None:
        """Decode the batch; the states of a step are read when the next one is announced, and after the last."""
        length = len(batch.samples[0].ids) - batch.samples[0].prompt
        pending: list[tuple[float, Tensor]] = []

        def read() -> None:
            progress, ids = pending.pop()
            statistics = by_step[min(int(progress * len(by_step)), len(by_step) - 1)]
            self._read(statistics, batch, ids, ids == mask_token(self.model))

        def on_step(step: Step) -> None:
            if pending:
                read()
            pending.append((step.progress, step.sequences.clone()))

        settings = LLaDASettings(gen_length=length, steps=min(length, self.max_steps))
        prompts = batch.ids[:, : batch.samples[0].prompt].to(self.device)
        decode(Denoiser(self.model, on_step=on_step), prompts, settings)
        read()

    def _attention(self) -> dict[str, Tensor]:
        """Every probe by itself; for a diffusion model at each noise level, averaged over them."""
        blocks = module_list(self.model, self.stack)
        statistics = AttentionStatistics(len(blocks), max(len(sample.ids) for sample in self.samples))
        levels = [_middle(i, self.noise_levels) for i in range(self.noise_levels)] if self.diffusion else [0.0]
        with watching(self.model, blocks, statistics):
            for probe in self.probes:
                batch = Batch((probe,))
                for level in levels:
                    ids = batch.ids.to(self.device)
                    self.model(**self._reads(self._masked(batch, ids, level) if level else ids))
                self._tick()
        add_up([statistics])
        return statistics.tensors()


def _profile(axis: str, statistics: Sequence[Statistics]) -> dict[str, Tensor]:
    """Statistics along an axis: (length of the axis, n or n + 1) each, under AXIS_NAME."""
    rows = [each.profile() for each in statistics]
    return {f"{axis}_{name}": torch.stack([row[name] for row in rows]) for name in rows[0]}


def _middle(i: int, bins: int) -> float:
    return (i + 0.5) / bins
