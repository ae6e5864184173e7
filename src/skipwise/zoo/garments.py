"""Fetch Fashion-MNIST, the garments that tiny-dit's training pictures are composed of, from Debian's package.

70,000 grey pictures of garments, 28 x 28 (Xiao et al., arXiv 1708.07747; MIT, copyright 2017 Zalando SE). The package
is downloaded with apt as this machine has it configured and unpacked beside the cache; nothing of it is installed or
run. Without apt, put the four files below into the folder that the error names. Checksums are of what they unpack to.
"""

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from skipwise.errors import UserError
from skipwise.files import check_writable, user_cache

Split = Literal["train", "t10k"]

PACKAGE = "dataset-fashion-mnist"
# file -> sha256 of its unpacked content
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SIDE = 28


def garments(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, 28, 28) and class numbers (count,), both uint8, in the order of the data set.

    Raises UserError when the data set is not on this machine yet.
    """
    return _read(folder(), split)


@cache
def _read(source: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in FILES if name.startswith(split) and not (source / name).exists()]
    if missing:
        raise UserError(
            f"The garments are not on this machine yet; run `make pictures` once to fetch them (31 MB), "
            f"or put Fashion-MNIST's {missing[0]} into {source}."
        )
    images, labels = (
        np.frombuffer(gzip.decompress((source / f"{split}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, SIDE, SIDE), labels


def folder() -> Path:
    """Where the four files are kept."""
    return user_cache() / "fashion-mnist"


def fetch() -> Path:
    """The folder of the data set; fetched on the first call, whole or not at all.

    Raises UserError when apt is missing, the download fails or is not what it should be.
    """
    target = folder()
    if all((target / name).exists() for name in FILES):
        return target
    check_writable(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise UserError(f"Fetching the garments needs {tool}; without it put {', '.join(FILES)} into {target}.")
        _run(["apt-get", "download", PACKAGE], work)
        _run(["dpkg-deb", "-x", *(path.name for path in Path(work).glob("*.deb")), "x"], work)
        found = Path(work) / "x" / "usr" / "share" / "datasets" / "fashion-mnist"
        for name, expected in FILES.items():
            check(found / name, expected)
        target.mkdir(exist_ok=True)
        for name in FILES:
            shutil.move(found / name, target / name)
    return target


def _run(command: list[str], work: str) -> None:
    outcome = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if outcome.returncode:
        reason = (outcome.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"`{' '.join(command[:3])}` failed: {reason}")


def check(path: Path, expected: str) -> None:
    """Raise UserError when the unpacked content of a file is not what it should be."""
    try:
        digest = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    except (OSError, EOFError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    if digest != expected:
        raise UserError(f"{path.name} has sha256 {digest}, expected {expected}; it is damaged or another one.")


if __name__ == "__main__":
    try:
        print(f"the garments are at {fetch()}")
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
