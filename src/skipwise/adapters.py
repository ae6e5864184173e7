"""An adapter, as peft writes it, merged into a model's weights for a while.

Merged weights cost nothing in a forward, and because the originals are put back as they were, leaving changes nothing.
peft itself computes what an adapter makes of the weights, on copies of those that it touches, so that every kind of
adapter and every field of its config means what it means to peft. What peft cannot merge is refused. Only the plainest
kind, which `skipwise heal` writes, is also computed here: the same numbers without peft, and without the second that
peft takes to wrap a model.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from skipwise.errors import UserError, require
from skipwise.files import read_json
from skipwise.twins import meta_twin

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's own name for the only adapter of a model
_PREFIX = "base_model.model."

# Fields of a LoRA's config that say how it was trained, or that `_plain_lora` takes into account itself
_HARMLESS = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
    ),
    *("r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "init_lora_weights"),
    *("megatron_core", "qalora_group_size"),  # need another field to have an effect
}
_OFF: tuple[Any, ...] = (None, False, [], {}, "none")


def merged_tensors(model: nn.Module, folder: Path, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Name of a parameter or buffer of `model` -> what it is with the adapter in `folder` merged; changed ones only.

    model: gives names and shapes, it may be on the meta device and is not changed. read: the tensor of this name, of
    the model without the adapter. Sums are in float32, rounded once to the dtype of what `read` gave, and on its
    device. Raises UserError without peft, for an adapter that peft cannot merge, and for a key or a config field that
    would have no effect.
    """
    plain = _plain_lora(model, folder)
    if plain is not None:
        return {name: _sum(read(name), *factors) for name, factors in plain.items()}
    require("peft", "heal")
    config = _read_config(folder)
    with _one_line(folder), torch.random.fork_rng(devices=[]), torch.no_grad():
        touched = _touched(model, config, folder)
        originals = {name: read(name) for name in touched}
        shadow = _shadow(model, {name: _working_copy(name, tensor) for name, tensor in originals.items()})
        result = _load(shadow, config, folder, hollow=False).merge_and_unload(safe_merge=True)
        found = dict(_named_tensors(result))
    if set(found) != {name for name, _ in _named_tensors(model)}:
        odd = min(set(found).symmetric_difference(name for name, _ in _named_tensors(model)))
        raise UserError(f"The adapter in {folder} adds or removes {odd}; only one that changes weights can be merged.")
    rounded = {name: tensor.to(originals[name]) for name, tensor in found.items() if not tensor.is_meta}
    return {name: tensor for name, tensor in rounded.items() if not torch.equal(tensor, originals[name])}


def _plain_lora(model: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor, float]] | None:
    """Name of a weight -> A, B and scale, when the adapter is W + scale * B A of linear layers (Hu et al.,
    arXiv 2106.09685) and nothing else, by its whole config and all of its keys. Anything else is for peft: None.
    """
    config = _read_json(folder)
    odd = [name for name, value in config.items() if name not in _HARMLESS and value not in _OFF]
    usual = config.get("peft_type") == "LORA" and config.get("init_lora_weights", True) in (True, False, "gaussian")
    targets = config.get("target_modules")
    rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
    numbers = all(isinstance(value, int | float) and value > 0 for value in (rank, alpha))
    if odd or not usual or not numbers or not isinstance(targets, list):
        return None
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    linear = {
        path: module
        for path, module in model.named_modules()
        if any(path == target or path.endswith(f".{target}") for target in targets)
    }
    tensors = _read_weights(folder)
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in linear.items():
        if type(module) is not nn.Linear:
            return None
        shapes[f"{_PREFIX}{path}.lora_A.weight"] = rank, module.in_features
        shapes[f"{_PREFIX}{path}.lora_B.weight"] = module.out_features, rank
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != shapes:
        return None
    factors = {path: [tensors[f"{_PREFIX}{path}.lora_{letter}.weight"] for letter in "AB"] for path in linear}
    return {f"{path}.weight": (a, b, scale) for path, (a, b) in factors.items()}


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    delta = (b.float() @ a.float()) * scale
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (precise + delta.to(weight.device)).to(weight.dtype)


@contextmanager
def merged(model: nn.Module, folder: Path | None) -> Iterator[None]:
    """The model with the adapter in `folder` merged into its weights; None changes nothing.

    On leaving, the original tensors are back, on the device and in the dtype to which the model was moved meanwhile, if
    it was. Raises UserError as `merged_tensors` does, and for weights that are quantised, sharded or offloaded, whose
    owner would not see the change.
    """
    if folder is None or _is_skeleton(model):
        yield
        return
    check_mergeable(model)
    tensors = dict(_named_tensors(model))
    changes = [
        _Change.to(model, name, tensor)
        for name, tensor in merged_tensors(model, folder, lambda name: _present(model, name, tensors[name])).items()
    ]
    try:
        for change in changes:
            change.put()
        yield
    finally:
        for change in changes:
            change.put_back()


