"""What must hold of a checkpoint's files; everything that is wrong with them is one line."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from skipwise.errors import UserError
from skipwise.loading.source import Source, find
from skipwise.presets import names as preset_names

# model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
VARIANT = re.compile(r"\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.safetensors$")

logger = logging.getLogger(__name__)


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
    except Exception as error:
        method = _quantised_source(source)
        if not method and not isinstance(error, TOLD):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, ImportError) and error.name and "pip install" not in reason:
            reason = f"{reason}; install it with: pip install {error.name.partition('.')[0]}"
        what = f"{source.name} is quantised ({method}) and" if method else source.name
        raise UserError(f"{what} cannot be loaded here: {reason}") from error


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a config.json says that the weights are quantised, such as `gptq, 4 bits`; None when they are not."""
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, Mapping):
        return None
    four = said.get("load_in_4bit") or said.get("_load_in_4bit")
    bits = 4 if four else 8 if said.get("load_in_8bit") or said.get("_load_in_8bit") else said.get("bits")
    return f"{said.get('quant_method', 'of an unknown kind')}{f', {bits} bits' if bits else ''}"


# what libraries raise for a config that cannot be
TOLD = (
    *(OSError, LookupError, ValueError, TypeError, RuntimeError, ImportError, StrictDataclassError),
    *(ArithmeticError, AssertionError, AttributeError),
)
# settings of which each unit is a module that is built
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "n_blocks", "depth", "num_experts")
_A_TENSOR = 100  # more units than this for each tensor of the files are no model's, whatever it shares


def check_counts(source: Source, config: Mapping[str, Any]) -> None:
    """Raise UserError for a config with so many more blocks than its files have tensors that it is built for ever."""
    paths = list(source.folder.glob("*.safetensors"))
    held = sum(_tensors_in(path) for path in paths)
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(source, value)
        elif paths and name in _COUNTS and isinstance(value, int | float) and value > _A_TENSOR * held:
            raise UserError(
                f"{source.name}: its config.json has {name}={value}, and its files hold {held} tensors; is it the "
                "config of another model?"
            )


def _tensors_in(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return len(file.keys())


def check_requantised(config: Mapping[str, Any], name: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, unless it asks to quantise in another way what is quantised already."""
    wanted, method = given.get("quantization_config"), quantisation(config)
    kind = getattr(wanted, "quant_method", None) or (wanted or {}).get("quant_method") if wanted is not None else None
    if wanted is not None and method and str(getattr(kind, "value", kind)) != method.split(",")[0]:
        raise UserError(
            f"{name} is quantised already ({method}); leave quantization_config out, or give the original checkpoint."
        )
    return given


def check_no_single_file(name: str, what: str) -> None:
    """Raise UserError when the name is that of one file of weights. what: the work that cannot be done with it."""
    path = Path(name).expanduser()
    if path.suffix in (".gguf", ".safetensors") and path.is_file():
        raise UserError(
            f"{name} is one file of weights, and {what} needs text encoders and autoencoder beside them; give the "
            "folder of the whole diffusers pipeline, or its hub id."
        )


def check_plain(name: str, what: str) -> None:
    """Raise UserError when the weights of this name are quantised, or one file without the rest of its pipeline.

    name: as `load` takes it; its config alone is looked at. what: the work that cannot be done with such.
    """
    check_no_single_file(name, what)
    method = None if name in preset_names() else quantisation(find(name, weights=False).config)
    if method:
        raise UserError(
            f"{name} is quantised ({method}), and {what} a quantised model is not supported; give the original in "
            "bfloat16 or float32, and --memory or --blocks to make it fit."
        )


def _quantised_source(source: Source) -> str | None:
    try:
        return quantisation(source.config)
    except UserError:
        return None


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


def check_names(source: Source) -> None:
    """Raise UserError when the folder's safetensors have none of the names that loading looks for."""
    found = min(path.name for path in source.folder.glob("*.safetensors"))
    stem = "diffusion_pytorch_model" if "_class_name" in source.config else "model"
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    named = source.config.get("transformers_weights")  # a config may name another file
    if named is None and not any((source.folder / name).exists() for name in names):
        raise UserError(
            f"{source.name} has {found} but neither {names[0]} nor, for several files, {names[1]}; rename its weights, "
            "or copy the index too."
        )


def only_variant(source: Source) -> str | None:
    """The variant of the weights, such as fp16, when the folder has no others, and that it is taken is told."""
    found = {match[1] if (match := VARIANT.search(path.name)) else None for path in source.folder.glob("*.safetensors")}
    if len(found) != 1 or found == {None}:
        return None
    (variant,) = found
    logger.info("%s has its weights only in the variant %s, which is loaded.", source.name, variant)
    return variant


def check_keys(source: Source, report: Mapping[str, Any], strict: bool, model: nn.Module | None = None) -> None:
    """Every parameter must be filled, and every key used.

    report: missing_keys, mismatched_keys and unexpected_keys, as `from_pretrained` tells them, without those that the
    class itself says are legal. strict: whether any other key is wrong; where not, of `model`, those that would change
    what it computes (see `surplus_keys`).
    """
    method = _quantised_source(source)
    unknown = sorted(report["unexpected_keys"])
    if not strict:
        # a quantised layer may come with numbers for other engines, such as the scales of a cache
        unknown = surplus_keys(model, unknown, parts=not method) if model is not None else []
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    problems = {"lacks": sorted(report["missing_keys"]), "has the wrong shape for": mismatched}
    for what, keys in (problems | {"has the unknown": unknown}).items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{source.name} does not fit {_kind(source, model)!r}: the checkpoint {what} "
                f"{', '.join(keys[:3])}{more}. {f'It is quantised ({method}). ' if method else ''}"
                "Is its config.json that of another model?"
            )


def _kind(source: Source, model: nn.Module | None) -> str:
    try:
        return str(source.config.get("model_type") or source.config.get("_class_name"))
    except UserError:  # a file whose config is in it
        return type(model).__name__


def surplus_keys(model: nn.Module, unexpected: Iterable[str], parts: bool = True) -> list[str]:
    """Of the keys that a model has no place for, those that would change what it computes: further blocks and, with
    `parts`, parts of a block or of a layer that the model has.

    What is left are whole parts that the class lacks by design, such as other heads, and buffers that are computed.
    """
    modules = dict(model.named_modules())
    computed = {name for name, _ in model.named_buffers()}
    base = getattr(model, "base_model_prefix", "")
    found = []
    for key in unexpected:
        names = [key, f"{base}.{key}"] if base else [key]
        if not computed.intersection(names) and any(_counts(modules, name, parts) for name in names):
            found.append(key)
    return found


def _counts(modules: Mapping[str, nn.Module], key: str, parts: bool) -> bool:
    pieces = key.split(".")
    paths = [".".join(pieces[:length]) for length in range(1, len(pieces))]
    holders = [modules[path] for path in paths if path in modules]
    if not holders:
        return False
    further = isinstance(holders[-1], nn.ModuleList)  # a number that the list does not reach
    inside = any(isinstance(m, nn.ModuleList) for m in holders) or not any(True for _ in holders[-1].children())
    return further or (parts and inside)


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
