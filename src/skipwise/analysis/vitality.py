"""How much the subject of a picture suffers when a block does not see the subject's words.

Source: DiT-BlockSkip (arXiv 2603.20755), which selects the blocks to train by masking, block by block, the attention
from the image to the subject's text tokens. The text we have gives no formula: what is measured here, and by what it
is divided, is ours.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten_with_path

from skipwise.blocks import Contract, find_contract, module_list
from skipwise.errors import UserError, unknown
from skipwise.masking import TEXT, Queries, Tokens, forwards, subject_masked

Block = tuple[str, int]  # stack name and number
Sample = Mapping[str, Any]  # keyword arguments of one forward
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BlockScores:
    """What masking the subject in each block does to the prediction; stack name -> one number a block.

    All are mean squared changes, divided by the mean square of the whole prediction: fractions, without a unit.
    inside: over the subject's places; outside: over the background; score: inside - outside. Without a mask of the
    subject, inside and score are the change of the whole prediction, and outside is empty.
    """

    score: Mapping[str, tuple[float, ...]]
    inside: Mapping[str, tuple[float, ...]]
    outside: Mapping[str, tuple[float, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)


def score_vital(
    model: nn.Module,
    samples: Sequence[Sample],
    tokens: Tokens,
    subject: Sequence[Tensor] | None = None,
    *,
    window: int = 1,
    queries: Queries = "image",
    stacks: Sequence[str] | None = None,
    text: str = TEXT,
    example: Sample | None = None,
    on_progress: Progress | None = None,
) -> BlockScores:
    """Mask the subject in every block, or in every `window` of consecutive blocks, and see what becomes of it.

    samples: the keyword arguments of one forward each, such as noised latents at several t with the prompt's text, of
    any batch size. tokens: positions of the subject in the text (`skipwise.prompts.token_positions`), the same for all
    samples or one list a sample. subject: where the subject is, one mask a sample, (height, width) or (batch, height,
    width), 0 to 1, at the resolution of the picture or any other. A block's score is the mean over the windows that
    hold it, then over the samples. stacks: those that are scored, all by default. queries, text, example: as in
    `subject_masked`. A learned variance is no part of the prediction.
    Cost: samples x blocks forwards, of which those of the blocks before the masked ones are taken from an unmasked
    forward: about half. What all blocks of one sample put out is held meanwhile.
    Raises UserError for samples, tokens or masks that do not fit each other or the model.
    """
    contract = find_contract(model, example)
    order = in_order(contract, stacks)
    if not 1 <= window <= len(order):
        raise UserError(f"A window of {window} blocks does not fit; choose 1 to {len(order)}.")
    each = _of_each(samples, tokens, subject)
    windows = [order[start : start + window] for start in range(len(order) - window + 1)]
    inside, outside = (torch.zeros(len(samples), len(windows), dtype=torch.float64) for _ in range(2))
    for row, (sample, places) in enumerate(zip(samples, each, strict=True)):
        trial = _Trial(model, contract, sample, places, {"text": text, "queries": queries, "example": example})
        where = None if subject is None else _weights(subject[row], trial.base, sample)
        for column, masked in enumerate(windows):
            inside[row, column], outside[row, column] = _regions(trial.change(masked), where)
            if on_progress:
                on_progress("mask blocks", row * len(windows) + column + 1, len(samples) * len(windows))
    insides, outsides = (_by_block(values.mean(0), order, window) for values in (inside, outside))
    score = {stack: tuple(a - b for a, b in zip(insides[stack], outsides[stack], strict=True)) for stack in insides}
    settings = {"window": window, "queries": queries, "subject_masks": subject is not None}
    return BlockScores(score, insides, {} if subject is None else outsides, settings, _facts(samples, each, subject))


def in_order(contract: Contract, stacks: Sequence[str] | None = None) -> list[Block]:
    """The blocks of these stacks, or of all, in the order in which a forward comes to them."""
    for name in stacks or ():
        if name not in contract.stacks:
            raise unknown("stack", name, contract.stacks)
    names = [name for name in contract.stacks if stacks is None or name in stacks]
    return [(name, number) for name in names for number in range(contract.stacks[name].length)]


class _Trial:
    """One sample: its prediction, and how the prediction changes when the subject is masked in some blocks."""

    def __init__(
        self, model: nn.Module, contract: Contract, sample: Sample, tokens: Sequence[int], settings: dict[str, Any]
    ):
        self.model, self.sample, self.tokens, self.settings = model, sample, tokens, settings
        self.order = in_order(contract)
        self.results: dict[Block, Any] = {}
        with _noting(model, self.order, self.results):
            self.base = self._predict()
        self.evaluated = len(self.order)  # blocks run, to be held beside the naive count

    def change(self, blocks: Sequence[Block]) -> Tensor:
        """(batch, *space): squared change of the prediction, over the mean square of the prediction."""
        masked: dict[str, list[int]] = {}
        for stack, number in blocks:
            masked.setdefault(stack, []).append(number)
        before = self.order[: self.order.index(blocks[0])]
        self.evaluated += len(self.order) - len(before)
        known = {module_list(self.model, stack)[n]: _answer(self.results[stack, n]) for stack, n in before}
        with forwards(known), subject_masked(self.model, masked, self.tokens, **self.settings):
            change = (self._predict() - self.base).square()
        return change.mean(_channels(change)) / self.base.square().mean().clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _predict(self) -> Tensor:
        result = self.model(**self.sample)
        main = result if isinstance(result, Tensor) else result[0]
        prediction = (torch.stack(main) if isinstance(main, list) else main).float()
        config: Any = getattr(self.model, "config", None)
        channels = getattr(config, "in_channels", None)
        if channels and getattr(config, "out_channels", None) == 2 * channels:  # PixArt, DiT: the rest is a variance
            return prediction.narrow(_channels(prediction), 0, channels)
        return prediction


def _answer(result: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: result


def _channels(prediction: Tensor) -> int:
    """The dimension of the channels: of packed tokens (batch, tokens, channels) the last, of pictures the second."""
    return 2 if prediction.ndim == 3 else 1


@contextmanager
def _noting(model: nn.Module, order: Sequence[Block], results: dict[Block, Any]) -> Iterator[None]:
    """Note what every block returns."""
    with ExitStack() as hooks:
        for stack, number in order:

            def note(module: nn.Module, args: tuple, result: Any, block: Block = (stack, number)) -> None:
                results[block] = result

            hooks.callback(module_list(model, stack)[number].register_forward_hook(note).remove)
        yield


def _of_each(samples: Sequence[Sample], tokens: Tokens, subject: Sequence[Tensor] | None) -> list[list[int]]:
    """The subject's tokens of each sample."""
    shared = not len(tokens) or not isinstance(tokens[0], Sequence)
    each = [list(tokens)] * len(samples) if shared else [list(row) for row in tokens]  # type: ignore[arg-type]
    if not samples or len(each) != len(samples):
        raise UserError(f"There are {len(samples)} samples and tokens for {len(each)}; give as many, at least one.")
    if not all(each):
        raise UserError("A sample has no tokens of the subject; find them with skipwise.prompts.token_positions.")
    if subject is not None and len(subject) != len(samples):
        raise UserError(f"There are {len(samples)} samples and {len(subject)} masks of the subject; give one a sample.")
    return each  # type: ignore[return-value]


