"""`load`: an embedded name, a folder, a hub id or a GGUF file -> model and tokenizer.

Never remote code, never pickle. Native modules load the official checkpoints strictly: every key is used and every
parameter filled, or the error says which did not fit.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from skipwise.errors import UserError, require, unknown
from skipwise.files import user_cache
from skipwise.models import dream, llada, mdlm
from skipwise.models.random import random_model
from skipwise.presets import names as preset_names
from skipwise.presets import read as read_preset

# config.json model_type -> (model class, config class, key mapping)
NATIVE: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "llada": (llada.LLaDAModelLM, llada.LLaDAConfig, llada.KEY_MAPPING),
    "Dream": (dream.DreamModel, dream.DreamConfig, dream.KEY_MAPPING),
    "mdlm": (mdlm.MDLM, mdlm.MDLMConfig, mdlm.KEY_MAPPING),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Models that `make` targets fetch into the user's cache: name -> target
FETCHED = {"smollm2-135m": "smollm2"}

# What may be fetched from a hub: no code, no pickle.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.gguf", "README.md", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder with a config.json, or one GGUF file in a folder."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} has no config.json; give the folder of a saved model.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a model's config.")
        return config


def load(
    name: str, *, dtype: str | None = None, device: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) by embedded name, folder, hub id or GGUF file; tokenizer None where there is none.

    dtype: "float32", "bfloat16" or "float16", by default the checkpoint's; device: such as "cuda"; revision: of a hub
    repository. The model is in eval mode. Raises UserError with the next step for everything that can be wrong.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    source = find(name, revision)
    with readable_errors(source):
        model = _load_gguf(source, dtype) if source.gguf else _load_folder(source, dtype)
        tokenizer = _load_tokenizer(source)
    model = model.eval()
    if device is not None:
        model = model.to(device)
    return model, tokenizer


def load_skeleton(name: str, *, dtype: str | None = None, revision: str | None = None) -> nn.Module:
    """The model without weights, on the meta device, from a preset or from the config.json of what `load` takes.

    dtype: what its parameters would be held in, by default float32. Raises UserError as `load` does.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    skeleton = _skeleton(name, revision)
    return skeleton if dtype is None else skeleton.to(DTYPES[dtype])


def load_random(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, seed: int = 0
) -> Any:
    """A language model of this name's shape with random weights, drawn on `device` in `dtype`, in eval mode.

    name: a preset, or what `load` takes; no more than the config is needed. Raises UserError as `load` does.
    """
    skeleton = load_skeleton(name)
    if not isinstance(skeleton, transformers.PreTrainedModel):
        raise UserError(f"{name} is a {type(skeleton).__name__}; random weights are for language models.")
    return random_model(type(skeleton), skeleton.config, dtype=dtype, device=device, seed=seed)


def _skeleton(name: str, revision: str | None) -> nn.Module:
    if name in preset_names():
        return build_skeleton(read_preset(name), name)
    source = find(name, revision, weights=False)
    if source.gguf:
        raise UserError(f"{name} is a GGUF file, whose config comes with its weights; load it instead.")
    with readable_errors(source):
        return build_skeleton(source.config, name)


def embedded_names() -> list[str]:
    """Models that come with the package."""
    return sorted(item.name for item in files("skipwise.zoo").joinpath("weights").iterdir() if item.is_dir())


def find(name: str, revision: str | None = None, weights: bool = True) -> Source:
    """Where the model of this name is. A hub repository is fetched, its config alone when `weights` is False."""
    if name in embedded_names():
        return Source(name, _denoiser(_embedded(name)))
    if name in FETCHED:
        folder = user_cache() / name
        if not (folder / "config.json").exists():
            raise UserError(f"{name} is not on this machine yet; run `make {FETCHED[name]}` once to fetch it.")
        return Source(name, folder)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"There is no file {name}.")
        require("gguf", "gguf")
        return Source(name, path.parent, path.name)
    if path.is_dir():
        return Source(name, _denoiser(path))
    return _from_hub(name, revision, weights)


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


