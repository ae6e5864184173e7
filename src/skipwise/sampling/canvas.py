"""The sequences that a masked diffusion sampler fills: prompt and masks, the masks' quotas, the end of a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from skipwise.errors import UserError, unknown
from skipwise.sampling.denoiser import Step
from skipwise.typed import check_types

LONGEST = 2**20  # tokens: no model has learnt so many positions
LOOKS = 8  # steps between two looks for ended rows where a look makes the host wait


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every family of samplers takes.

    gen_length: masks that are appended to the prompt; 0 fills only the masks that the prompt holds (infilling).
    steps: denoising steps, one a mask when left out. seed: of the noise; row r of a batch under seed s draws what a
    batch of one draws under seed s + r, so that a row does not depend on its neighbours. eos_token_id: decoding stops
    when every row has committed this token and all before it, and what follows it becomes that token; None goes on.
    compat: repeat the official implementation's arithmetic and random numbers, those of `torch.manual_seed(seed)`.
    """

    gen_length: int = 128
    steps: int | None = None
    seed: int = 0
    eos_token_id: int | None = None
    compat: str | None = None

    family: ClassVar[str]

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Settings by name. Raises UserError, with the nearest name, for one that this family does not take."""
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise unknown(f"setting of the {cls.family} sampler", name, known - {"eos_token_id"})
        return cls(**given)

    def __post_init__(self) -> None:
        check_types(self)
        if self.compat not in (None, self.family):
            raise UserError(f"compat={self.compat!r} is unknown; use {self.family!r} or leave it out.")
        if self.gen_length < 0:
            raise UserError(f"gen_length={self.gen_length} is negative; 0 fills the masks of the prompt alone.")
        if self.gen_length > LONGEST:
            raise UserError(f"gen_length={self.gen_length} is more than a canvas holds; give at most {LONGEST}.")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps}; at least one denoising step is needed.")
        if self.steps is not None and self.steps > LONGEST:
            raise UserError(f"steps={self.steps} are more than a text has tokens; give at most {LONGEST}.")

    def at_least_zero(self, name: str, why: str) -> None:
        """Raise UserError when the setting `name` is negative."""
        if getattr(self, name) < 0:
            raise UserError(f"{name}={getattr(self, name)} is negative; {why}.")


@dataclass(frozen=True)
class Part:
    """Some rows of a canvas. sequences (n, length) are a copy, unless they are all rows; attention_mask as there."""

    rows: tuple[int, ...]
    index: Tensor | None  # of the rows; None is all of them
    sequences: Tensor
    attention_mask: Tensor | None
    mask: int

    @property
    def masked(self) -> Tensor:
        """(n, length): what is still to be filled."""
        masked = self.sequences == self.mask
        return masked if self.attention_mask is None else masked & self.attention_mask

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor that has all rows."""
        return tensor if self.index is None else tensor[self.index]


