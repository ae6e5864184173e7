"""`analyze`: run a model over texts and keep statistics of what its blocks do to the stream."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.record import Analysis
from skipwise.analysis.states import StateReader, StateStatistics
from skipwise.blocks import Contract, find_contract
from skipwise.cost import price_blocks
from skipwise.errors import UserError
from skipwise.examples import Size
from skipwise.models import kind_of, mask_token
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.llada import LLaDASettings, decode
from skipwise.versions import versions

# A text, or a (prompt, answer) pair whose answer a diffusion model generates anew.
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """Token ids of one text; a diffusion model's own trajectory keeps the first `prompt` of them."""

    ids: tuple[int, ...]
    prompt: int


def analyze(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    name: str | None = None,
    max_tokens: int = 512,
    batch_size: int = 64,
    noise_levels: int = 8,
    step_bins: int = 8,
    max_steps: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Layer-wise statistics of a language model's hidden states over `texts`.

    An autoregressive model or an encoder reads each text once. A masked diffusion model is followed along its own
    denoising trajectories (prompt kept, one token a step but at most `max_steps` steps; of a plain text the first half
    is the prompt), by step in `step_bins` bins of progress, and reads the texts with a fraction of the tokens masked,
    by `noise_levels` levels.
    texts are cut to `max_tokens`; on_progress(done, total) is called after every batch.
    Raises UserError for an empty list of texts.
    """
    samples = _tokenize(tokenizer, texts, max_tokens)
    contract = find_contract(model)
    stack = contract.main_stack
    reader = StateReader(model, contract.stacks[stack])
    blocks = contract.stacks[stack].length
    groups = list(_batches(samples, batch_size))
    device = next(model.parameters()).device
    diffusion = kind_of(model) == "masked diffusion"
    run = _Run(model, reader, blocks, seed, device, len(groups) * (2 if diffusion else 1), max_steps, on_progress)
    with reader.reading(), torch.no_grad():
        tensors = run.diffusion(groups, noise_levels, step_bins) if diffusion else run.plain(groups)
    tensors["block_flops"] = _block_flops(model, contract, stack, max(len(s.ids) for s in samples))
    return Analysis(
        name=name or type(model).__name__,
        model=contract.shape,
        kind=kind_of(model),
        tensors={f"{stack}/{key}": tensor.contiguous() for key, tensor in tensors.items()},
        calibration=_fingerprint(samples),
        settings={
            "max_tokens": max_tokens,
            "noise_levels": noise_levels,
            "step_bins": step_bins,
            "max_steps": max_steps,
            "seed": seed,
        },
        versions=versions(),
    )


@dataclass
class _Run:
    """One pass of an analysis over all batches."""

    model: nn.Module
    reader: StateReader
    blocks: int
    seed: int
    device: torch.device
    total: int
    max_steps: int
    on_progress: Callable[[int, int], None] | None
    done: int = 0

    def _tick(self) -> None:
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total)

    def _new(self) -> StateStatistics:
        return StateStatistics(self.blocks)

    def plain(self, groups: Sequence[list[Sample]]) -> dict[str, Tensor]:
        """Statistics of one forward over each text."""
        statistics = self._new()
        for group in groups:
            ids = torch.tensor([s.ids for s in group], device=self.device)
            self.model(input_ids=ids)
            statistics.add(self.reader.states(torch.ones_like(ids, dtype=torch.bool)))
            self._tick()
        return {"similarity": statistics.similarity, "update_norm": statistics.update_norm}

    def diffusion(self, groups: Sequence[list[Sample]], levels: int, bins: int) -> dict[str, Tensor]:
        """Statistics along the model's own trajectories, over all steps and by step, and on noised texts by level."""
        overall, by_step = self._new(), [self._new() for _ in range(bins)]
        by_level = [self._new() for _ in range(levels)]
        for group in groups:
            self._trajectories(group, overall, by_step)
            self._tick()
        noise = torch.Generator(self.device).manual_seed(self.seed)
        for group in groups:
            self._noised(group, by_level, noise)
            self._tick()
        filled = [i for i, statistics in enumerate(by_step) if statistics.tokens]
        return {
            "similarity": overall.similarity,
            "update_norm": overall.update_norm,
            "progress": torch.tensor([(i + 0.5) / bins for i in filled], dtype=torch.float64),
            "step_similarity": torch.stack([by_step[i].successive_similarity for i in filled]),
            "step_update_norm": torch.stack([by_step[i].update_norm for i in filled]),
            "noise_levels": torch.tensor([_level(i, levels) for i in range(levels)], dtype=torch.float64),
            "noise_similarity": torch.stack([s.successive_similarity for s in by_level]),
            "noise_update_norm": torch.stack([s.update_norm for s in by_level]),
        }

    def _trajectories(self, group: list[Sample], overall: StateStatistics, by_step: list[StateStatistics]) -> None:
        """Decode the group; the states of a step are read when the next one is announced, and after the last."""
        ids = torch.tensor([s.ids[: s.prompt] for s in group], device=self.device)
        length = len(group[0].ids) - group[0].prompt
        keep = torch.ones(len(group), len(group[0].ids), dtype=torch.bool, device=self.device)
        pending: list[Step] = []

        def read() -> None:
            states = self.reader.states(keep)
            overall.add(states)
            by_step[int(pending.pop().progress * len(by_step))].add(states)

        def on_step(step: Step) -> None:
            if pending:
                read()
            pending.append(step)

        settings = LLaDASettings(gen_length=length, steps=min(length, self.max_steps))
        decode(Denoiser(self.model, on_step=on_step), ids, settings)
        read()

    def _noised(self, group: list[Sample], by_level: list[StateStatistics], noise: torch.Generator) -> None:
        """Mask every token with probability t, at each noise level t."""
        ids = torch.tensor([s.ids for s in group], device=self.device)
        keep = torch.ones_like(ids, dtype=torch.bool)
        draws = torch.rand(ids.shape, generator=noise, device=self.device)
        for i, statistics in enumerate(by_level):
            masked = draws < _level(i, len(by_level))
            self.model(input_ids=ids.masked_fill(masked, mask_token(self.model)))
            statistics.add(self.reader.states(keep))


def _level(i: int, levels: int) -> float:
    return (i + 0.5) / levels


def _tokenize(tokenizer: Any, texts: Sequence[Text], max_tokens: int) -> list[Sample]:
    samples = []
    for text in texts:
        prompt, answer = (text, "") if isinstance(text, str) else text
        ids = tokenizer(prompt + answer)["input_ids"][:max_tokens]
        kept = len(tokenizer(prompt)["input_ids"]) if answer else len(ids) // 2
        if len(ids) > 1:
            samples.append(Sample(tuple(ids), min(kept, len(ids) - 1)))
    if not samples:
        raise UserError("There are no texts to analyze; give at least one text of two tokens or more.")
    return samples


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Batches of samples of equal shape, so that nothing is padded."""
    groups: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[len(sample.ids), sample.prompt].append(sample)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _fingerprint(samples: Sequence[Sample]) -> dict[str, Any]:
    digest = hashlib.sha256(repr([s.ids for s in samples]).encode()).hexdigest()
    return {"sha256": digest, "tokens": sum(len(s.ids) for s in samples), "texts": len(samples)}


def _block_flops(model: nn.Module, contract: Contract, stack: str, tokens: int) -> Tensor:
    prices = price_blocks(model, Size(tokens=tokens), contract).blocks[stack]
    return torch.tensor([price.flops for price in prices], dtype=torch.float64)
