"""Where the states of many samples wait while one block after the other is loaded: memory, or a file behind it."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipwise.errors import UserError

SEGMENT = 1 << 28  # bytes of one temporary file
ALIGNMENT = 64  # bytes


class Host:
    """Keeps tensors in host memory, or, with a folder, in temporary files there that are mapped into memory.

    The files have no name any more as soon as they are mapped, and their space is free again when the tensors in them
    are gone, also when the process is killed.
    """

    def __init__(self, folder: str | Path | None = None, segment: int = SEGMENT):
        self.folder = None if folder is None else Path(folder)
        self.segment = segment
        self._free: Tensor | None = None  # what is left of the newest file, bytes
        self._shared: dict[tuple[Any, ...], Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy on the host. Raises UserError when the folder's disk is full."""
        if self.folder is None:
            return tensor.detach().to("cpu", copy=True)
        place = self._allocate(tensor.numel() * tensor.element_size())
        kept = place.view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor.detach())

    def share(self, tensor: Tensor) -> Tensor:
        """A copy on the host, the same one for equal tensors: what many samples have in common is kept once."""
        kept = tensor.detach().to("cpu", copy=True)
        content = hashlib.sha256(kept.contiguous().flatten().view(torch.uint8).numpy().data).digest()
        return self._shared.setdefault((kept.dtype, kept.shape, kept.stride(), content), kept)

    def _allocate(self, size: int) -> Tensor:
        needed = -(-size // ALIGNMENT) * ALIGNMENT
        if self._free is None or len(self._free) < needed:
            self._free = self._map(max(needed, self.segment))
        place, self._free = self._free[:size], self._free[needed:]
        return place

    def _map(self, size: int) -> Tensor:
        descriptor, name = -1, ""
        try:
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".states-")
            os.truncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal at the first write
                os.posix_fallocate(descriptor, 0, size)
            return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            raise UserError(
                f"Cannot keep {size / 2**30:.2f} GiB of states in {self.folder}: {error.strerror or error}. "
                "Choose a folder on a larger disk or make the records of fewer samples at a time."
            ) from error
        finally:
            if name:
                os.close(descriptor)
                os.unlink(name)