@dataclass
class _Change:
    """One tensor of a module, and the one that takes its place for a while."""

    module: nn.Module
    attribute: str
    before: Tensor
    after: Tensor

    @classmethod
    def to(cls, model: nn.Module, name: str, tensor: Tensor) -> "_Change":
        """The change of the tensor of this name to another one."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        before: Tensor = getattr(module, attribute)
        after = tensor.to(before.device)
        return cls(module, attribute, before, nn.Parameter(after, False) if isinstance(before, nn.Parameter) else after)

    def put(self) -> None:
        """Put the new tensor in its place, and remember where it was put."""
        setattr(self.module, self.attribute, self.after)
        self.there = self.after.device, self.after.dtype

    def put_back(self) -> None:
        """Put the original back, moved as the new one was while it was there."""
        now: Tensor = getattr(self.module, self.attribute)
        if hasattr(self, "there") and (now.device, now.dtype) != self.there:
            self.before.data = self.before.data.to(now.device, now.dtype)
        setattr(self.module, self.attribute, self.before)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, a tied one under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_skeleton(model: nn.Module) -> bool:
    """Whether it has shapes alone, and nobody who brings its weights in."""
    return all(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules())


def check_mergeable(model: nn.Module) -> None:
    """Raise UserError for parameters that are not plain tensors in floating point: no adapter is merged exactly into
    quantised ones, and a new tensor in the place of a sharded one has no effect.
    """
    for name, tensor in model.named_parameters():
        if type(tensor) is not nn.Parameter or not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(
                f"An adapter cannot be merged exactly into {name}, which is quantised or sharded "
                f"({type(tensor).__name__}, {tensor.dtype}); load the model in bfloat16, or use the plan without its "
                "adapter and run the adapter unmerged by peft."
            )


def _present(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or UserError when somebody else brings it in and out: then a new one in its place has no effect."""
    parts = name.split(".")[:-1]
    holders = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1)]
    hooks = [hook for holder in holders for hook in getattr(getattr(holder, "_diffusers_hook", None), "hooks", {})]
    grouped = any("offload" in hook or "casting" in hook for hook in hooks)
    if tensor.is_meta or grouped:
        raise UserError(
            f"An adapter cannot be merged into {name} while it is offloaded; load the model without offloading, or "
            "merge the adapter into a checkpoint first (`skipwise export`)."
        )
    return tensor


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy the adapter again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not an adapter's config; copy the adapter again.")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}; copy the adapter again.") from error


def _read_config(folder: Path) -> Any:
    """peft's config of the adapter. Raises UserError for one with fields that the installed peft would drop."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    content = _read_json(folder)
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(content["peft_type"])]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder / CONFIG} has peft_type={content.get('peft_type')!r}, which the installed peft "
            f"{peft.__version__} does not know; install a newer peft."
        ) from error
    known = {field.name for field in fields(kind)}
    for name, value in content.items():
        if name not in known and value not in _OFF:
            raise UserError(
                f"{folder / CONFIG} has {name}={value!r}, which the installed peft {peft.__version__} does not know; "
                "install a newer peft."
            )
    with _one_line(folder):
        config = kind.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise UserError(f"The adapter in {folder} is of kind {content['peft_type']}, which is no change of weights.")
    config.task_type, config.inference_mode = None, False  # the generation of other kinds of models is not needed
    return config


def _touched(model: nn.Module, config: Any, folder: Path) -> list[str]:
    """Names of the tensors that the adapter can change, from a rehearsal without weights.

    Raises UserError, naming it, for a key of the adapter that is not used, and for one that is missing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped = _load(_shadow(model, {}), config, folder, hollow=True)
    inner = wrapped.base_model.model
    wrappers = [
        f"{path}."
        for path, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    written = {name for name, tensor in _named_tensors(inner) if not tensor.is_meta}  # such as biases beside the LoRA
    return [
        name for name, _ in _named_tensors(model) if name in written or any(name.startswith(path) for path in wrappers)
    ]


def _load(shadow: nn.Module, config: Any, folder: Path, hollow: bool) -> Any:
    """peft's model around the shadow, with the adapter's weights in it. hollow: base weights are on the meta device."""
    import peft

    wrapped = peft.PeftModel(shadow, copy.deepcopy(config), _NAME, low_cpu_mem_usage=hollow)
    report = wrapped.load_adapter(
        str(folder),
        _NAME,
        torch_device="cpu",
        low_cpu_mem_usage=hollow,
        key_mapping=getattr(shadow, "_checkpoint_conversion_mapping", {}),
        is_trainable=True,
    )
    names = dict(_named_tensors(wrapped))
    filled = {id(names[name]) for name in names if name not in report.missing_keys}  # some layers share a tensor
    missing = [] if hollow else [name for name in report.missing_keys if id(names.get(name)) not in filled]
    for what, keys in (("has the unknown key", report.unexpected_keys), ("lacks", missing)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"The adapter in {folder} does not fit the model: it {what} "
                f"{keys[0].removeprefix(_PREFIX)}{more}; use it with the model that it was trained on."
            )
    return wrapped


def _shadow(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the model on the meta device, but for these tensors. It shares nothing that can be written with it."""
    shadow = meta_twin(model, by_shape=False).requires_grad_(False)
    shadow.__dict__.pop("hf_device_map", None)  # peft would offload it
    for name, tensor in weights.items():
        path, _, attribute = name.rpartition(".")
        module = shadow.get_submodule(path)
        setattr(module, attribute, nn.Parameter(tensor, False) if attribute in module._parameters else tensor)
    return shadow


def _working_copy(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to("cpu", copy=True)
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """peft's errors as one line, and without its warnings, which are about training."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"peft cannot merge the adapter in {folder} into this model: {reason}") from error
