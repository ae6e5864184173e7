"""The residual store: what skipped blocks give for each draw, made once with the frozen model, in files.

A folder holds `store.json`, the settings that all records were made with, and `records-*.safetensors`. Each of these is
written whole or not at all. A record is found by what its draw is (`DrawKey`), never by its place in some order, and
has a checksum that is verified when it is read; the part of a file that says where its records are is checked against
the file's name when the store is opened. So no flipped byte gets into a training.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipwise.errors import UserError
from skipwise.files import check_writable, partial_file, read_json, remove_partials, write_atomically
from skipwise.finetuning.draws import Draw
from skipwise.finetuning.hollow import Record, Streams

FORMAT = "skipwise-residuals/1"
SHARD = 512 << 20  # bytes of records in one file
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NEEDED = ("base", "runs", "dtype")


@dataclass(frozen=True)
class DrawKey:
    """What one training sample is: sha256 of the picture's file, and what was cut and mirrored, crop (left, top, side)
    in its pixels, noise level, seed of the noise, prompt. `digest` is what its record is called.
    """

    image: str
    crop: tuple[int, int, int]
    timestep: float
    noise_seed: int
    prompt: str

    @classmethod
    def of(cls, draw: Draw) -> "DrawKey":
        """The key of a draw. The weight of its loss is no part of it."""
        crop = (draw.patch.left, draw.patch.top, draw.patch.side)
        image = draw.example.picture.identity + ("-flipped" if draw.flip else "")
        return cls(image, crop, float(draw.t), draw.noise_seed, draw.example.prompt)

    @cached_property
    def digest(self) -> str:
        """A sha256 in hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Records(Protocol):
    """Where a training gets its records from: a store, or a model that makes them as they are needed."""

    def missing(self, keys: Iterable[DrawKey]) -> list[DrawKey]:
        """The draws that have to be made before they can be read."""
        ...

    def read(self, keys: Sequence[DrawKey]) -> Record:
        """The record of a batch, one row for each key."""
        ...


@dataclass(frozen=True)
class _Entry:
    """A record in a file: its checksum, and run name -> number of its streams."""

    path: Path
    sha256: str
    streams: Mapping[str, int]


class ResidualStore:
    """A pool of records in a folder. `ResidualStore.create` and `ResidualStore.open` give one.

    settings: what the records depend on, as JSON can hold it, with at least `base` (the weights' fingerprint), `runs`
    (names) and `dtype` ("bfloat16" or "float32", what records are stored in).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shard_bytes: int):
        self.folder, self.settings, self.shard_bytes = folder, _as_json(settings), shard_bytes
        self.dtype = DTYPES[self.settings["dtype"]]
        self._files: dict[Path, Any] = {}
        self._entries: dict[str, _Entry] = {}
        self._shards = 0
        for path in sorted(folder.glob("records-*.safetensors")):
            self._add(path)

    @classmethod
    def create(cls, folder: str | Path, settings: Mapping[str, Any], *, shard_bytes: int = SHARD) -> "ResidualStore":
        """A new store, or the one that is there already, when it was made with the same settings.

        shard_bytes: how large one file may become; one record always fits. Raises UserError as `open` does, and for a
        folder that cannot be written or that holds something else.
        """
        folder = check_writable(folder)
        _check_settings(settings)
        remove_partials(folder)
        if (folder / "store.json").exists():
            _check_same(folder, settings)
        elif any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no residual store; choose a folder of its own.")
        else:
            content = {"format": FORMAT, "settings": _as_json(settings)}
            write_atomically(folder / "store.json", json.dumps(content, indent=2) + "\n")
        return cls(folder, settings, shard_bytes)

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any]) -> "ResidualStore":
        """The store in a folder.

        Raises UserError when there is none, when it was made with other settings or another base model (the first
        difference, both values), and when a file is damaged.
        """
        _check_settings(settings)
        _check_same(Path(folder), settings)
        return cls(Path(folder), settings, SHARD)

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self, keys: Iterable[DrawKey]) -> list[DrawKey]:
        """Those of the draws that the store does not hold, in their order, each once."""
        return [key for key in dict.fromkeys(keys) if key.digest not in self._entries]

    def add(self, records: Mapping[DrawKey, Record]) -> None:
        """Write records, each of one sample (a batch of 1). Those that are there already are left as they are.

        What is written is kept even when the process is killed. Raises UserError when the disk is full.
        """
        todo = self.missing(records)
        many = self.shard_records(_bytes_of(records[todo[0]], self.dtype)) if todo else 1
        for at in range(0, len(todo), many):
            self._write({key: records[key] for key in todo[at : at + many]})

    def shard_records(self, record_bytes: int) -> int:
        """How many records of this size go into one file."""
        return max(1, self.shard_bytes // max(1, record_bytes))

    def read(self, keys: Sequence[DrawKey]) -> Record:
        """The record of a batch: its rows are the draws of `keys`, in their order.

        Raises UserError for a draw that is not there, and for a record whose bytes are not those that were written.
        """
        absent = self.missing(keys)
        if absent:
            raise UserError(
                f"The store in {self.folder} lacks {len(absent)} of these {len(keys)} draws, the first of picture "
                f"{absent[0].image[:12]}... at t = {absent[0].timestep:g}; make them first, what is there is kept."
            )
        return joined([self._read(key) for key in keys])

    def _read(self, key: DrawKey) -> dict[str, Streams]:
        entry = self._entries[key.digest]
        try:
            if entry.path not in self._files:
                self._files[entry.path] = safe_open(entry.path, framework="pt", device="cpu")
            file = self._files[entry.path]
            names = set(file.keys())
            record = {
                run: tuple(
                    file.get_tensor(name) if (name := f"{key.digest}/{run}/{place}") in names else None
                    for place in range(count)
                )
                for run, count in entry.streams.items()
            }
        except (OSError, SafetensorError) as error:
            raise _damaged(entry.path, f"record {key.digest[:12]}... cannot be read ({error})") from error
        if _checksum(key, record) != entry.sha256:
            raise _damaged(entry.path, f"record {key.digest[:12]}... is not what was written")
        return record

    def _write(self, records: Mapping[DrawKey, Record]) -> None:
        stored = {key: rounded(record, self.dtype) for key, record in records.items()}
        tensors = {
            f"{key.digest}/{run}/{place}": stream
            for key, record in stored.items()
            for run, streams in record.items()
            for place, stream in enumerate(streams)
            if stream is not None
        }
        described = {
            key.digest: {
                "key": asdict(key),
                "sha256": _checksum(key, record),
                "streams": {run: len(streams) for run, streams in record.items()},
            }
            for key, record in stored.items()
        }
        self._add(self._save(tensors, {"records": json.dumps(described)}))

    def _save(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
        try:
            with partial_file(self.folder) as partial:
                save_file(tensors, partial, metadata)
                partial.chmod(0o644)
                path = self.folder / f"records-{self._shards:05d}-{_header(partial)[0]}.safetensors"
                os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Cannot write in {self.folder}: {error}. What is there stays; free some space and run it again."
            ) from error
        return path

    def _add(self, path: Path) -> None:
        """Take up the records of a file, whose head must be the one that it was written with."""
        number, said = path.stem.removeprefix("records-").partition("-")[::2]
        digest, content = _header(path)
        if digest != said or not number.isdecimal():
            raise _damaged(path, "its head is not what was written")
        described = json.loads(json.loads(content)["__metadata__"]["records"])
        for digest, entry in described.items():
            self._entries[digest] = _Entry(path, entry["sha256"], entry["streams"])
        self._shards = max(self._shards, int(number) + 1)


def joined(records: Sequence[Mapping[str, Streams]]) -> dict[str, Streams]:
    """One record of a batch from records of its rows. Raises UserError when they differ in shape."""
    return {run: tuple(_rows(run, column) for column in _columns(records, run)) for run in records[0]}


def _columns(records: Sequence[Mapping[str, Streams]], run: str) -> Iterator[Streams]:
    return zip(*(record[run] for record in records), strict=True)


def _rows(run: str, column: Streams) -> Tensor | None:
    rows = [stream for stream in column if stream is not None]
    shapes = {tuple(row.shape[1:]) for row in rows}
    if len(shapes) > 1 or len(rows) not in (0, len(column)):
        raise UserError(
            f"Records of {run} of different shapes {sorted(shapes)} make no batch; keep to one resolution and text."
        )
    return torch.cat(rows) if rows else None


def rounded(record: Record, dtype: torch.dtype) -> dict[str, Streams]:
    """The record on the host in a store's dtype."""
    return {
        run: tuple(None if s is None else s.detach().to("cpu", dtype).contiguous() for s in streams)
        for run, streams in record.items()
    }


