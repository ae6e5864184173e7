"""The weights of single blocks, read from a checkpoint's safetensors files when they are needed and let go again.

A model is built without weights by `Shards.skeleton`: its parameters are on the meta device, while what a class
computes when it is built (rotary tables, position embeddings, which no checkpoint holds) is real, as it is for
`from_pretrained`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from skipwise.blocks import Contract, find_contract
from skipwise.errors import UserError, require, unknown
from skipwise.files import read_json
from skipwise.loading import DTYPES, Source, build_skeleton, check_plain, check_weights, find, readable_errors

SAMPLE = 4096  # bytes: of each tensor its first, middle and last are hashed
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
CODES = {  # safetensors' names of dtypes
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


Device = torch.device | str | None


class Place(NamedTuple):
    """Where a tensor belongs: the module that holds it, its name there, and its name in the checkpoint."""

    owner: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        return getattr(self.owner, self.attribute)

    @property
    def stored(self) -> bool:
        """Whether checkpoints hold it; other buffers are computed when a module is built."""
        return self.attribute not in self.owner._non_persistent_buffers_set


def places(module: nn.Module, prefix: str = "") -> Iterator[Place]:
    """All parameters and buffers of a module that is called `prefix` in the checkpoint."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for tensors in (owner._parameters, owner._buffers):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    yield Place(owner, attribute, ".".join(part for part in (prefix, path, attribute) if part))


class Weights(ABC):
    """Where the weights of a model's parts come from. `opened` counts how often each block was asked for by name."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self.bytes_read = 0

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Of all tensors, sorted."""

    @abstractmethod
    def fill(self, module: nn.Module, prefix: str = "", *, device: Device = None) -> None:
        """Give `module`, whose tensors are called `prefix`.*, its weights on `device`, by default the CPU."""

    @abstractmethod
    def release(self, module: nn.Module) -> None:
        """Put the module's parameters back on the meta device."""

    @abstractmethod
    def fill_outside(self, model: nn.Module, stacks: Iterable[str] | None = None, *, device: Device = None) -> None:
        """Give the model everything that is in no block of these lists, by default of all that can be planned."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the weights: a sha256 in hex digits."""

    @contextmanager
    def block(self, model: nn.Module, name: str, device: Device = None) -> Iterator[nn.Module]:
        """The block of this dotted path, with its weights inside of the `with` only."""
        block = model.get_submodule(name)
        self.opened[name] += 1
        self.fill(block, name, device=device)
        try:
            yield block
        finally:
            self.release(block)


