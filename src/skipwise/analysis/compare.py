"""`compare`: two models of equal shape on the same texts, layer by layer (initialisation bias).

Source: "Skip to the Good Part" (arXiv 2603.07475) finds that a diffusion model initialised from an autoregressive one
still represents text as its parent does. Here the two are held beside each other: CKA and cosine of every pair of their
boundary states, of which the diagonal are corresponding layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from skipwise.analysis.processes import add_up, my_share
from skipwise.analysis.record import Record, read_record, write_record
from skipwise.analysis.samples import batches, first_batch, tokenize
from skipwise.analysis.states import StateReader, outlier_channels
from skipwise.analysis.statistics import Statistics
from skipwise.blocks import find_contract
from skipwise.calibration import Text, fingerprint
from skipwise.errors import UserError
from skipwise.models import kind_of
from skipwise.plan import ModelShape
from skipwise.skipping import whole
from skipwise.versions import versions
from skipwise.wrapping import unwrap


@dataclass(frozen=True)
class Comparison:
    """Two models' boundary states beside each other. With n blocks each, all float64, row i the first model's boundary
    state i, column j the second's state j; the diagonal are corresponding layers.

      cka (n+1, n+1)              linear CKA (unbiased minibatch form): alike up to rotation and scale
      similarity (n+1, n+1)       mean cosine over tokens, without any alignment: alike channel by channel, which
                                  only models with a common origin are
      similarity_without_outliers (n+1, n+1)   the same with the outlier channels of both set to zero
      outlier_channels (c,)       int64
      first_cka, second_cka (n+1, n+1)   CKA within each model, to hold the others against
    """

    names: tuple[str, str]
    models: tuple[ModelShape, ModelShape]
    kinds: tuple[str, str]
    tensors: dict[str, Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def corresponding(self) -> Tensor:
        """(n+1,): CKA of each boundary state of the first model with the same one of the second."""
        return self.tensors["cka"].diagonal()

    def save(self, folder: str | Path) -> Path:
        """Write comparison.json and comparison.safetensors into `folder`, an analysis's if you like, and return it."""
        facts = Facts(
            names=self.names,
            models=self.models,
            kinds=self.kinds,
            calibration=self.calibration,
            settings=self.settings,
            versions=self.versions,
        )
        return write_record(folder, "comparison", facts, self.tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """Read what `save` wrote. Raises UserError for a folder that holds no comparison."""
        facts, tensors = read_record(folder, "comparison", Facts, "skipwise analyze MODEL --beside OTHER")
        return cls(**facts.own(), tensors=tensors)


class Facts(Record):
    """What comparison.json says."""

    format: Literal["skipwise-comparison/1"] = "skipwise-comparison/1"
    names: tuple[str, str]
    models: tuple[ModelShape, ModelShape]
    kinds: tuple[str, str]
    calibration: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def compare(
    first: nn.Module,
    second: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    names: tuple[str, str] | None = None,
    max_tokens: int = 512,
    batch_size: int = 64,
    outliers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """CKA and cosine between the layers of two models of equal depth and width that read the same texts.

    Both read the clean texts, a diffusion model too, as nothing else is the same input to both. tokenizer: of either,
    whose ids both understand. Shared out over processes, and `max_tokens`, `batch_size`, `outliers` and `on_progress`,
    as in `analyze`; the outlier channels are those of both models together.
    Raises UserError for models of unequal shape, for ids that one of them does not know, and for an empty list of
    texts.
    """
    models = (unwrap(first), unwrap(second))
    samples = tokenize(tokenizer, texts, max_tokens)
    shapes = [find_contract(model).shape for model in models]
    blocks = _equal_shape(models)
    _check_vocabulary(models, max(max(sample.ids) for sample in samples))
    mine = my_share(batches(samples, batch_size))
    with _both(models) as read, torch.no_grad():
        channels = outlier_channels(torch.stack(read(first_batch(samples).ids)).flatten(1, 2), outliers).cpu()
        statistics = Statistics(("layers", "cka"), 2 * blocks + 1, channels, max(len(s.ids) for s in samples))
        for done, batch in enumerate(mine):
            statistics.add(read(batch.ids))
            if on_progress:
                on_progress(done + 1, len(mine))
    add_up(statistics.sums)
    return Comparison(
        names=names or (type(first).__name__, type(second).__name__),
        models=(shapes[0], shapes[1]),
        kinds=(kind_of(first), kind_of(second)),
        tensors=_across(statistics, blocks + 1) | ({"outlier_channels": channels} if outliers else {}),
        calibration=fingerprint(samples),
        settings={"max_tokens": max_tokens, "outliers": outliers},
        versions=versions(),
    )


def _equal_shape(models: tuple[nn.Module, nn.Module]) -> int:
    """The number of blocks of both."""
    contracts = [find_contract(model) for model in models]
    depths = [contract.stacks[contract.main_stack].length for contract in contracts]
    widths = [contract.hidden_size for contract in contracts]
    for what, (one, other) in (("blocks", depths), ("channels", widths)):
        if one != other:
            raise UserError(
                f"Only models of equal shape can be compared: the first has {one} {what}, the second {other}."
            )
    return depths[0]


def _check_vocabulary(models: tuple[nn.Module, nn.Module], largest: int) -> None:
    for model in models:
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        if size is not None and largest >= size:
            raise UserError(
                f"{type(model).__name__} knows {size} tokens, but the texts hold token {largest}; "
                "only models with one tokenizer can be compared."
            )


@contextmanager
def _both(models: tuple[nn.Module, nn.Module]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function: ids (batch, length) -> the boundary states of the first model, then those of the second."""
    with ExitStack() as stack:
        readers = []
        for model in dict.fromkeys(models):
            stack.enter_context(whole(model))
        for model in models:
            contract = find_contract(model)
            reader = StateReader(model, contract.stacks[contract.main_stack])
            readers.append(stack.enter_context(reader.reading()))

        def read(ids: Tensor) -> list[Tensor]:
            states: list[Tensor] = []
            for model, reader in zip(models, readers, strict=True):
                model(input_ids=ids.to(next(model.parameters()).device))
                states += [state.float() for state in reader.take()]
            return [state.to(states[0].device) for state in states]

        yield read


def _across(statistics: Statistics, n: int) -> dict[str, Tensor]:
    """Cut what was measured over both models' states, (2 n, 2 n), into quarters."""
    measured = statistics.tensors()
    across = {name: measured[name][:n, n:] for name in measured if name.startswith(("similarity", "cka"))}
    own = {"first_cka": measured["cka"][:n, :n], "second_cka": measured["cka"][n:, n:]} if "cka" in measured else {}
    return {name: tensor.contiguous() for name, tensor in (across | own).items()}
