"""The target of an export: a folder that is there whole or not at all, and what is carried over beside the weights."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipwise.errors import UserError
from skipwise.exporting.card import PLAN_FILE, pipeline_root
from skipwise.files import check_writable, partial_folder, remove_partials, write_atomically
from skipwise.loading import Source

# What is carried over beside the weights: tokenizer, chat templates, generation settings, licences. No code, no pickle.
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
LEGAL_SUFFIXES = ("", ".md", ".txt", ".pdf")
# written anew
REPLACED = ("config.json", "README.md", PLAN_FILE)
SPARE = 2**26  # bytes for everything but the weights


def check_absent(target: Path) -> None:
    """Raise UserError when there is something that an export would mix with or replace."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is there already and holds something; give a new folder, or remove it first.")


@contextmanager
def whole_or_absent(target: Path, size: int) -> Iterator[Path]:
    """A folder beside the target that becomes the target when all went well, and vanishes otherwise.

    size: bytes of the weights that will be written. What a killed run has left is removed.
    """
    parent = check_writable(target.absolute().parent)
    remove_partials(parent)  # before the disk is asked what is free
    free = shutil.disk_usage(parent).free
    if free < size + SPARE:
        raise UserError(
            f"{parent} has {free / 1e9:.3g} GB left and the export needs {size / 1e9:.3g} GB; free some, or choose "
            "another disk."
        )
    try:
        with partial_folder(parent) as partial:
            yield partial
            partial.chmod(0o755)  # temporary folders are private by default, results are not
            if target.is_dir():
                target.rmdir()  # empty, or it would have been refused
            partial.rename(target)
    except OSError as error:
        raise UserError(
            f"Cannot write {target}: {error.strerror or error}. Choose a folder you can write to."
        ) from error


def copy_files(source: Source, target: Path) -> None:
    """Everything but weights and code; pointers to code that stayed behind are taken out."""
    folder, root = source.folder, pipeline_root(source)
    files = [path for path in folder.iterdir() if _is_settings(path) or _is_legal(path)]
    files += [path for path in root.iterdir() if _is_legal(path)] if root else []
    for path in files:
        shutil.copyfile(path, target / path.name)
    for path in folder.glob("additional_chat_templates/*.jinja"):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)
    for path in target.glob("*.json"):
        _drop_auto_map(path)


def _is_settings(path: Path) -> bool:
    index = path.name.endswith(".index.json")
    return path.is_file() and path.suffix in SUFFIXES and path.name not in REPLACED and not index


def _is_legal(path: Path) -> bool:
    return path.is_file() and path.name.upper().startswith(LEGAL) and path.suffix in LEGAL_SUFFIXES


def _drop_auto_map(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if '"auto_map"' in text:
        content = {key: value for key, value in json.loads(text).items() if key != "auto_map"}
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
