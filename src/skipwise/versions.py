"""The versions and the processor that a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("skipwise", "torch", "transformers", "diffusers")


def versions() -> dict[str, str]:
    """Versions of python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def told_of_processor(field: str) -> str:
    """What Linux says of the processor under this name, such as "model name"; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
