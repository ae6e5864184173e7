"""LLaDA's decoding: block by block, the most confident tokens committed at every step.

Source: Nie et al. (arXiv 2502.09992), section 2.4 and the official `generate`. The default computes in float32 and
looks at the current block alone; `compat="llada"` repeats the official arithmetic (softmax in the model's own dtype,
top-k over the whole row), in which ties decide the order, token for token. A threshold commits in parallel instead of
by quota (Fast-dLLM, arXiv 2505.22618).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from skipwise.errors import UserError
from skipwise.models import end_of_text
from skipwise.sampling.cache import Kind, Masks, Windows, check_cache, check_cacheable
from skipwise.sampling.canvas import (
    Canvas,
    Part,
    Settings,
    commit_above,
    commit_top,
    commit_top_officially,
    most_confident,
    on_device,
    places,
    quota_of,
)
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.noise import Noise
from skipwise.sampling.prediction import Prediction, Reader, largest, probabilities_of

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True, kw_only=True)
class LLaDASettings(Settings):
    """How LLaDA decodes; see `Settings` for what all families take.

    block_length: tokens decoded before the next block begins; all of them when left out. Masks in the prompt are filled
    with the first block. steps: in all, spread evenly over the blocks. temperature: 0 is greedy; above it, Gumbel noise
    in float64 multiplies in. threshold: instead of a quota a step, commit what the model is at least this confident of.
    cfg_scale: classifier-free guidance, z_u + (cfg_scale + 1) (z - z_u), where z_u are the logits with the prompt
    masked; a step then runs twice the rows. logits_eos_inf: never choose the end of text; confidence_eos_eot_inf:
    choose it last of all (under compat the official code's version, which at a temperature forgets the end of text).
    cache: "prefix", "dual", "delayed" or "interval", an approximation that does not run all positions at every step,
    with refresh and prompt_refresh, in steps that are run (`skipwise.sampling.cache`); None is exact. Refreshes of
    "interval" count the batch's steps: with a threshold a row may depend on its companions there. focus: of the
    "delayed" cache: a step looks at this many masks of a row alone, those that the model was most confident of when it
    looked at them last; it looks at all where everything is run.
    """

    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    cache: Kind | None = None
    refresh: int | None = None
    prompt_refresh: int | None = None
    focus: int | None = None

    family: ClassVar[str] = "llada"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_zero("temperature", "0 is greedy, 1 is the model's distribution")
        self.at_least_zero("cfg_scale", "0 is without guidance")
        check_cache(self.cache, self.refresh, self.prompt_refresh, self.compat)
        self._check_focus()
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} is no probability; choose above 0 to 1, such as 0.9.")
        if self.compat or self.steps:
            given = "compat" if self.compat else f"steps={self.steps}"
            raise UserError(f"With a threshold the number of steps follows from the text; leave out {given}.")

    def _check_focus(self) -> None:
        if self.focus is None:
            return
        if self.cache != "delayed":
            raise UserError(f"focus={self.focus} is of cache='delayed'; cache is {self.cache!r}.")
        if self.focus < 1 or self.remasking == "random":
            raise UserError(
                f"focus={self.focus} with remasking={self.remasking!r}; look at 1 mask or more, by confidence."
            )

    def windows(self, denoiser: Denoiser, canvas: Canvas) -> Windows | None:
        """What decides which positions run; None where all do. Raises UserError for a model that takes no cache."""
        if self.cache is None:
            return None
        if denoiser.compiled:
            raise UserError(f"compile=True needs forwards of one length; leave it out, or cache={self.cache!r}.")
        check_cacheable((denoiser.model, *denoiser.others.values()), self.cache)
        return Windows(self.cache, canvas.prompt, self.refresh, self.prompt_refresh)

    def resolved(self, most_masks: int) -> tuple[int, int, int]:
        """(number of blocks, block length, steps a block). Raises UserError when they do not divide evenly."""
        if self.gen_length == 0:
            if self.block_length:
                raise UserError(
                    f"block_length={self.block_length} needs new tokens; infilling (gen_length=0) is one block."
                )
            return 1, 0, self.steps or most_masks
        block_length = self.block_length or self.gen_length
        if block_length < 1 or self.gen_length % block_length:
            raise UserError(f"gen_length={self.gen_length} is not a multiple of block_length={block_length}.")
        blocks = self.gen_length // block_length
        steps = self.steps or self.gen_length
        if steps % blocks:
            near = max(1, round(steps / blocks)) * blocks
            raise UserError(f"steps={steps} is not a multiple of the {blocks} blocks; try steps={near}.")
        return blocks, block_length, steps // blocks


@torch.no_grad()
def decode(
    denoiser: Denoiser, input_ids: Tensor, settings: LLaDASettings, attention_mask: Tensor | None = None
) -> Tensor:
    """Decode `settings.gen_length` tokens after every prompt, and the masks that the prompts hold.

    input_ids: (batch, prompt_length), padded on the left; attention_mask: (batch, prompt_length), 0 on padding.
    Returns (batch, prompt_length + gen_length). A step runs the rows that commit at it, and none that has ended; under
    compat all.
    """
    canvas = Canvas.open(input_ids, attention_mask, denoiser.mask_token, settings.gen_length)
    blocks, block_length, steps = settings.resolved(canvas.most)
    run = (_Official if settings.compat else _Plain)(denoiser, canvas, settings)
    for block in range(blocks):
        # the masks of the prompt belong to the first block; the official code never fills them
        start = 0 if block == 0 and not settings.compat else canvas.prompt + block * block_length
        window = slice(start, canvas.prompt + (block + 1) * block_length)
        if settings.threshold is None:
            run.by_quota(window, block * steps, steps, blocks * steps)
        elif isinstance(run, _Plain):
            run.until_filled(window)
        if run.finished:
            break
    return canvas.close(settings.eos_token_id)


def guided(logits: Tensor, unguided: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance as in LLaDA's `generate`: `unguided` are the logits with the prompt masked."""
    return unguided + (scale + 1) * (logits - unguided)


class _Plain:
    """Our commits: in float32, over the current block alone. Only what a token can be committed at is looked at."""

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: LLaDASettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.given = canvas.sequences != canvas.mask  # what guidance masks
        self.left = canvas.left  # masks left in each row
        self.total = max(self.left)
        self.noise = Noise(settings.seed, canvas)
        self.rows = list(range(len(self.left)))  # those that have not ended
        self.windows = settings.windows(denoiser, canvas)
        self.never = end_of_text(denoiser.model) if settings.logits_eos_inf else None
        self.held_back = held_back(denoiser) if settings.confidence_eos_eot_inf else []
        # how confident the model was of each position when it was last looked at
        self.confidence = torch.full(canvas.sequences.shape, torch.inf, device=canvas.sequences.device)

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return not self.rows

    def by_quota(self, window: slice, first: int, steps: int, total: int) -> None:
        """Fill a block in a fixed number of steps, for which no device is asked how far it is."""
        self._begin(window)
        masks = self.canvas.masked[:, window].sum(1).tolist()
        left = list(masks)
        for i in range(steps):
            quota = {row: quota_of(masks[row], steps, i) for row in self.rows}
            if not any(quota.values()):
                continue
            rows = [row for row in self.rows if quota[row] or self.denoiser.fixed_rows]
            self._commit(self.canvas.step(first + i, total), window, rows, left, [quota[row] for row in rows])
            for row in rows:
                left[row] -= quota[row]
                self.left[row] -= quota[row]
            if i == steps - 1 or self.canvas.looks_for_ends(i):
                # nothing that a row would still commit after its end is kept
                self.rows = self.canvas.going(self.rows, self.settings.eos_token_id, self.denoiser.fixed_rows)

    def until_filled(self, window: slice) -> None:
        """Fill a block in as many steps as the threshold asks for; a step asks once what is left."""
        self._begin(window)
        while True:
            masked = self.canvas.masked
            finite = self.denoiser.watch.fine(masked.device).expand(len(masked))
            counts = torch.stack(
                [masked[:, window].sum(1), masked.sum(1), self.canvas.ended(self.settings.eos_token_id), finite]
            )
            left, self.left, ended, fine = counts.tolist()
            if not all(fine):  # what is not finite would never be committed
                raise self.denoiser.fault()
            if all(ended) or (self.denoiser.timeless and not self.denoiser.fixed_rows):
                self.rows = [row for row in self.rows if not ended[row]]
            rows = [row for row in self.rows if left[row] or self.denoiser.fixed_rows]
            if not any(left[row] for row in rows):
                return
            progress = 1 - max(self.left[row] for row in self.rows) / self.total
            step = self.canvas.step(len(self.denoiser.forwards), self.total, progress)
            self._commit(step, window, rows, left, None)

    def _begin(self, window: slice) -> None:
        """With a cache, a block is what is run in most of its steps: from its first mask on."""
        if self.windows is not None:
            first = self.canvas.masked[:, window].any(0).int().argmax()
            self.windows.begin(slice(window.start + int(first), window.stop))

    def _commit(
        self, step: Step, window: slice, rows: Sequence[int], left: Sequence[int], quota: list[int] | None
    ) -> None:
        """One step of some rows, of whose masks in the window so many are left."""
        part = self.canvas.part(rows)
        view, masks = part.sequences[:, window], self._masks(step, part, window, [left[row] for row in rows], quota)
        where = places(masks.looked[:, window], sum(masks.looks))
        if self.windows is not None:
            self.windows.keep(part.rows, masks)
        prediction = self._predict(step, part, (where[0], where[1] + window.start))
        found = prediction.read(self._reader(part, window, where, prediction.vocabulary))
        if len(found) > 1:  # how confident, which is NaN where any logit is
            self.denoiser.watch.add(found[1])
        chosen = view.index_put(where, found[0])
        confidence = torch.full_like(view, -torch.inf, dtype=torch.float32)
        confidence[where] = found[1] if len(found) > 1 else self._uniform(part, window)[where]
        if self.settings.focus:
            rows_of = on_device(part.rows, view.device)[where[0]]
            self.confidence[rows_of, where[1] + window.start] = confidence[where]
        if quota is None:
            commit_above(view, chosen, confidence, self.settings.threshold or 1.0)
        else:
            commit_top(view, chosen, confidence, quota)
        self.canvas.put(part)

    def _masks(self, step: Step, part: Part, window: slice, left: list[int], quota: list[int] | None) -> Masks:
        """The masks up to the window's end, and which of them are looked at."""
        masked, focus, windows = part.masked[:, : window.stop], self.settings.focus, self.windows
        if not focus or windows is None or windows.runs_everything(self.denoiser.at(step.progress)):
            return Masks(masked, left, masked, left)
        most = min(max([focus, *(quota or [])]), max(left))
        last = part.of(self.confidence)[:, : window.stop].where(masked, -torch.inf)
        last[:, : window.start] = -torch.inf
        best = most_confident(last, last.new_full((len(last),), most))
        return Masks(masked, left, masked & best, [min(count, most) for count in left])

    def _predict(self, step: Step, part: Part, where: tuple[Tensor, Tensor]) -> Prediction:
        """What the model predicts at `where`, rows and positions (n,) of the part."""
        x, mask, scale = part.sequences, part.attention_mask, self.settings.cfg_scale
        if scale == 0:
            return self.denoiser.predict(step, x, mask, where, windows=self.windows)
        without = x.masked_fill(part.of(self.given), part.mask)
        mask = None if mask is None else mask.repeat(2, 1)
        both = torch.cat([where[0], where[0] + len(x)]), where[1].repeat(2)
        prediction = self.denoiser.predict(step, torch.cat([x, without]), mask, both, windows=self.windows)
        return prediction.guided(lambda logits, unguided: guided(logits, unguided, scale))

    def _reader(self, part: Part, window: slice, where: tuple[Tensor, Tensor], words: int) -> Reader:
        """Reads the chosen token off logits and, unless tokens are committed at random, its probability."""
        settings = self.settings
        hot = settings.temperature > 0
        feed = self.noise.feed(self._draws(part, 0), words, where, part.rows, window) if hot else None

        def read(logits: Tensor, some: slice) -> tuple[Tensor, ...]:
            logits = logits.float()
            logits[:, part.mask] = -torch.inf  # or a position could be filled with a mask
            if self.never is not None:
                logits[:, self.never] = -torch.inf
            noisy = logits if feed is None else gumbel(logits, feed.take(len(logits)), settings.temperature)
            if feed is not None:  # 0 / 0 of a token that cannot be, under noise that is out of range
                noisy = noisy.nan_to_num_(0.0, torch.inf)
            chosen = largest(noisy)
            if settings.remasking == "random":
                self.denoiser.watch.add(logits)
                return (chosen,)
            for token in self.held_back:
                logits[:, token] = -torch.inf
            # not max - logsumexp, which is no faster and orders what is nearly certain by its rounding
            return chosen, probabilities_of(logits).gather(-1, chosen[:, None])[:, 0]

        return read

    def _uniform(self, part: Part, window: slice) -> Tensor:
        return self.noise.uniform(self._draws(part, 1), window=window, rows=part.rows, dtype=torch.float32)

    def _draws(self, part: Part, which: int) -> list[int]:
        # a row's masks left number its draws: equal for the same row in any batch
        return [2 * self.left[row] + which for row in part.rows]


class _Official:
    """The official code's commits: in the model's own dtype and over the whole row, so that ties are decided as there.

    It makes logits of all positions and draws noise for all of them.
    """

    finished = False  # it goes on after the end of text

    def __init__(self, denoiser: Denoiser, canvas: Canvas, settings: LLaDASettings):
        self.denoiser, self.canvas, self.settings = denoiser, canvas, settings
        self.given = canvas.sequences != canvas.mask
        self.generator = torch.Generator(canvas.sequences.device).manual_seed(settings.seed)
        self.eos, self.held_back = end_of_text(denoiser.model), held_back(denoiser)
        if settings.temperature > 0:  # forgotten by the official code
            self.held_back = [token for token in self.held_back if token != self.eos]

    def by_quota(self, window: slice, first: int, steps: int, total: int) -> None:
        """Fill a block in a fixed number of steps."""
        masks = self.canvas.masked[:, window].sum(1).tolist()
        for i in range(steps):
            logits = self._logits(self.canvas.step(first + i, total))
            chosen, confidence = self._choose(logits)
            confidence[:, window.stop :] = -torch.inf
            confidence = confidence.where(self.canvas.masked, -torch.inf)
            commit_top_officially(
                self.canvas.sequences, chosen, confidence, [quota_of(count, steps, i) for count in masks]
            )

    def _logits(self, step: Step) -> Tensor:
        canvas, scale = self.canvas, self.settings.cfg_scale
        if scale == 0:
            return self.denoiser(step, canvas.sequences, canvas.attention_mask)
        without = canvas.sequences.masked_fill(self.given, canvas.mask)
        mask = None if canvas.attention_mask is None else canvas.attention_mask.repeat(2, 1)
        logits, unguided = self.denoiser(step, torch.cat([canvas.sequences, without]), mask).chunk(2)
        return guided(logits, unguided, scale)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen token of every position of `logits` (batch, length, vocabulary), and how confident it is."""
        settings = self.settings
        if settings.logits_eos_inf and self.eos is not None:
            logits[..., self.eos] = -torch.inf
        noisy = logits
        if settings.temperature > 0:
            noisy = gumbel(logits, self._uniform(logits.shape, torch.float64), settings.temperature)
        chosen = noisy.argmax(-1)
        for token in self.held_back if settings.confidence_eos_eot_inf else ():
            logits[..., token] = -torch.inf
        if settings.remasking == "random":
            return chosen, self._uniform(chosen.shape, torch.float32)
        return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]

    def _uniform(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.rand(shape, dtype=dtype, generator=self.generator, device=self.generator.device)


def gumbel(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Gumbel-max as LLaDA has it: the argmax of exp(z) / (-log U)^temperature, in float64, is a draw."""
    return logits.double().exp() / (-uniform.log()) ** temperature


def held_back(denoiser: Denoiser) -> list[int]:
    """Tokens that `confidence_eos_eot_inf` commits last: the end of a text, the end of a turn."""
    tokens = end_of_text(denoiser.model), getattr(denoiser.model.config, "eot_token_id", None)
    return [token for token in tokens if token is not None]
