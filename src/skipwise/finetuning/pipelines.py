"""Loading a text-to-image pipeline to fine-tune: safetensors alone, never code of the repository."""

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


def load_pipeline(
    name: str, *, dtype: str | None = None, revision: str | None = None, leave_out: Sequence[str] = ()
) -> Any:
    """The diffusers pipeline in a folder, by embedded name or by hub id; one of the families that can be fine-tuned.

    dtype: "float32" (the default), "bfloat16" or "float16"; revision: of a hub repository. leave_out: components, such
    as "transformer" or "vae", that are neither fetched nor loaded and are None. Raises UserError, before any weights
    are read, for what is no such pipeline.
    """
    diffusers = require("diffusers", "image")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = _folder(name)
    source = Source(name, folder or Path(name))
    index = read_index(name, revision)
    with readable_errors(source):
        _check(index, source, leave_out)
        with quiet(), _no_bars(diffusers.utils.logging):
            return diffusers.DiffusionPipeline.from_pretrained(
                str(folder or name),
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                torch_dtype=DTYPES[dtype or "float32"],
                **dict.fromkeys(leave_out),
            )


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
    components = {key: value for key, value in index.items() if not key.startswith("_") and isinstance(value, list)}
    for unwanted in leave_out:
        if unwanted not in components:
            raise unknown(f"component of {source.name}", unwanted, components)
    for component, (library, _) in components.items():
        if library is not None and library not in LIBRARIES:
            raise UserError(f"{source.name}: its {component} needs code from {library!r}, which is never run.")
        inner = source.folder / component
        if component not in leave_out and (inner / "config.json").exists():
            check_weights(Source(f"{source.name}/{component}", inner))
            for path in inner.glob("*.safetensors"):
                with safe_open(path, "pt"):  # its header tells how long it must be
                    pass