def _from_hub(name: str, revision: str | None, weights: bool) -> Source:
    if name in preset_names():
        raise UserError(
            f"{name} is a preset, a config without weights; use it with `skipwise inspect` or with "
            "`skipwise bench --random-weights`."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = [*embedded_names(), *FETCHED, *preset_names()]
        problem = str(unknown("model", name, known))
        raise UserError(f"{problem} Or give an existing folder, a .gguf file, or a hub id such as org/name.")
    patterns = PATTERNS if weights else ["config.json", "*/config.json", "model_index.json"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no folder here and cannot be fetched from the hub: {reason}") from error
    return find(str(folder), weights=weights) if (folder / "model_index.json").exists() else Source(name, folder)


@contextmanager
def readable_errors(source: Source) -> Iterator[None]:
    """Turn the libraries' complaints about files into one line."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{source.name}: a safetensors file is damaged or cut short ({error}); copy or download it again."
        ) from error
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source.name} cannot be loaded: {reason}") from error


def _load_folder(source: Source, dtype: str | None) -> Any:
    config = source.config
    model_class, settings = _recipe(config, source.name)
    check_weights(source)
    if "_class_name" in config:
        chosen = {"torch_dtype": DTYPES[dtype]} if dtype else {}
        return model_class.from_pretrained(source.folder, use_safetensors=True, **chosen)
    with quiet():
        model, report = model_class.from_pretrained(
            source.folder,
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the others
            **settings,
        )
    _check_keys(source, report, strict=config.get("model_type") in NATIVE)
    model.name_or_path = source.name
    return model


def _recipe(config: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The class that a config names, and what its from_pretrained needs besides the folder."""
    kind = config.get("model_type")
    if "_class_name" in config:
        diffusers = require("diffusers", "image")
        if not hasattr(diffusers, config["_class_name"]):
            raise UserError(f"{name} is a {config['_class_name']}, which the installed diffusers does not know.")
        return getattr(diffusers, config["_class_name"]), {}
    if kind in NATIVE:
        model_class, config_class, mapping = NATIVE[kind]
        return model_class, {"config": config_class.from_official(config), "key_mapping": mapping or None}
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{name} has model_type {kind!r}, which neither skipwise nor the installed transformers knows. "
            "The repository's own code is never run; a newer transformers may know it."
        )
    architecture = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    return getattr(transformers, architecture, transformers.AutoModelForCausalLM), {}


def check_weights(source: Source) -> None:
    """Raise UserError, with the reason, when the folder has no safetensors."""
    if any(source.folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in source.folder.glob(pattern)]
    if pickles:
        raise UserError(
            f"{source.name} has its weights only as pickle ({pickles[0]}), which can run code when it is read; "
            "convert it to safetensors first."
        )
    raise UserError(
        f"{source.name} has a config but no .safetensors weights; use it with `skipwise inspect`, or add them."
    )


def _check_keys(source: Source, report: dict[str, Any], strict: bool) -> None:
    """Every parameter must be filled; for native modules every key must be used too."""
    problems = {"lacks": sorted(report["missing_keys"])}
    problems["has the wrong shape for"] = sorted(str(key[0]) for key in report["mismatched_keys"])
    if strict:
        problems["has the unknown"] = sorted(report["unexpected_keys"])
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{source.name} does not fit {source.config.get('model_type')!r}: the checkpoint {what} "
                f"{', '.join(keys[:3])}{more}. Is its config.json that of another model?"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report on keys, which ends in our own error when there is something to say."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_gguf(source: Source, dtype: str | None) -> Any:
    chosen = DTYPES[dtype] if dtype else torch.float32
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf, dtype=chosen)
    model.name_or_path = source.name
    return model


def _load_tokenizer(source: Source) -> Any:
    if source.gguf:
        return transformers.AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, padding_side="left")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((source.folder / name).exists() for name in names):
        return None
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, padding_side="left")


def build_skeleton(config: dict[str, Any], name: str) -> nn.Module:
    """The model that the dictionary of a config.json describes, on the meta device. name: for error messages."""
    model_class, settings = _recipe(config, name)
    with torch.device("meta"):
        if "_class_name" in config:
            return model_class.from_config(config).eval()
        built = settings.get("config") or transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        auto = model_class is transformers.AutoModelForCausalLM
        return (model_class.from_config(built) if auto else model_class._from_config(built)).eval()
