"""Approximate caches for block-wise decoding: the keys and values of positions that are not run again.

A masked diffusion model sees both ways, so that one committed token changes the features of every other position, if
slightly. With a cache a step runs a **window** of the positions against the stored keys and values of the others. What
is stored grows stale with every commit: cached decoding is an approximation. It is exact where nothing stale is read:
in a forward of everything, in a model (under its plan) of one block, where every block of tokens takes one step.
`skipwise.sampling.agreement` says how much of a text is as without a cache.

- "prefix" (Fast-dLLM, arXiv 2505.22618): every block begins with a forward of everything; its other steps run the block
  and what follows it.
- "dual" (the same): what follows the block is not run again either, so that these steps run the block alone.
- "delayed" (dKV-Cache, arXiv 2505.15781, inside of "dual"): what of the block is committed is not run again either, but
  for once, at the step after its commit, so that the token's keys are stored and not a mask's. A step runs that and
  the masks, or what is before them in a model that predicts from there: half of the block on average.
- "interval" (after dLLM-Cache, arXiv 2506.06295): steps run the block alone; what follows the prompt is run every
  `refresh` steps and everything every `prompt_refresh`, wherever blocks begin. That paper's update, between refreshes,
  of the tokens whose values changed most is left out: it runs other tokens in every layer. Tokens that a block commits
  last are run once more with the next block instead, so that no mask stays stored in their place.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from skipwise.errors import UserError, unknown
from skipwise.models import fact
from skipwise.models.bidirectional import Where

Kind = Literal["prefix", "dual", "delayed", "interval"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REFRESH, PROMPT_REFRESH = 8, 64  # of "interval"; its paper runs LLaDA-8B with 6 to 8 and 50 to 100


class Stored(Cache):
    """Keys (rotated) and values of all positions. The first forward runs everything and fills it; later ones run
    `window`, write theirs, and attend to the whole, which is a bool mask for padding and none without.

    window: the same positions of every row, or each row's own, int64 (rows, n).
    """

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length
        self.window: slice | Tensor = slice(0, length)
        self._places = torch.empty(0)  # where in such a window each position is
        self._layers: list[tuple[Tensor, Tensor]] = []  # of those that run, (rows, key heads, length, width of a head)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the window's keys and values (rows, key heads, window, width); returns those of all positions."""
        if layer_idx == len(self._layers):
            self._layers.append((key_states, value_states))
            return key_states, value_states
        keys, values = self._layers[layer_idx]
        if isinstance(self.window, slice):
            keys[:, :, self.window] = key_states
            values[:, :, self.window] = value_states
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            keys[rows, :, self.window] = key_states.transpose(1, 2)
            values[rows, :, self.window] = value_states.transpose(1, 2)
        return keys, values

    def choose(self, wanted: Tensor, most: int) -> None:
        """Run these positions next, bool (rows, up to where any is), of which no row has more than `most`.

        A row that has fewer runs its first one as often as it takes: its neighbours change nothing of what it sees.
        """
        order = wanted.argsort(dim=1, descending=True, stable=True)[:, :most]
        self.window = order.where(wanted.gather(1, order), order[:, :1])
        self._places = wanted.cumsum(1) - 1

    @property
    def position_ids(self) -> Tensor | None:
        """Numbers of the window's positions (rows, n), where they do not follow from `get_seq_length`."""
        return None if isinstance(self.window, slice) else self.window

    def part(self, sequences: Tensor) -> Tensor:
        """What of sequences (rows, length) is in the window."""
        return sequences[:, self.window] if isinstance(self.window, slice) else sequences.gather(1, self.window)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the window: transformers' models number the window's tokens from there."""
        return self.window.start if isinstance(self.window, slice) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many positions the window sees, and the first of them."""
        return self.length, 0

    def local(self, where: Where | None, before: int = 0) -> Where | None:
        """What is at `where` in the sequences, as places in the window, `before` behind that of the position that
        predicts it, which the window holds.
        """
        if where is None:
            return None
        rows, positions = where if isinstance(where, tuple) else where.nonzero(as_tuple=True)
        if isinstance(self.window, slice):
            return rows, positions - self.window.start
        return rows, self._places[rows, (positions - before).clamp(min=0)] + before

    def keep(self, places: Sequence[int], of: int) -> None:
        """Drop all but these of `of` rows; under guidance, rows are there twice."""
        copies = len(self._layers[0][0]) // of if self._layers else 1
        rows = [copy * of + place for copy in range(copies) for place in places]
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]


class Masks(NamedTuple):
    """Of a block: bool (rows, end of the block), and how many every row has, known without asking a device.

    looked, looks: those of them that are to be predicted, and how many of every row.
    """

    where: Tensor
    left: Sequence[int]
    looked: Tensor
    looks: Sequence[int]

    def of(self, places: Sequence[int]) -> "Masks":
        """These rows' alone."""
        left, looks = ([of[place] for place in places] for of in (self.left, self.looks))
        return Masks(self.where[places], left, self.looked[places], looks)


