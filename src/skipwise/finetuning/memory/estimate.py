"""Peak memory of a fine-tuning, by part, from the model's config alone: no weight is allocated.

One training step is played on fake tensors (see `simulation`); weights, adapter and optimiser state are counted. This
estimates what torch's allocator hands out at the peak. Kernels' workspaces, fragments and the context of the device
come on top: see `fitting.needed`.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from skipwise.blocks import Contract, find_contract, module_list
from skipwise.errors import UserError
from skipwise.examples import Size
from skipwise.finetuning.families import family_of
from skipwise.finetuning.family import Family
from skipwise.finetuning.hollow import stored_runs
from skipwise.finetuning.lora import lora_sizes
from skipwise.finetuning.memory.encoders import components, encoding_peak, pipeline_index, scale_of, weights_of
from skipwise.finetuning.memory.making import making_peak
from skipwise.finetuning.memory.simulation import (
    UNCACHE,
    Course,
    Group,
    Stage,
    groups_of,
    repeats_of,
)
from skipwise.finetuning.peak import Bytes, compose
from skipwise.finetuning.precision import lora_dtype
from skipwise.finetuning.runs import Run, Train, everything
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.loading import DTYPES, check_plain, load_skeleton

# bitsandbytes' 8-bit optimisers: two states of a byte an element, a float32 for each block of elements and state;
# tensors of fewer elements keep float32 states
BLOCK_OF_8BIT, LEAST_OF_8BIT = 256, 4096


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated peak memory of a fine-tuning, in bytes.

    training: at the highest moment of a training step; making: of making residuals, zero where none are stored;
    encoding: of encoding pictures, zero where the autoencoder is not known. The three follow each other on the device.
    text_encoders: bytes of weights of each, which run on the host. record: what is stored of one draw.
    lora_parameters: elements; trained: how many blocks are trained.
    """

    model: str
    settings: FinetuneSettings
    train: Train
    training: Bytes
    making: Bytes
    encoding: Bytes
    text_encoders: Mapping[str, int]
    record: int
    lora_parameters: int

    @property
    def peak(self) -> int:
        """The most that the device holds at any time, in bytes."""
        return max(self.training.total, self.making.total, self.encoding.total)

    @property
    def trained(self) -> int:
        """Number of blocks that are trained."""
        return sum(map(len, self.train.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        stages = {name: getattr(self, name) for name in ("training", "making", "encoding")}
        return {
            "label": "estimated",
            "model": self.model,
            "settings": asdict(self.settings),
            "train": {name: list(numbers) for name, numbers in self.train.items()},
            "peak_bytes": self.peak,
            **{name: {"total": amount.total, **amount.as_dict()} for name, amount in stages.items()},
            "text_encoders_on_the_host": dict(self.text_encoders),
            "bytes_a_draw": self.record,
            "lora_parameters": self.lora_parameters,
        }


def estimate_memory(
    model: str | nn.Module, settings: FinetuneSettings | None = None, train: Train | None = None
) -> MemoryEstimate:
    """Estimate a fine-tuning's peak memory from a preset, folder, hub id or model (only its config is used).

    train: stack -> numbers of the blocks that are trained, as in `Plan.train`; None trains all, which is ordinary LoRA.
    Raises UserError for what `load_skeleton` and `skipped_runs` refuse, and for LoRA targets that a block lacks.
    """
    return Estimator(model).estimate(settings, train)


class Estimator:
    """Estimates for one model. Steps of equal structure are played once, so that further estimates are arithmetic."""

    def __init__(self, model: str | nn.Module):
        self.name = model if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            check_plain(model, "fine-tuning")
        self.model = load_skeleton(model) if isinstance(model, str) else _skeleton_of(model)
        self._stage = Stage(self.model, self.size)
        self._courses: dict[Any, Course] = {}
        self._makings: dict[Any, Bytes] = {}
        self._encodings: dict[Any, Bytes] = {}
        self._records: dict[Any, int] = {}
        self._sizes: dict[str, dict[str, list[int]]] = {}
        self._known = isinstance(model, str)

    @property
    def contract(self) -> Contract:
        """Of the model."""
        return find_contract(self.model)

    @cached_property
    def components(self) -> dict[str, nn.Module]:
        """Text encoders and autoencoder on the meta device, where they are known."""
        found = components(self.name) if self._known else {}
        return {part: component.skeleton() for part, component in found.items()}

    def size(self, settings: FinetuneSettings) -> Size:
        """Of one forward."""
        if self.family:
            text = self.family.text_length(settings.text_tokens)
        elif settings.text_tokens:
            text = settings.text_tokens
        else:
            raise UserError(
                f"How many text tokens {type(self.model).__name__} takes is not known; say it as text_tokens, such "
                "as --set text_tokens=512."
            )
        return Size(image=max(settings.pixels // self._scale, 1), text=text, batch=settings.batch)

    @cached_property
    def family(self) -> Family | None:
        """Of the pipeline, or of the transformer alone; None of a model that cannot be fine-tuned here."""
        index = pipeline_index(self.name) if self._known else None
        for source in (index, self.model):
            with suppress(UserError):
                return family_of(source)
        return None

    @cached_property
    def _scale(self) -> int:
        """Pixels a latent pixel."""
        if "vae" in self.components:
            return scale_of(self.components["vae"])
        return self.family.scale if self.family else 8

    def block_bytes(self, dtype: str) -> dict[str, list[int]]:
        """Stack -> bytes of the weights of each block."""
        if dtype not in self._sizes:
            lists = {name: module_list(self.model, name) for name in self.contract.stacks}
            sizes = {name: [weights_of(block, DTYPES[dtype]) for block in blocks] for name, blocks in lists.items()}
            self._sizes[dtype] = sizes
        return self._sizes[dtype]

    def at_least(self, settings: FinetuneSettings, train: Train) -> int:
        """Bytes below which no training goes: weights, LoRA, its gradients and the optimiser's state. Arithmetic."""
        groups = groups_of(self.model, self.contract, train, settings.late)
        sizes = self._lora_sizes(settings, groups)
        lora = sum(sizes) * lora_dtype(settings).itemsize
        return self._weights(settings, groups) + 2 * lora + optimiser_bytes(settings, sizes)

    def estimate(self, settings: FinetuneSettings | None = None, train: Train | None = None) -> MemoryEstimate:
        """As `estimate_memory`."""
        settings = settings or FinetuneSettings()
        train = everything(self.contract) if train is None else train
        groups = groups_of(self.model, self.contract, train, settings.late)
        stored = stored_runs(self.contract, train, settings.late)
        return MemoryEstimate(
            model=self.name,
            settings=settings,
            train=train,
            training=self._training(settings, train, groups, stored),
            making=self._making(settings, stored),
            encoding=self._encoding(settings),
            text_encoders={
                name: weights_of(part, DTYPES[settings.dtype])
                for name, part in self.components.items()
                if name.startswith("text_encoder")
            },
            record=self._record(settings, stored),
            lora_parameters=sum(self._lora_sizes(settings, groups)),
        )

    def _training(
        self, settings: FinetuneSettings, train: Train, groups: tuple[Group, ...], stored: tuple[Run, ...]
    ) -> Bytes:
        same = settings.but(optimiser="adamw", resolution=settings.pixels, patch=None)  # none of these is in a course
        key = same, _structure(groups), _places(self.contract, stored)
        if key not in self._courses:
            self._courses[key] = self._stage.play(settings, train)
        course = self._courses[key]
        sizes, run = self._lora_sizes(settings, groups), self._lora_sizes(settings, _shortened(groups))
        lora = sum(sizes) * lora_dtype(settings).itemsize
        held = course.start.as_dict()
        start = Bytes.of(
            weights=self._weights(settings, groups),
            lora=lora,
            optimiser=optimiser_bytes(settings, sizes),
            inputs=held["inputs"],
            residuals=held["residuals"],
        )
        repeats: dict[str, float] = {**repeats_of(groups), UNCACHE: sum(sizes) / sum(run)}
        peak, end = compose(course.segments, repeats, start)
        # torch's AdamW takes the roots of all second moments at once; bitsandbytes' kernel needs nothing
        step = end + Bytes.of(activations=lora if settings.optimiser == "adamw" else 0)
        return max(peak, step, key=lambda amount: amount.total)

    def _weights(self, settings: FinetuneSettings, groups: Sequence[Group]) -> int:
        """Of what is resident: all outside of the blocks, trained and frozen blocks; streamed ones come and go."""
        of_blocks = self.block_bytes(settings.dtype)
        outside = weights_of(self.model, DTYPES[settings.dtype]) - sum(map(sum, of_blocks.values()))
        resident = (group for group in groups if group.role != "streamed")
        return outside + sum(of_blocks[group.stack][n] for group in resident for n in group.numbers)

    def _lora_sizes(self, settings: FinetuneSettings, groups: Sequence[Group]) -> list[int]:
        sizes: list[int] = []
        for group in groups:
            if group.role == "trained":
                block = module_list(self.model, group.stack)[group.numbers[0]]
                sizes += lora_sizes(block, settings.targets, settings.rank) * len(group.numbers)
        return sizes

    def _making(self, settings: FinetuneSettings, stored: tuple[Run, ...]) -> Bytes:
        key = settings.pixels, settings.dtype, settings.text_tokens, stored[-1:]
        if key not in self._makings:
            self._makings[key] = making_peak(self._stage, settings.but(precision="pure"), stored)
        return self._makings[key]

    def _encoding(self, settings: FinetuneSettings) -> Bytes:
        key = settings.dtype, settings.resolution
        if key not in self._encodings:
            vae = self.components.get("vae")
            none = Bytes()
            self._encodings[key] = encoding_peak(vae, DTYPES[settings.dtype], settings.resolution) if vae else none
        return self._encodings[key]

    def _record(self, settings: FinetuneSettings, stored: tuple[Run, ...]) -> int:
        key = settings.pixels, settings.text_tokens, _places(self.contract, stored)
        if key not in self._records:
            shapes = self._stage.record_shapes(settings.but(batch=1), stored)
            self._records[key] = sum(math.prod(shape) for row in shapes.values() for shape in row if shape)
        return self._records[key] * DTYPES[settings.dtype].itemsize


def optimiser_bytes(settings: FinetuneSettings, sizes: Sequence[int]) -> int:
    """Bytes of the optimiser's state for tensors of these numbers of elements."""
    if settings.optimiser == "adamw":
        return 2 * sum(sizes) * lora_dtype(settings).itemsize
    return sum(
        2 * size + 2 * 4 * math.ceil(size / BLOCK_OF_8BIT) if size >= LEAST_OF_8BIT else 2 * 4 * size for size in sizes
    )


def _skeleton_of(model: Any) -> nn.Module:
    if not hasattr(model, "from_config"):
        raise UserError(f"{type(model).__name__} is no model of diffusers; fine-tuning is for its transformers.")
    with torch.device("meta"):
        return type(model).from_config(model.config).eval()


def _structure(groups: Sequence[Group]) -> tuple[Any, ...]:
    """What of the groups decides how a shortened step goes."""
    return tuple((group.stack, group.role, group.kind, len(group.shortened)) for group in groups)


def _shortened(groups: Sequence[Group]) -> list[Group]:
    return [Group(group.stack, group.role, group.kind, group.shortened) for group in groups]


def _places(contract: Contract, runs: Sequence[Run]) -> tuple[Any, ...]:
    """What of the stored runs decides how much is held of them."""
    return tuple((run.stack, run.early, run.start == 0, run.stop == contract.stacks[run.stack].length) for run in runs)