def _bytes_of(record: Record, dtype: torch.dtype) -> int:
    return sum(s.numel() * dtype.itemsize for streams in record.values() for s in streams if s is not None)


def _checksum(key: DrawKey, record: Mapping[str, Streams]) -> str:
    """Over the key and, for every stream, where it belongs, dtype, shape and bytes."""
    total = hashlib.sha256(key.digest.encode())
    for run, streams in sorted(record.items()):
        for place, stream in enumerate(streams):
            if stream is not None:
                total.update(f"{run} {place} {stream.dtype} {tuple(stream.shape)}\n".encode())
                total.update(stream.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _header(path: Path) -> tuple[str, bytes]:
    """(checksum, JSON) of what a safetensors file begins with; the length that stands before it is summed as well."""
    with path.open("rb") as file:
        prefix = file.read(8)
        content = file.read(min(int.from_bytes(prefix, "little"), path.stat().st_size))
    return hashlib.sha256(prefix + content).hexdigest()[:16], content


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}. Delete this file and make the records again; the others are kept.")


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def _check_settings(settings: Mapping[str, Any]) -> None:
    absent = [name for name in NEEDED if name not in settings]
    if absent:
        raise UserError(f"The settings of a residual store lack {absent[0]!r}; {', '.join(NEEDED)} are needed.")
    if settings["dtype"] not in DTYPES:
        raise UserError(f"A residual store's dtype is {settings['dtype']!r}; legal are {', '.join(DTYPES)}.")


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the folder's store was made with these settings."""
    path = folder / "store.json"
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no residual store in {folder}; make one first.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != {"format", "settings"}:
        raise _unreadable(path, f"it is not a {FORMAT} file")
    difference = _difference(content["settings"], _as_json(settings))
    if difference:
        name, theirs, mine = difference
        what = "another base model" if name == "base" else "other settings"
        raise UserError(
            f"The residual store in {folder} was made with {what}: {name} is {theirs} there and {mine} here. "
            "Choose another folder, or delete this one to make its records again."
        )


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read: {reason}. Delete its folder and make the records again.")


def _difference(theirs: Any, mine: Any, name: str = "") -> tuple[str, str, str] | None:
    """(dotted name, value there, value here) of the first setting that differs."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted(theirs.keys() | mine.keys(), key=lambda key: (key != "base", key)):
            inner = f"{name}.{key}" if name else key
            if key not in theirs or key not in mine:
                there, here = (repr(side[key]) if key in side else "not set" for side in (theirs, mine))
                return inner, there, here
            found = _difference(theirs[key], mine[key], inner)
            if found:
                return found
        return None
    same = theirs == mine and type(theirs) is type(mine)
    return None if same else (name or "settings", repr(theirs), repr(mine))