@dataclass(frozen=True)
class Entry:
    """One tensor in one file, by the file's header; begin and end are bytes from the file's beginning."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards(Weights):
    """The safetensors files of a model's folder, with or without an index.

    dtype: what floating-point tensors become; modules that diffusers keeps in float32 stay in it, as they do in
    `from_pretrained(torch_dtype=...)`.
    """

    def __init__(self, source: Source, entries: Mapping[str, Entry], dtype: torch.dtype):
        super().__init__()
        self.source, self.entries, self.dtype = source, entries, dtype
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, name: str | Path, *, dtype: str | None = None, revision: str | None = None) -> "Shards":
        """name: what `skipwise.load` takes but a GGUF file: a model's folder, a pipeline's, or a hub id.

        dtype: "float32", "bfloat16" or "float16"; by default the one that most of the checkpoint is in.
        Raises UserError for a folder without safetensors or with several sets of them, and for a damaged file.
        """
        if dtype is not None and dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        check_plain(str(name), "fine-tuning")
        source = find(str(name), revision)
        check_weights(source)
        entries = {key: entry for path in _files(source) for key, entry in read_header(path).items()}
        return cls(source, entries, DTYPES[dtype] if dtype else _main_dtype(entries.values()))

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self.entries)

    @cached_property
    def contract(self) -> Contract:
        """The model's, found without weights."""
        return find_contract(self._bare)

    def skeleton(self) -> nn.Module:
        """The model without weights, in eval mode and without gradients: fill it before it runs."""
        accelerate = require("accelerate", "image")
        config = self._bare.config
        build: Callable[..., nn.Module] = getattr(type(self._bare), "from_config", type(self._bare))
        before, made = torch.get_default_dtype(), dict[int, tuple[Tensor, Tensor]]()
        torch.set_default_dtype(self.dtype)  # some tables are computed in the dtype of the model
        try:
            with accelerate.init_empty_weights(include_buffers=False):
                model = build(config)
        finally:
            torch.set_default_dtype(before)
        for place in places(model):
            if place.stored:
                _put(place, place.tensor.to("meta", self._dtype_of(place.name, place.tensor.dtype)), made)
        return model.eval().requires_grad_(False)

    def fill(self, module: nn.Module, prefix: str = "", *, device: Device = None) -> None:
        """Give `module`, whose tensors are called `prefix`.*, its weights on `device`, by default the CPU.

        Raises UserError, naming it, for a tensor that the checkpoint lacks or has in another shape.
        """
        self._fill(places(module, prefix), device)

    def fill_outside(self, model: nn.Module, stacks: Iterable[str] | None = None, *, device: Device = None) -> None:
        """Give the model everything that is in no block of these lists and that it does not have there yet.

        stacks: by default all that can be planned. Do this before the skeleton is run or its contract is looked up:
        some classes keep tables of what they computed, which would be left without data.
        """
        blocks = tuple(f"{stack}." for stack in (self.contract.stacks if stacks is None else stacks))
        self._fill((p for p in places(model) if not p.name.startswith(blocks)), device, again=False)

    def check(self, model: nn.Module) -> None:
        """Raise UserError, naming it, for a tensor of the skeleton that the files lack or have in another shape."""
        self._check([place for place in places(model) if place.stored])

    def release(self, module: nn.Module) -> None:
        """Put on the meta device what `fill` brought. Parameters are new ones: a graph may still hold the old."""
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for place in places(module):
            if place.stored:
                _put(place, torch.empty_like(place.tensor, device="meta"), made)

    def fingerprint(self) -> str:
        """A sha256 over the config (without the keys that begin with an underscore, but the class name) and of every
        tensor, whichever file it is in, name, dtype, shape and its first, middle and last 4096 bytes.

        It is the same as that of a model which is in memory as the checkpoint holds it.
        """
        return _digest(self.source.config, ((name, *self._summary(name)) for name in self.names))

    def _summary(self, name: str) -> tuple[str, tuple[int, ...], bytes]:
        entry = self.entries[name]
        parts = []
        with entry.path.open("rb") as file:
            for begin, end in _sampled(entry.end - entry.begin):
                file.seek(entry.begin + begin)
                parts.append(file.read(end - begin))
        return entry.dtype, entry.shape, b"".join(parts)

    def _fill(self, wanted: Iterable[Place], device: Device, again: bool = True) -> None:
        made: dict[int, tuple[Tensor, Tensor]] = {}
        todo, there = list(wanted), torch.device(device or "cpu").type
        self._check(todo)
        for place in todo:
            if place.stored and place.name in self.entries and (again or place.tensor.device.type != there):
                _put(place, self._read(place, device), made)
        for place in todo:  # tied weights: the checkpoint has one of the names
            if place.stored and place.name not in self.entries and id(place.tensor) in made:
                _put(place, place.tensor, made)
            elif not place.stored:
                place.owner._buffers[place.attribute] = place.tensor.to(device or "cpu")

    def _check(self, wanted: list[Place]) -> None:
        there = {id(place.tensor) for place in wanted if place.name in self.entries}
        missing = [p.name for p in wanted if p.stored and id(p.tensor) not in there]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{self.source.name} lacks {', '.join(missing[:3])}{more}. Is its config.json that of another model?"
            )
        for place in wanted:
            stored = self.entries[place.name].shape if place.stored and place.name in self.entries else None
            if stored not in (None, tuple(place.tensor.shape)):
                raise UserError(
                    f"{self.source.name} has {place.name} in shape {stored}, the model in "
                    f"{tuple(place.tensor.shape)}. Is its config.json that of another model?"
                )
        lost = next((p.name for p in wanted if not p.stored and p.tensor.is_meta), None)
        if lost:
            raise UserError(
                f"{lost} is computed when a model is built, and this one was built on the meta device; "
                "take the model that Shards.skeleton() gives."
            )

    def _read(self, place: Place, device: Device) -> Tensor:
        entry = self.entries[place.name]
        with readable_errors(self.source):
            if entry.path not in self._files:
                self._files[entry.path] = safe_open(entry.path, framework="pt", device="cpu")
            tensor: Tensor = self._files[entry.path].get_tensor(place.name)
        self.bytes_read += entry.end - entry.begin
        return tensor.to(device or "cpu", self._dtype_of(place.name, tensor.dtype))

    def _dtype_of(self, name: str, stored: torch.dtype) -> torch.dtype:
        if not stored.is_floating_point:
            return stored
        return torch.float32 if self._kept_in_float32.intersection(name.split(".")) else self.dtype

    @cached_property
    def _bare(self) -> Any:
        return build_skeleton(self.source.config, self.source.name)

    @cached_property
    def _kept_in_float32(self) -> set[str]:
        """Parts of names. transformers' own list of this name is for float16 alone."""
        diffusers = "_class_name" in self.source.config
        kept = getattr(self._bare, "_keep_in_fp32_modules" if diffusers else "_keep_in_fp32_modules_strict", None)
        return {kept} if isinstance(kept, str) else set(kept or ())


