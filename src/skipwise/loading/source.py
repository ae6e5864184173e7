"""Where a model is, by the name that a user gives: embedded, a folder, a hub id or a GGUF file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from skipwise.errors import UserError, require, unknown
from skipwise.files import read_json, user_cache
from skipwise.presets import names as preset_names

# Models that `make` targets fetch into the user's cache: name -> target
FETCHED = {"smollm2-135m": "smollm2"}

# What may be fetched from a hub: no code, no pickle.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
CONFIG_PATTERNS = ["config.json", "*/config.json", "model_index.json"]
TOKENIZER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder with a config.json, or one file in a folder.

    gguf: the name of a GGUF file; single: of a .safetensors file that holds a diffusers transformer alone.
    """

    name: str
    folder: Path
    gguf: str | None = None
    single: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
        path = self.folder / "config.json"
        try:
            config = read_json(path)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} has no config.json; give the folder of a saved model.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a model's config.")
        return config


def embedded_names() -> list[str]:
    """Models that come with the package."""
    return sorted(item.name for item in files("skipwise.zoo").joinpath("weights").iterdir() if item.is_dir())


def find(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Where the model of this name is. A hub repository is fetched, its config alone when `weights` is False.

    An embedded model goes before a folder of its name, with a warning. Raises UserError for a name that is none, and
    for a revision of what is no hub repository.
    """
    if revision is not None and _is_here(name):
        raise UserError(f"revision={revision!r} is of a hub repository, and {name} is on this machine; leave it out.")
    return _find(name, revision, PATTERNS if weights else CONFIG_PATTERNS)


def _is_here(name: str) -> bool:
    return name in embedded_names() or name in FETCHED or _path(name).exists()


def _path(name: str) -> Path:
    """The path of this name. Raises UserError for a name that no file system takes."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        short = name if len(name) < 80 else f"{name[:60]}..."
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{short} is the name of no file or folder: {str(reason).rstrip('.')}.") from error
    return path


def find_tokenizer(name: str) -> Source:
    """Where the tokenizer of this name is: a folder, which need hold nothing else, or what `find` takes.

    Of a hub repository no weights are fetched. Raises UserError as `find` does, and for a file.
    """
    path = _path(name)
    if path.is_dir():
        return Source(name, path)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{name} is a file; name the folder of the tokenizer, {path.parent}.")
    return _find(name, None, TOKENIZER_PATTERNS)


def _find(name: str, revision: str | None, patterns: list[str]) -> Source:
    if name in embedded_names():
        if Path(name).exists():
            warnings.warn(f"{name} is the embedded model; for the folder of this name write ./{name}", stacklevel=2)
        return Source(name, _denoiser(_embedded(name)))
    if name in FETCHED:
        folder = user_cache() / name
        if not (folder / "config.json").exists():
            raise UserError(f"{name} is not on this machine yet; run `make {FETCHED[name]}` once to fetch it.")
        return Source(name, folder)
    path = _path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            path = _gguf_from_hub(name, revision)
        require("gguf", "gguf")
        return Source(name, path.parent, path.name)
    if path.suffix == ".safetensors" and path.is_file():
        return Source(name, path.parent, single=path.name)
    if path.is_dir():
        return Source(name, _denoiser(path))
    return _from_hub(name, revision, patterns)


def _embedded(name: str) -> Path:
    return Path(str(files("skipwise.zoo").joinpath("weights", name)))


def _denoiser(folder: Path) -> Path:
    """Of a diffusers pipeline what denoises, its transformer; any other folder as it is."""
    inner = folder / "transformer"
    return inner if (folder / "model_index.json").exists() and inner.is_dir() else folder


def pipeline_folder(name: str, revision: str | None = None) -> Path:
    """The folder of the whole diffusers pipeline of what `load` takes: text encoders and autoencoder are beside it.

    Raises UserError as `load` does, and when it is a model alone.
    """
    folder = find(name, revision).folder
    if folder.name != "transformer" or not (folder.parent / "model_index.json").exists():
        raise UserError(f"{name} is no diffusers pipeline; give the folder that has its model_index.json.")
    return folder.parent


def _gguf_from_hub(name: str, revision: str | None) -> Path:
    """One file of a repository of them, org/name/FILE.gguf, fetched alone."""
    if name.count("/") < 2 or name.startswith((".", "/", "~")):
        raise UserError(f"There is no file {name}.")
    owner, repository, file = name.split("/", 2)
    with _fetching(name):
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """What the hub raises, as one line."""
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no folder here and cannot be fetched from the hub: {reason}") from error


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Source:
    if name in preset_names():
        raise UserError(
            f"{name} is a preset, a config without weights; use it with `skipwise inspect` or with "
            "`skipwise bench --random-weights`."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = [*embedded_names(), *FETCHED, *preset_names()]
        problem = str(unknown("model", name, known))
        raise UserError(f"{problem} Or give an existing folder, a .gguf file, or a hub id such as org/name.")
    with _fetching(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    if patterns is not TOKENIZER_PATTERNS and not any(
        (folder / f).exists() for f in ("config.json", "model_index.json")
    ):
        raise UserError(f"{name} has no config.json; of a repository of GGUF files name one file: {name}/FILE.gguf.")
    return _find(str(folder), None, patterns) if (folder / "model_index.json").exists() else Source(name, folder)
