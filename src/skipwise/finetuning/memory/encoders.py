"""What stands beside the transformer in a pipeline: text encoders and the autoencoder, and the memory they take.

They are gone before the training begins. Their configs come from a preset or from a pipeline's folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from skipwise.errors import require
from skipwise.files import read_json
from skipwise.finetuning.memory.resident import materialised
from skipwise.finetuning.peak import Bytes, PeakMemory
from skipwise.loading import find, readable_errors
from skipwise.presets import names as preset_names

LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Component:
    """One part of a pipeline: the library and the class that a model_index.json names, and its config."""

    library: str
    class_name: str
    config: Mapping[str, Any]

    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            if self.library == "diffusers":
                return getattr(require("diffusers", "image"), self.class_name).from_config(dict(self.config)).eval()
            cls = getattr(transformers, self.class_name)
            return cls._from_config(cls.config_class.from_dict(dict(self.config))).eval()


def components(name: str) -> dict[str, Component]:
    """The text encoders and the autoencoder of a preset, folder or hub id; none where they are not known."""
    if name in preset_names():
        path = files("skipwise.presets").joinpath("pipelines", f"{name}.json")
        rows = read_json(path) if path.is_file() else {}
        return {part: Component(*row) for part, row in rows.items()}
    folder, listed = find(name, weights=False).folder.parent, pipeline_index(name) or {}
    return {
        part: Component(row[0], row[1], read_json(folder / part / "config.json"))
        for part, row in listed.items()
        if part.startswith(("text_encoder", "vae")) and _is_known(row, folder / part)
    }


def pipeline_index(name: str) -> dict[str, Any] | None:
    """The model_index.json of a folder or hub id that is a pipeline; None for a preset and for a model alone."""
    if name in preset_names():
        return None
    source = find(name, weights=False)
    index = source.folder.parent / "model_index.json"
    if source.folder.name != "transformer" or not index.exists():
        return None
    with readable_errors(source):
        return read_json(index)


def _is_known(row: Any, folder: Path) -> bool:
    return isinstance(row, list) and row[0] in LIBRARIES and (folder / "config.json").exists()


def scale_of(vae: Any) -> int:
    """Pixels a latent pixel, as diffusers' pipelines compute it."""
    channels = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(channels) - 1)


def weights_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters and buffers, each counted once, with floats in `dtype`."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors)


def encoding_peak(vae: nn.Module, dtype: torch.dtype, pixels: int) -> Bytes:
    """Peak memory of encoding one square picture of this side. vae: on the meta device."""
    tracker = PeakMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), materialised(vae.requires_grad_(False), dtype, fake=True):
        picture = torch.empty(1, 3, pixels, pixels, dtype=dtype)
        tracker.label((*vae.parameters(), *vae.buffers()), "weights")
        tracker.label([picture], "inputs")
        with torch.no_grad(), tracker:
            vae.encode(picture)  # type: ignore[operator]
    return tracker.peak