class Resident(Weights):
    """The plain twin of `Shards`, for a model that is whole in memory: there is nothing to bring or to let go."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self.model.state_dict())

    def fill(self, module: nn.Module, prefix: str = "", *, device: Device = None) -> None:
        """Its weights are there."""

    def release(self, module: nn.Module) -> None:
        """They stay."""

    def fill_outside(self, model: nn.Module, stacks: Iterable[str] | None = None, *, device: Device = None) -> None:
        """They are there too."""

    def fingerprint(self) -> str:
        """As `Shards.fingerprint`, of the tensors in memory. Take it before an adapter is added, which renames them."""
        config: Any = getattr(self.model, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        config |= {"_class_name": type(self.model).__name__}
        return _digest(config, ((name, *_summary(tensor)) for name, tensor in sorted(self.model.state_dict().items())))


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by tensor name. Raises UserError for a file that is damaged or cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if length < path.stat().st_size else b"")
        header.pop("__metadata__", None)
        entries = {
            name: Entry(path, e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for name, e in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or cut short; copy or download it again.") from error
    if max((entry.end for entry in entries.values()), default=0) > path.stat().st_size:
        raise UserError(f"{path} is cut short; copy or download it again.")
    return entries


def _files(source: Source) -> list[Path]:
    """The files of the one checkpoint that the folder holds."""
    indices = sorted(source.folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        try:
            names = set(read_json(indices[0])["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{indices[0]} cannot be read as an index; copy or download it again.") from error
        paths = [source.folder / Path(name).name for name in sorted(names)]
        absent = next((path for path in paths if not path.is_file()), None)
        if absent:
            raise UserError(f"{source.name} lacks {absent.name}, which {indices[0].name} names; download it again.")
        return paths
    single = [source.folder / name for name in NAMES if (source.folder / name).is_file()]
    files = single or sorted(source.folder.glob("*.safetensors"))
    if len(files) != 1 or indices:
        found = ", ".join(path.name for path in indices or files)
        raise UserError(f"{source.name} holds several checkpoints ({found}); leave one of them in a folder of its own.")
    return files


def _main_dtype(entries: Iterable[Entry]) -> torch.dtype:
    """That of most bytes, among the floating-point ones."""
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.end - entry.begin
    usable = {code: sizes[code] for code, dtype in CODES.items() if sizes[code] and dtype.is_floating_point}
    if not usable:
        raise UserError(f"The checkpoint holds {', '.join(sizes) or 'nothing'}, none of it in floating point.")
    return CODES[max(usable, key=lambda code: usable[code])]


def _put(place: Place, tensor: Tensor, made: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put a tensor in its place. Parameters stay parameters, and those that are one stay one.

    made: by the id of what was in a place, that and what is there now.
    """
    before = place.tensor
    if id(before) not in made:
        is_parameter = place.attribute in place.owner._parameters
        new = nn.Parameter(tensor, requires_grad=before.requires_grad) if is_parameter else tensor
        made[id(before)] = before, new
    new = made[id(before)][1]
    if isinstance(new, nn.Parameter):
        place.owner._parameters[place.attribute] = new
    else:
        place.owner._buffers[place.attribute] = new


def _sampled(size: int) -> list[tuple[int, int]]:
    """The ranges of bytes of a tensor that are hashed."""
    if size <= 3 * SAMPLE:
        return [(0, size)]
    middle = size // 2
    return [(0, SAMPLE), (middle, middle + SAMPLE), (size - SAMPLE, size)]


def _summary(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    parts = [flat[begin:end].cpu().numpy().tobytes() for begin, end in _sampled(flat.numel())]
    code = next((code for code, dtype in CODES.items() if dtype == tensor.dtype), str(tensor.dtype))
    return code, tuple(tensor.shape), b"".join(parts)


def _digest(config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    said = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    total = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, dtype, shape, content in tensors:
        total.update(f"{name} {dtype} {shape} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()
