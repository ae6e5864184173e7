"""The GGUF file of an export, for llama.cpp: written by the gguf package, tensor by tensor, with the tokenizer in it.

Numbers are those of the checkpoint (float32, float16 or bfloat16; vectors are float32, as llama.cpp wants them).
Quantising is llama.cpp's own tool: llama-quantize. What the file cannot say exactly is refused: rope scaling, families
that are not below, tokenizers that are not byte-level BPE with a known way to split words.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from skipwise.errors import UserError, require

FILE = "model.gguf"
Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How a family is written. arch: its name in GGUF; permuted: rotary halves of queries and keys are interleaved;
    norm_offset: what is added to the scales of norms, which Gemma stores around zero.
    """

    arch: str
    permuted: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_offset=1.0),
    "gemma3_text": Family("gemma3", norm_offset=1.0),
}
LOCAL_THETA = 10000.0  # llama.cpp takes this for Gemma3's windowed layers
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# how a tokenizer splits text before byte-level BPE -> llama.cpp's name for it
_ENDS = r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {_WORDS + _ENDS % "": "qwen2", _WORDS + _ENDS % "{1,3}": "llama-bpe"}


def check(config: Config, source: Path) -> None:
    """Raise UserError for what the file could not say exactly. source: the folder with the tokenizer."""
    require("gguf", "gguf")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"GGUF files are written for {', '.join(FAMILIES)}, and this is {kind!r}; export without --for and convert "
            "the folder with llama.cpp's own convert_hf_to_gguf.py."
        )
    ropes = config.get("rope_parameters") or {}
    for rope in [value for value in ropes.values() if isinstance(value, dict)] or [ropes]:
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"Rope scaling ({rope['rope_type']}) is not written to GGUF; export without --for and convert the "
                "folder with llama.cpp's own convert_hf_to_gguf.py."
            )
    scale = config.get("query_pre_attn_scalar", config.get("head_dim"))
    if scale != config.get("head_dim"):
        raise UserError(
            f"GGUF has no place for query_pre_attn_scalar ({scale}) where it is not head_dim ({config['head_dim']}); "
            "export without --for llama.cpp."
        )
    local = ropes.get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    if local != LOCAL_THETA:
        raise UserError(f"llama.cpp takes a rope base of {LOCAL_THETA:g} in windowed layers, and here it is {local:g}.")
    _check_vocabulary(_read_tokenizer(source), config["vocab_size"])


def _check_vocabulary(tokenizer: tuple[dict[str, Any], str] | None, size: int) -> None:
    """Raise UserError for a token that the model has no row for."""
    content = tokenizer[0] if tokenizer else {"model": {"vocab": {}}}
    numbers = {added["content"]: added["id"] for added in content.get("added_tokens", [])} | content["model"]["vocab"]
    last = max(numbers, key=lambda token: numbers[token], default=None)
    if last is not None and numbers[last] >= size:
        raise UserError(
            f"The source's tokenizer has the token {last!r} at {numbers[last]}, and the model knows {size} tokens; "
            "put the tokenizer that belongs to the model beside its weights, or export without --for llama.cpp."
        )


def write(folder: Path, config: Config) -> None:
    """Write FILE into the folder of an export. config: its config with what config.json leaves to the class.

    Memory holds one tensor at a time. Raises UserError for a tensor that GGUF has no name or type for.
    """
    gguf = require("gguf", "gguf")
    family = FAMILIES[config["model_type"]]
    writer = gguf.GGUFWriter(folder / FILE, family.arch)
    _add_settings(writer, config, family.arch)
    _add_tokenizer(gguf, writer, folder, config["vocab_size"])
    names = _gguf_names(gguf, family.arch, folder, config["num_hidden_layers"])
    for key, tensor in _tensors(folder):
        shape, dtype, size, kind = _layout(gguf, key, tensor)
        writer.add_tensor_info(names[key], shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _tensors(folder):
        writer.write_tensor_data(_as_written(_changed(key, tensor, family, config)))
    writer.close()


def _add_settings(writer: Any, config: Config, arch: str) -> None:
    ropes = config["rope_parameters"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _read_tokenizer(folder: Path) -> tuple[dict[str, Any], str] | None:
    """(tokenizer.json, llama.cpp's name of its way to split); None where there is no tokenizer at all."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
            raise UserError("The source's tokenizer has no tokenizer.json; save it with transformers first.")
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    split = _split_name(content)
    if split is None:
        raise UserError(
            "The source's tokenizer is not byte-level BPE with a known way to split words, so that it cannot be put "
            "into GGUF; export without --for and convert the folder with llama.cpp's own convert_hf_to_gguf.py."
        )
    return content, split


def _split_name(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer.json splits words."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback") or kinds[-1] != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def _add_tokenizer(gguf: Any, writer: Any, folder: Path, size: int) -> None:
    """Tokens, merges, special tokens and chat template; where there is no tokenizer, the file says so."""
    found = _read_tokenizer(folder)
    if found is None:
        writer.add_tokenizer_model("none")
        return
    content, split = found
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a file, not a dictionary
                yield key, shard.get_tensor(key)


def _gguf_names(gguf: Any, arch: str, folder: Path, depth: int) -> dict[str, str]:
    """GGUF's name of every tensor. Raises UserError for one that it has none for."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, depth)
    found = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key, _ in _tensors(folder)}
    unknown = next((key for key, name in found.items() if name is None), None)
    if unknown is not None:
        raise UserError(f"GGUF's {arch} has no place for {unknown}; export without --for llama.cpp.")
    return found


def _layout(gguf: Any, key: str, tensor: Tensor) -> tuple[tuple[int, ...], Any, int, Any]:
    """(shape, numpy type, bytes, GGUF type) of what is written of a tensor."""
    if tensor.dtype not in DTYPES:
        raise UserError(f"{key} is {tensor.dtype}; GGUF files are written of float32, float16 and bfloat16.")
    written = _as_written(tensor)
    kind = gguf.GGMLQuantizationType[DTYPES[torch.float32 if tensor.ndim == 1 else tensor.dtype]]
    return written.shape, written.dtype, written.nbytes, kind


def _as_written(tensor: Tensor) -> np.ndarray:
    """The tensor as the file holds it: vectors in float32, bfloat16 as bytes, which numpy has no type for."""
    if tensor.ndim == 1:
        return tensor.float().numpy()
    return tensor.contiguous().view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _changed(key: str, tensor: Tensor, family: Family, config: Config) -> Tensor:
    """The tensor by llama.cpp's conventions."""
    if family.norm_offset and key.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    if not family.permuted:
        return tensor
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(key.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
