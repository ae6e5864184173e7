"""One file of a diffusers transformer, .safetensors or .gguf, in the layout of its authors or of diffusers.

Which tensor becomes which is diffusers' own knowledge (`from_single_file`). It is asked about shapes first, so that a
file that does not fit the config is refused before any weight is read. The config is the config.json beside the file or
in a pipeline's folder above, otherwise the one that diffusers takes for such a file, from the hub or its cache.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from torch import Tensor, nn

from skipwise.errors import UserError, require
from skipwise.files import read_json
from skipwise.loading.checks import check_keys
from skipwise.loading.classes import build_skeleton
from skipwise.loading.gguf_file import GGUF, path_of
from skipwise.loading.source import Source
from skipwise.quantised import packed

PREFIX = "model.diffusion_model."  # of the transformer's keys, in files that hold other parts too


def load_single_file(source: Source, dtype: torch.dtype | None, given: Mapping[str, Any]) -> Any:
    """The transformer in the file. GGUF weights stay packed and are unpacked when they are used, in `dtype`.

    given: further arguments for `from_single_file`. Raises UserError when the file does not fit its config exactly.
    """
    diffusers = require("diffusers", "image")
    config = single_file_config(source)
    skeleton = _checked(source, config)
    settings = dict(given) | ({} if dtype is None else {"torch_dtype": dtype})
    if source.gguf:
        settings["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype or torch.float32)
    beside = {"config": str(source.folder)} if (source.folder / "config.json").exists() else {}
    kind: Any = type(skeleton)
    model = kind.from_single_file(str(path_of(source)), **beside, **settings)
    left = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if left:
        raise UserError(f"{source.name}: diffusers left {left} without weights; load a diffusers folder instead.")
    return model


def single_file_skeleton(source: Source) -> nn.Module:
    """The transformer that the file holds, on the meta device, checked as `load_single_file` does."""
    skeleton = _checked(source, single_file_config(source))
    if source.gguf:
        matrices = [t for t in GGUF.open(source).reader.tensors if len(t.shape) > 1]
        return packed(skeleton, sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices))
    return skeleton


def single_file_config(source: Source) -> dict[str, Any]:
    """The config.json of the transformer in the file."""
    require("diffusers", "image")
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    shapes = _shapes(source)
    if (source.folder / "config.json").exists():
        config = source.config
        if "_class_name" in config:
            return config
        if "model_type" in config:
            raise UserError(f"{source.name} is one file of the model in {source.folder}; give that folder.")
    try:
        kind = infer_diffusers_model_type(shapes)
        if kind == "v1":  # what diffusers takes a file for that it does not know
            raise LookupError("its tensors are of no architecture that diffusers knows as one file")
        place = fetch_diffusers_config(shapes)
        folder = place.get("subfolder", "transformer")
        path = hf_hub_download(place["pretrained_model_name_or_path"], f"{folder}/config.json")
    except (LookupError, AttributeError, TypeError, OSError, ValueError, HfHubHTTPError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{source.name} is one file of weights without a config ({reason}); put the transformer's config.json of "
            "its diffusers pipeline beside it, or give the folder of the pipeline."
        ) from error
    return read_json(path)


def _shapes(source: Source) -> dict[str, Tensor]:
    """The file's tensors on the meta device, unpacked, by key."""
    if source.gguf:
        return {name: torch.empty(shape, device="meta") for name, shape in GGUF.open(source).shapes.items()}
    with safe_open(path_of(source), "pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


def _checked(source: Source, config: Mapping[str, Any]) -> nn.Module:
    """The skeleton, to which every tensor of the file belongs and which lacks none."""
    skeleton = build_skeleton(dict(config), source.name)
    places = skeleton.state_dict()
    found, left = _converted(source, type(skeleton), config, places)
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or []
    report = {
        "missing_keys": set(places) - set(found),
        "mismatched_keys": [(key,) for key in found if key in places and found[key].shape != places[key].shape],
        "unexpected_keys": [
            key for key in [*found, *left] if key not in places and not any(pattern in key for pattern in ignored)
        ],
    }
    check_keys(source, report, strict=True, model=skeleton)
    return skeleton


def _converted(
    source: Source, kind: type[nn.Module], config: Mapping[str, Any], places: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """(diffusers' key -> tensor, keys that the conversion left over), on the meta device."""
    from diffusers.loaders import single_file_model as loader

    shapes = _shapes(source)
    converters: Any = loader.SINGLE_FILE_LOADABLE_CLASSES
    name = loader._get_single_file_loadable_mapping_class(kind)
    if name is None:
        raise UserError(
            f"{source.name} is one file of a {kind.__name__}, which diffusers does not load from one file; give the "
            "folder of its diffusers pipeline."
        )
    if not loader._should_convert_state_dict_to_diffusers(places, shapes):
        return shapes, []
    rest = {key: tensor for key, tensor in shapes.items() if key.startswith(PREFIX)} or shapes
    count = sum(tensor.numel() for tensor in rest.values())
    try:
        found = converters[name]["checkpoint_mapping_fn"](config=config, checkpoint=rest)
    except KeyError as error:
        raise UserError(
            f"{source.name} lacks {error.args[0]}, which a {kind.__name__} has; download it again."
        ) from error
    complete = sum(tensor.numel() for tensor in found.values()) == count  # converting cuts and joins, and loses nothing
    return dict(found), [] if complete else sorted(rest)
