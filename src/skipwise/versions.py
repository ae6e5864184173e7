"""The versions that a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

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
