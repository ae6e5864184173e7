"""A GGUF file is read back by transformers as the exported model, tensor by tensor and logit by logit."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import skipwise as sw
from skipwise.blocks import find_contract
from tests.tiny_models import DECODER, _lm

S, F = "sliding_attention", "full_attention"
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
G3 = {
    "rope_parameters": {S: {"rope_type": "default", "rope_theta": 1e4}, F: {"rope_type": "default", "rope_theta": 1e6}}
}
EIGHT = DECODER | {"num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 300}
ROWS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", EIGHT | THETA, (2, 5)),
    "llama, tied": ("LlamaConfig", "LlamaForCausalLM", EIGHT | {"tie_word_embeddings": True}, (2, 5)),
    "mistral": ("MistralConfig", "MistralForCausalLM", EIGHT | THETA | {"sliding_window": None}, (2, 5)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", EIGHT | THETA, (2, 5)),
    # of Qwen3 transformers' reader takes head_dim as 128, whatever the file says
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", EIGHT | THETA | {"head_dim": 128}, (2, 5)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", EIGHT | THETA | GEMMA | {"sliding_window": 8}, (2, 3)),
    # transformers' reader takes the kinds of layers by position, every sixth, whatever the file says
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        EIGHT | G3 | GEMMA | {"sliding_window": 8, "layer_types": [S, S, S, F, S, S, S, F]},
        (2, 3),
    ),
}
IDS = torch.arange(3, 27)[None]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def saved(name: str, at: Path, dtype: torch.dtype = torch.float32) -> Any:
    config, kind, settings, _ = ROWS[name]
    model: Any = _lm(config, kind, **settings).to(dtype)
    model.save_pretrained(at)
    return model


def exported(model: Any, at: Path, *skipped: int, engine: str = "llama.cpp") -> Path:
    plan = sw.Plan.static(find_contract(model).shape, {"model.layers": skipped})
    return sw.export(plan, at, at.parent / "target", engine=engine)


def tokenizer(at: Path, split: str = QWEN2) -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with Qwen2's way to split, in the source's folder."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["the quick brown fox's 1234 jumps\nover  the lazy dog"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    fast.save_pretrained(at)
    return fast


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("name", ROWS)
def test_transformers_reads_the_exported_model(name: str, tmp_path: Path) -> None:
    target = exported(saved(name, tmp_path / "source"), tmp_path / "source", *ROWS[name][3])
    model = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        target, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[key], tensor, atol=1e-6, rtol=1e-6)
    assert read.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(read.eval()), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_those_of_the_checkpoint(dtype: str, tmp_path: Path) -> None:
    target = exported(saved("llama", tmp_path / "source", getattr(torch, dtype)), tmp_path / "source", 2, 5)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target / "model.gguf").tensors}
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {short}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    read = transformers.AutoModelForCausalLM.from_pretrained(target, gguf_file="model.gguf", dtype=torch.float32)
    assert all(torch.equal(read.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_kinds_of_layers_are_in_the_file(tmp_path: Path) -> None:
    target = exported(saved("gemma3", tmp_path / "source"), tmp_path / "source", 1, 2)
    fields = gguf.GGUFReader(target / "model.gguf").fields
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False, True, True, True, False]
    assert fields["gemma3.block_count"].contents() == 6


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    model = saved("qwen2", tmp_path / "source")
    fast = tokenizer(tmp_path / "source")
    target = exported(model, tmp_path / "source", 2, 5)
    fields = gguf.GGUFReader(target / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 300
    read = transformers.AutoTokenizer.from_pretrained(target, gguf_file="model.gguf")
    for text in ("the lazy fox's 99 dogs", "12\n\n  jumps <|end|> é"):
        assert read(text)["input_ids"] == fast(text)["input_ids"]
    assert read.eos_token == "<|end|>"


def test_what_the_file_cannot_say_is_refused(tmp_path: Path) -> None:
    model = saved("qwen2", tmp_path / "source")
    tokenizer(tmp_path / "source", split=r"\s+")
    with pytest.raises(sw.UserError, match="tokenizer is not byte-level BPE with a known way to split"):
        exported(model, tmp_path / "source", 2)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(sw.UserError, match=r"Rope scaling \(linear\) is not written to GGUF"):
        exported(model, tmp_path / "source", 2)
    small = DECODER | {"num_hidden_layers": 4}
    other: Any = _lm("SmolLM3Config", "SmolLM3ForCausalLM", **small)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(sw.UserError, match=r"GGUF files are written for llama, .* and this is 'smollm3'"):
        exported(other, tmp_path / "other", 3)
    assert not (tmp_path / "target").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    model: Any = _lm("Qwen2Config", "Qwen2ForCausalLM", **EIGHT | THETA | {"vocab_size": 280})
    model.save_pretrained(tmp_path / "source")
    tokenizer(tmp_path / "source")
    with pytest.raises(sw.UserError, match=r"the token .* at \d+, and the model knows 280 tokens") as error:
        exported(model, tmp_path / "source", 2)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()
