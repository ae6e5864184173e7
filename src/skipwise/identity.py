"""What a result was made of, so that it is used again for nothing else: weights, plan, tokenizer, settings, versions.

Sums are made to notice a change, not a forgery. Those of a model are of the tensors in memory, every bit of them (about
5 GB a second); of weights that are elsewhere (offloaded, on the meta device) names, sizes and times of the files alone
are known, and the sum says so by its first word.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.errors import UserError
from skipwise.plan import Plan
from skipwise.versions import versions
from skipwise.wrapping import unwrap

WORDS = 2**18  # of 8 bytes, that are weighed at once
VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "_attn_implementation_autoset")


def identity(
    model: nn.Module,
    plan: Plan | None = None,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """The parts that a result depends on, as JSON can hold them: name -> a sum, or plain values.

    others: models that the plan hands steps to, by name.
    """
    parts = {
        "model": weights_identity(model),
        "plan": plan_identity(plan),
        "tokenizer": tokenizer_identity(tokenizer),
        "settings": plain(settings or {}),
        "versions": versions(),
    }
    return parts | {f"model {name}": weights_identity(other) for name, other in (others or {}).items()}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str, instead: str) -> None:
    """Raise UserError, naming every part that differs, for something that was made of something else.

    what: what was made, for the message; instead: what to do.
    """
    ours, theirs = flat(now), flat(before)
    different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if different:
        raise UserError(f"{what} differs in {', '.join(sorted(different))}; {instead}.")


def weights_identity(model: nn.Module) -> str:
    """Of a model's class, config and weights: "tensors:..." of what is in memory, "files:..." of what is not all."""
    model = unwrap(model)
    total = hashlib.sha256(f"{type(model).__name__} {_config(model)} {_switches(model)}".encode())
    here = True
    for name, tensor in _tensors(model):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.is_meta:
            here = False
        else:
            total.update(str(_sum(tensor)).encode())
    if not here:
        total.update(json.dumps(_files(getattr(model, "name_or_path", "") or "")).encode())
    return f"{'tensors' if here else 'files'}:{total.hexdigest()}"


def plan_identity(plan: Plan | None) -> str | None:
    """Of what a plan does, with the sums of its companions; how it was made and where it lies are left out."""
    if plan is None:
        return None
    said = plan.model_dump(mode="json", exclude={"made_by": True, "stand_ins": {"name"}, "adapter": {"name"}})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Of a tokenizer's words, merges, special tokens and chat template."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else getattr(tokenizer, "get_vocab", dict)()
    passing = ("padding", "truncation")  # how the last call asked for it
    said = [
        {name: part for name, part in words.items() if backend is None or name not in passing},
        getattr(tokenizer, "special_tokens_map", {}),
        str(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256(json.dumps(plain(said), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """The value as JSON can hold it, with keys of text; what is none of JSON's kinds by its class and what is in it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = [plain(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, set | frozenset) else parts
    text = str(value)
    return f"{type(value).__name__} {plain(vars(value))}" if " at 0x" in text and hasattr(value, "__dict__") else text


def _config(model: nn.Module) -> str:
    config: Any = getattr(model, "config", {})
    told = config.to_dict() if hasattr(config, "to_dict") else config
    said = told if isinstance(told, Mapping) else getattr(told, "__dict__", {})
    return json.dumps(plain({name: value for name, value in said.items() if name not in VOLATILE}), sort_keys=True)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, with those that quantised weights are made of."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:  # torchao's, DTensor's: made of plain ones
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in inner()[0])
        else:
            yield name, tensor
        state = getattr(tensor, "quant_state", None)  # bitsandbytes' scales
        for holder in (tensor, state, getattr(state, "state2", None)):
            for part, value in getattr(holder, "__dict__", {}).items():
                if isinstance(value, Tensor) and part not in ("grad", "data"):
                    yield f"{name} {type(holder).__name__}.{part}", value
    for path, module in model.named_modules():  # torch's own dynamic quantisation
        if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
            yield f"{path}.weight", module.weight().dequantize()


def _switches(model: nn.Module) -> list[Any]:
    """What adapters on the model are told: scales, which are on, which are merged."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    return [
        [path, *(plain(getattr(module, name)) for name in names)]
        for path, module in model.named_modules()
        if all(hasattr(module, name) for name in names)
    ]


def _sum(tensor: Tensor) -> int:
    """Of all bits, each word weighed by its place with an odd number, so that no single change leaves it as it is."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    dense = tensor.detach().to_dense().resolve_conj().resolve_neg()
    data = dense.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    tail = int.from_bytes(bytes(data[whole:].tolist()))
    words = data[:whole].view(torch.int64)
    if not len(words):
        return tail
    weights = torch.arange(1, 2 * WORDS, 2, device=data.device)
    sums = torch.stack([(part * weights[: len(part)]).sum() for part in words.split(WORDS)])
    places = torch.arange(1, 2 * len(sums), 2, device=data.device)
    return int((sums * places).sum()) * 257 + tail


def _files(name: str) -> list[tuple[str, int, int]]:
    folder = Path(name)
    paths = sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Values by the path to each: `{"tasks": {"sort": {"seed": 0}}}` -> `{"tasks.sort.seed": 0}`."""
    if not isinstance(content, Mapping):
        return {prefix: content}
    parts = (flat(value, f"{prefix}.{key}" if prefix else key) for key, value in content.items())
    return {key: value for part in parts for key, value in part.items()}