class Windows:
    """Which positions each forward of block-wise decoding runs, and what is stored of the others.

    prompt: how many positions come before the text. refresh: all but "interval" run everything every `refresh`
    forwards of a block, at its first alone when left out; "interval" what is behind the prompt, 8 when left out.
    prompt_refresh: "interval" runs everything every so many forwards, 64 when left out.
    """

    def __init__(self, kind: Kind, prompt: int, refresh: int | None = None, prompt_refresh: int | None = None):
        self.kind, self.prompt = kind, prompt
        self.refresh, self.prompt_refresh = refresh, prompt_refresh
        self.block = slice(0, 0)
        self.stored: Stored | None = None
        self._rows: tuple[int, ...] = ()
        none = torch.empty(0, 0, dtype=torch.bool)
        self._masks = self._before = Masks(none, (), none, ())  # now, and at the step before
        self._of: object = None  # what `stored` holds the features of
        self._age = 0  # forwards since everything was run
        self._late = 0  # from where on tokens may have been committed since they were run

    def begin(self, block: slice) -> None:
        """Decode this block from now on, up from its first mask."""
        self.block, self._late = block, min(block.start, self._late)
        if self.kind != "interval":
            self.stored = None

    def next(self, shape: Sequence[int], running: object, before: int = 0) -> Stored:
        """What the next forward takes as `past_key_values`; it must run the `window` of that.

        shape: of the sequences (rows, length); running: what runs, since what is stored of anything else is stale;
        before: how far before a token the position is that predicts it.
        """
        rows, length = shape
        stored = None if self.runs_everything(running) else self.stored
        self._age += 1
        if stored is None:
            stored, self._of, self._age = Stored(length), running, 0
        elif self.kind == "delayed":
            wanted, most = self._delayed(before)
            stored.choose(wanted.repeat(rows // len(wanted), 1), most)
        else:
            start, stop = self._span(length)
            stored.window = slice(max(0, start - before), stop)
        self.stored, self._late = stored, self.block.start
        return stored

    def runs_everything(self, running: object) -> bool:
        """Whether the next forward runs all positions."""
        every = (self.prompt_refresh or PROMPT_REFRESH) if self.kind == "interval" else self.refresh
        return self.stored is None or running != self._of or _due(self._age + 1, every)

    def keep(self, rows: Sequence[int], masks: Masks) -> None:
        """Go on with these rows of the batch and their masks. If one is back that was left out, all is run again."""
        rows, self._before = tuple(rows), self._masks
        if self.stored is not None and rows != self._rows:
            if set(rows) <= set(self._rows):
                places = [self._rows.index(row) for row in rows]
                self.stored.keep(places, len(self._rows))
                self._before = self._before.of(places)
            else:
                self.stored = None
        self._rows, self._masks = rows, masks

    def _delayed(self, before: int) -> tuple[Tensor, int]:
        """What "delayed" runs: what was just committed, and what predicts the masks; and how many of a row at most."""
        now, was = self._masks, self._before
        committed = was.where & ~now.where
        most = max(looks + had - left for looks, had, left in zip(now.looks, was.left, now.left, strict=True))
        if before == 0:  # masks predict themselves
            return committed | now.looked, most
        predicting = F.pad(now.looked[:, before:], (0, before))
        first = now.where & (now.where.cumsum(1) == 1) & now.looked  # predicts itself if it is the first of a text
        return committed | predicting | first, most + 1

    def _span(self, length: int) -> tuple[int, int]:
        """First position and end of what the kind runs, when that is not everything."""
        if self.kind == "prefix":
            return self.block.start, length
        if self.kind == "interval" and _due(self._age, self.refresh or REFRESH):
            return min(self._late, self.prompt), length
        return self._late, self.block.stop


def _due(age: int, every: int | None) -> bool:
    return every is not None and age % every == 0


def check_cache(kind: str | None, refresh: int | None, prompt_refresh: int | None, compat: str | None) -> None:
    """Raise UserError for settings of a cache that do not go together."""
    if kind is not None and kind not in KINDS:
        raise unknown("cache", kind, KINDS)
    if kind and compat:
        raise UserError(f"compat={compat!r} repeats the official code, which has no cache; leave out cache={kind!r}.")
    if refresh is not None and kind is None:
        raise UserError(f"refresh={refresh} refreshes a cache; choose one of {', '.join(KINDS)} or leave it out.")
    if prompt_refresh is not None and kind != "interval":
        raise UserError(f"prompt_refresh={prompt_refresh} is of cache='interval'; cache is {kind!r}.")
    for name, every in (("refresh", refresh), ("prompt_refresh", prompt_refresh)):
        if every is not None and every < 1:
            raise UserError(f"{name}={every}; a cache is refreshed every 1 or more steps.")


def check_cacheable(models: Iterable[nn.Module], kind: Kind) -> None:
    """Raise UserError for a model whose attention cannot take stored keys and values."""
    for model in models:
        if not fact(model, "takes_cache"):
            raise UserError(
                f"{type(model).__name__} cannot decode with cache={kind!r}: its attention takes no stored keys; "
                "leave cache out, or load it as one of the native models (LLaDA, Dream, MDLM)."
            )