@dataclass
class Canvas:
    """sequences: (batch, length), filled in place; attention_mask: bool of the same shape, False on left padding, or
    None where there is no padding.

    `prompt` is the length of the prompt; `mask` the token that stands for what is not known yet.
    """

    sequences: Tensor
    attention_mask: Tensor | None
    prompt: int
    mask: int
    _last: tuple[tuple[int, ...], Tensor, Tensor | None] | None = None

    @classmethod
    def open(cls, input_ids: Tensor, attention_mask: Tensor | None, mask: int, gen_length: int) -> "Canvas":
        """Prompts (batch, prompt) and `gen_length` masks behind them. Raises UserError if nothing is to be filled."""
        tail = input_ids.new_full((len(input_ids), gen_length), mask)
        if attention_mask is not None:
            present = attention_mask.bool()
            new = torch.ones_like(tail, dtype=torch.bool)
            attention_mask = None if bool(present.all()) else torch.cat([present, new], dim=1)
        canvas = cls(torch.cat([input_ids, tail], dim=1), attention_mask, input_ids.shape[1], mask)
        if not bool(canvas.masked.any()):
            raise UserError("gen_length=0 and the prompt holds no mask token, so there is nothing to fill.")
        return canvas

    @property
    def masked(self) -> Tensor:
        """(batch, length): what is still to be filled."""
        return self.part(range(len(self.sequences))).masked

    @property
    def left(self) -> list[int]:
        """Masks left in every row."""
        return self.masked.sum(1).tolist()

    @property
    def most(self) -> int:
        """Masks left in the row that has the most."""
        return max(self.left)

    def part(self, rows: Iterable[int]) -> Part:
        """These rows, to be worked on and then put back."""
        rows = tuple(rows)
        if len(rows) == len(self.sequences):
            return Part(rows, None, self.sequences, self.attention_mask, self.mask)
        if self._last is None or self._last[0] != rows:  # most steps are of the rows of the step before
            index = on_device(rows, self.sequences.device)
            self._last = rows, index, None if self.attention_mask is None else self.attention_mask[index]
        return Part(rows, self._last[1], self.sequences[self._last[1]], self._last[2], self.mask)

    def put(self, part: Part) -> None:
        """Take over what has become of a part."""
        if part.index is not None:
            self.sequences[part.index] = part.sequences

    def step(self, index: int, total: int, progress: float | None = None) -> Step:
        """The step to announce; progress is index / total when left out."""
        return Step(index, total, self.sequences, index / total if progress is None else progress)

    def ended(self, eos: int | None) -> Tensor:
        """(batch,): whether a row holds a committed `eos` after the prompt with no mask before it."""
        if eos is None or self.prompt == self.sequences.shape[1]:
            return torch.zeros(len(self.sequences), dtype=torch.bool, device=self.sequences.device)
        masked, ends = self.masked, self.sequences[:, self.prompt :] == eos
        first = (masked[:, self.prompt :] | ends).int().argmax(1, keepdim=True)  # a mask or an end, whichever is first
        return ends.gather(1, first)[:, 0] & ~masked[:, : self.prompt].any(1)

    def looks_for_ends(self, step: int) -> bool:
        """Whether to look at this step: at every one on a CPU; elsewhere now and then, as it waits for the device."""
        return self.sequences.device.type == "cpu" or step % LOOKS == LOOKS - 1

    def going(self, rows: Sequence[int], eos: int | None, together: bool = False) -> list[int]:
        """Those of the rows that have not ended; together: all of them until the last has."""
        if eos is None or self.prompt == self.sequences.shape[1]:
            return list(rows)
        ended = self.ended(eos).tolist()
        going = [row for row in rows if not ended[row]]
        return list(rows) if together and going else going

    def finished(self, eos: int | None) -> bool:
        """Whether every row holds a committed `eos` after the prompt with no mask before it."""
        return bool(self.ended(eos).all())

    def close(self, eos: int | None) -> Tensor:
        """The sequences, with everything after the first `eos` behind the prompt turned into `eos`."""
        if eos is not None:
            new = self.sequences[:, self.prompt :]
            ended = (new == eos).cumsum(1) > 0
            new[ended] = eos
        return self.sequences


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64. The device is not waited for."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def places(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column (count,) of each True of a matrix that has `count` of them, row by row.

    Unlike `nonzero`, which must wait for the device to learn how many there are.
    """
    rows, columns = torch.nonzero_static(chosen, size=count).unbind(1)
    return rows, columns


def quota_of(masks: int, steps: int, step: int) -> int:
    """How many of a row's masks are lifted at one of `steps` steps: evenly, the remainder first."""
    return masks // steps + (step < masks % steps)


def transfer_quotas(masked: Tensor, steps: int) -> Tensor:
    """How many tokens each row commits at each step: (batch,) masked counts -> (batch, steps); remainder goes first."""
    base, extra = masked // steps, masked % steps
    return base[:, None] + (torch.arange(steps, device=masked.device) < extra[:, None])


def most_confident(confidence: Tensor, counts: Tensor) -> Tensor:
    """bool, as confidence (batch, length): the `counts` (batch,) largest of each row; of equal ones, the first.

    So a row chooses the same alone and in a batch, however much it is padded there.
    """
    order = confidence.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(confidence.shape[1], device=confidence.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def commit_top(sequences: Tensor, chosen: Tensor, confidence: Tensor, quota: Sequence[int]) -> None:
    """Write, in place, the `quota` (batch,) most confident of `chosen` into sequences; all (batch, length)."""
    best = most_confident(confidence, on_device(quota, confidence.device))
    sequences.copy_(chosen.where(best, sequences))


def commit_top_officially(sequences: Tensor, chosen: Tensor, confidence: Tensor, quota: Sequence[int]) -> None:
    """`commit_top` with ties decided by a top-k of `quota` over the whole row, as in the official code."""
    if len(set(quota)) == 1:
        positions = confidence.topk(quota[0]).indices
        sequences.scatter_(1, positions, chosen.gather(1, positions))
        return
    for row, count in enumerate(quota):
        positions = confidence[row].topk(count).indices
        sequences[row, positions] = chosen[row, positions]


def commit_above(sequences: Tensor, chosen: Tensor, confidence: Tensor, threshold: float) -> None:
    """Write, in place, every token whose confidence reaches the threshold, and always each row's best one.

    Positions that must not be written hold -inf. Source: Fast-dLLM (arXiv 2505.22618), confidence-aware parallel
    decoding.
    """
    best = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, confidence.argmax(1, keepdim=True), True)
    transfer = (confidence >= threshold) | (best & (confidence > -torch.inf))
    sequences.copy_(chosen.where(transfer, sequences))