def _weights(mask: Tensor, prediction: Tensor, sample: Sample) -> Tensor:
    """(batch, *space): a mask of the picture in the space of the prediction, by averaging over areas."""
    if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) not in (1, len(prediction))):
        raise UserError(f"A mask of the subject has shape {tuple(mask.shape)}; give (height, width) of the picture.")
    space = prediction.shape[1:2] if prediction.ndim == 3 else prediction.shape[2:]
    if len(space) == 1 and (sample.get("num_frames") or 1) > 1:
        raise UserError("Masks of the subject are for pictures; this model packs a video. Leave subject= out.")
    pictures = mask.float().to(prediction.device).reshape(-1, 1, *mask.shape[-2:])
    grid = _grid(space[0], mask) if len(space) == 1 else (space[-2], space[-1])
    small = F.adaptive_avg_pool2d(pictures, grid).clamp(0, 1)  # (batch or 1, 1, rows, columns)
    small = small.flatten(2)[:, 0] if len(space) == 1 else small[:, 0] if len(space) == 2 else small
    weights = small.expand(len(prediction), *space)
    if not 0 < float(weights.mean()) < 1:
        raise UserError("A mask of the subject is empty or covers the whole picture; mark the subject alone.")
    return weights


def _grid(tokens: int, mask: Tensor) -> tuple[int, int]:
    """Rows and columns of packed tokens, by the shape of the picture."""
    height, width = mask.shape[-2:]
    rows = min((n for n in range(1, tokens + 1) if tokens % n == 0), key=lambda n: abs(n * n * width - tokens * height))
    if not 0.9 < rows * rows * width / (tokens * height) < 1.1:
        raise UserError(f"A mask of {height} x {width} does not have the shape of a picture of {tokens} tokens.")
    return rows, tokens // rows


def _regions(change: Tensor, weights: Tensor | None) -> tuple[float, float]:
    """Mean change inside of the subject and outside; of the whole, and nothing, without weights."""
    if weights is None:
        return float(change.mean()), 0.0
    inside = (change * weights).sum() / weights.sum()
    return float(inside), float((change * (1 - weights)).sum() / (1 - weights).sum())


def _by_block(values: Tensor, order: Sequence[Block], window: int) -> dict[str, tuple[float, ...]]:
    """values: (windows,). The mean over the windows that hold a block, by stack."""
    of_block = [values[max(0, place - window + 1) : place + 1].mean().item() for place in range(len(order))]
    return {
        name: tuple(value for value, (stack, _) in zip(of_block, order, strict=True) if stack == name)
        for name in dict(order)
    }


def _facts(samples: Sequence[Sample], tokens: list[list[int]], subject: Sequence[Tensor] | None) -> dict[str, Any]:
    """What a plan remembers of the samples it was made with."""
    digest = hashlib.sha256()
    leaves, _ = tree_flatten_with_path(
        [dict(sorted(sample.items())) for sample in samples] + [tokens, list(subject or [])]
    )
    for path, leaf in leaves:
        digest.update(f"{path} ".encode())
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return {"sha256": digest.hexdigest(), "samples": len(samples)}
