"""Loading a text-to-image pipeline to fine-tune: safetensors alone, never code of the repository."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open

from skipwise.errors import UserError, require, unknown
from skipwise.finetuning.families import family_of
from skipwise.loading import DTYPES, Source, check_weights, embedded_names, quiet, readable_errors

LIBRARIES = ("diffusers", "transformers")
VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")  # model.fp16.safetensors -> fp16


def load_pipeline(
    name: str, *, dtype: str | None = None, revision: str | None = None, leave_out: Sequence[str] = ()
) -> Any:
    """The diffusers pipeline in a folder, by embedded name or by hub id; one of the families that can be fine-tuned.

    dtype: "float32" (the default), "bfloat16" or "float16"; revision: of a hub repository. leave_out: components, such
    as "transformer" or "vae", that are neither fetched nor loaded and are None, as those are that it was saved without.
    A folder that holds a variant of the weights alone, such as fp16, is read as that. Raises UserError, before any
    weights are read, for what is no such pipeline.
    """
    diffusers = require("diffusers", "image")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = _folder(name)
    source = Source(name, folder or Path(name))
    index = read_index(name, revision)
    with readable_errors(source):
        _check(index, source, leave_out)
        wanted = [part for part in components_of(index) if part not in leave_out]
        with quiet(), _no_bars(diffusers.utils.logging):
            return diffusers.DiffusionPipeline.from_pretrained(
                str(folder or name),
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                torch_dtype=DTYPES[dtype or "float32"],
                variant=_variant(source.folder, wanted),
                **dict.fromkeys([*leave_out, *nulls_of(index)]),  # diffusers itself wants to be told of nulls again
            )


def components_of(index: Mapping[str, Any]) -> dict[str, Any]:
    """component -> (library, class name) of a model_index.json, without those that are null."""
    return {key: value for key, value in _rows(index).items() if value[0] is not None}


def nulls_of(index: Mapping[str, Any]) -> list[str]:
    """The components that a pipeline was saved without."""
    return [key for key, value in _rows(index).items() if value[0] is None]


def _rows(index: Mapping[str, Any]) -> dict[str, Any]:
    rows = {key: value for key, value in index.items() if not key.startswith("_")}
    return {key: value for key, value in rows.items() if isinstance(value, list | tuple) and len(value) == 2}


def scheduler_config(name: str) -> Mapping[str, Any]:
    """The config of the pipeline's scheduler, with the defaults of its class."""
    diffusers, folder = require("diffusers", "image"), _folder(name)
    class_name = components_of(read_index(name))["scheduler"][1]
    if not hasattr(diffusers, class_name):
        raise UserError(f"{name} has a scheduler {class_name}, which the installed diffusers does not know.")
    with readable_errors(Source(name, folder or Path(name))):
        return getattr(diffusers, class_name).from_pretrained(str(folder or name), subfolder="scheduler").config


def check_components(name: str, weights: bool = True) -> None:
    """Raise UserError unless the pipeline has what a fine-tuning needs of it; nothing but configs and headers is read.

    weights: whether they must be there; without, those that are there are looked at all the same.
    """
    index, folder = read_index(name), _folder(name)
    family = family_of(index)
    expected = inspect.signature(getattr(require("diffusers", "image"), family.pipeline).__init__).parameters
    here = components_of(index)
    needed = {part for part, parameter in expected.items() if parameter.default is parameter.empty} - {"self"}
    lacking = sorted(part for part in needed if part not in here and part not in family.optional)
    lacking += [f"tokenizer{part[12:]}" for part in here if part.startswith("text_encoder") and part[12:] not in
                {tokenizer[9:] for tokenizer in here if tokenizer.startswith("tokenizer")}]  # fmt: skip
    if lacking:
        raise UserError(
            f"{name} was saved without its {lacking[0]}, which a fine-tuning of {family.name} needs; "
            "give the whole pipeline."
        )
    if folder is None:
        return
    for part in here:
        if part.startswith(("text_encoder", "vae", "transformer")) and not (folder / part / "config.json").exists():
            raise UserError(f"{name} has no {part}/config.json, which its model_index.json names; copy it again.")
    source = Source(name, folder)
    with readable_errors(source):
        _check(index, source, () if weights else [part for part in here if not _has_files(folder / part)])


def _has_files(folder: Path) -> bool:
    """Whether any weights are in a component's folder."""
    return any(path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") for path in folder.glob("*"))


def _variant(folder: Path, parts: Sequence[str]) -> str | None:
    """The variant that one of these components has alone, without the plain weights."""
    for part in parts:
        found = [VARIANT.search(path.name) for path in (folder / part).glob("*.safetensors")]
        if found and all(found):
            return next(match.group(1) for match in found if match)
    return None


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    """Without diffusers' progress bars, of which there would be one for each stage."""
    were = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were:
            logging.enable_progress_bar()


def read_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json: class names by component. Raises UserError as `load_pipeline` does."""
    diffusers = require("diffusers", "image")
    folder = _folder(name)
    with readable_errors(Source(name, folder or Path(name))):
        return diffusers.DiffusionPipeline.load_config(str(folder or name), revision=revision)


def pipeline_class(name: str) -> Any:
    """The class of the pipeline in diffusers, without loading it."""
    return getattr(require("diffusers", "image"), read_index(name)["_class_name"])


def _folder(name: str) -> Path | None:
    """Where the pipeline is, or None for a hub id."""
    folder = Path(name).expanduser()
    if name in embedded_names():
        folder = Path(str(files("skipwise.zoo").joinpath("weights", name)))
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise UserError(f"{name} has no model_index.json; give the folder of a whole saved pipeline.")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"There is no pipeline {name}; give the folder of a saved pipeline or a hub id such as org/name."
        )
    return None


def _check(index: Mapping[str, Any], source: Source, leave_out: Sequence[str]) -> None:
    """Refuse other kinds of pipeline, components that bring code, and weights that are pickles."""
    family_of(index)
    components = components_of(index)
    for unwanted in leave_out:
        if unwanted not in components and unwanted not in nulls_of(index):
            raise unknown(f"component of {source.name}", unwanted, components)
    for component, (library, _) in components.items():
        if library not in LIBRARIES:
            raise UserError(f"{source.name}: its {component} needs code from {library!r}, which is never run.")
        inner = source.folder / component
        if component not in leave_out and (inner / "config.json").exists():
            check_weights(Source(f"{source.name}/{component}", inner))
            for path in inner.glob("*.safetensors"):
                with safe_open(path, "pt"):  # its header tells how long it must be
                    pass
