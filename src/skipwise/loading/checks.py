"""What must hold of a checkpoint's files; everything that is wrong with them is one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from skipwise.errors import UserError
from skipwise.loading.source import Source


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
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source.name} cannot be loaded: {reason}") from error


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


def check_keys(source: Source, report: dict[str, Any], strict: bool) -> None:
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
