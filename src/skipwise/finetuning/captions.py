"""Captions of the pictures in a folder, as the trainers that people come from keep them.

    NAME.txt, NAME.caption     beside NAME.jpg, the ending in any case (kohya-ss, ai-toolkit, OneTrainer)
    metadata.jsonl, .csv       rows of file_name and text (the `imagefolder` of the library datasets)

Files are read as UTF-8, with or without a byte order mark. An empty caption is none. A picture may have captions in
several of these when they say the same.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from skipwise.errors import UserError
from skipwise.files import parse_json

ENDINGS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")
FILE_NAME, TEXT = "file_name", ("text", "caption", "prompt")  # columns; any of the texts will do


class Caption(NamedTuple):
    """A caption and the file that it is from."""

    text: str
    source: str


@dataclass(frozen=True)
class Captions:
    """captions: by the picture's file name; unused: files, or rows of a table, for which there is no picture."""

    captions: Mapping[str, Caption]
    unused: tuple[str, ...]


def is_caption(path: Path) -> bool:
    """Whether a file is read as captions, by its name."""
    return path.name.lower() in TABLES or path.suffix.lower() in ENDINGS


def read_captions(files: Sequence[Path], pictures: Sequence[Path]) -> Captions:
    """The captions in those of the files that hold any.

    Raises UserError for a file that cannot be read, a table without captions, and a picture with two that differ.
    """
    found: dict[str, Caption] = {}
    unused: list[str] = []
    for path in files:
        if not is_caption(path):
            continue
        for names, caption in _read(path, pictures):
            unused += [] if names else [caption.source]
            for name in names:
                _add(found, name, caption)
    return Captions({name: caption for name, caption in found.items() if caption.text}, tuple(unused))


def _add(found: dict[str, Caption], name: str, caption: Caption) -> None:
    known = found.get(name)
    if known and known.text and caption.text and known.text != caption.text:
        raise UserError(
            f"{name} has two captions: {known.text!r} ({known.source}) and {caption.text!r} ({caption.source}); "
            "keep one of them."
        )
    if not known or not known.text:
        found[name] = caption


def _read(path: Path, pictures: Sequence[Path]) -> Iterator[tuple[list[str], Caption]]:
    """(names of the pictures, caption) of every caption in a file."""
    text = _text(path)
    if path.name.lower() not in TABLES:
        yield [picture.name for picture in pictures if picture.stem == path.stem], Caption(text.strip(), path.name)
        return
    rows = list(_rows(path, text))
    columns = {column for _, row in rows for column in row}
    if rows and not (FILE_NAME in columns and columns & set(TEXT)):
        raise UserError(
            f"{path} has {', '.join(sorted(map(str, columns)))}, but no {FILE_NAME} and text; "
            "give every picture a row with both, or take the file out of the folder."
        )
    for number, row in rows:
        name, said = row.get(FILE_NAME), [row[column] for column in TEXT if row.get(column)]
        if not all(isinstance(value, str) for value in (name, *said)):
            raise UserError(f"{path}, line {number}: {FILE_NAME} and text must be strings, as in {_EXAMPLE}.")
        if len(set(said)) > 1:
            raise UserError(f"{path}, line {number} has two captions, {said[0]!r} and {said[1]!r}; keep one of them.")
        wanted = PurePosixPath(str(name).replace("\\", "/"))
        names = [picture.name for picture in pictures if PurePosixPath(picture.name) == wanted]
        yield names, Caption("".join(said[:1]).strip(), path.name if names else f"{name} ({path.name})")


_EXAMPLE = '{"file_name": "1.jpg", "text": "a photo of sks dog"}'


def _rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row) of a table."""
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}
        return
    for number, line in enumerate(text.split("\n"), 1):  # a JSON string may hold other line breaks
        if line.strip():
            try:
                content = parse_json(line)
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                raise UserError(f"{path}, line {number} is not one JSON object a line, as in {_EXAMPLE}.")
            yield number, content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption {path} cannot be read: {error}. Save it as UTF-8 text.") from error
