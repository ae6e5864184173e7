"""Every way to name a model, and every way to get it wrong: one line with the next step."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import skipwise as sw
from skipwise.loading import embedded_names
from tests.tiny_models import ROWS


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    ROWS["llama"]().save_pretrained(folder)
    return folder


def fails(name: str, message: str, **settings: Any) -> None:
    with pytest.raises(sw.UserError, match=message) as caught:
        sw.load(name, **settings)
    assert "\n" not in str(caught.value)


def test_embedded_models_are_a_pair() -> None:
    """The same tokenizer, depth and width; one looks both ways, the other back only."""
    assert embedded_names() == [
        "tiny-ar",
        "tiny-ar2dllm",
        "tiny-dit",
        "tiny-dllm",
        "tiny-dllm-light",
        "tiny-text",
        "tiny-text-light",
    ]
    (dllm, words), (ar, others) = sw.load("tiny-dllm"), sw.load("tiny-ar")
    assert words.get_vocab() == others.get_vocab()
    shapes = [[tuple(p.shape) for p in m.state_dict().values()] for m in (dllm, ar)]
    assert shapes[0] == shapes[1]
    assert len(dllm.model.layers) == 24
    assert not dllm.training
    assert dllm.name_or_path == "tiny-dllm"
    ids = torch.tensor([words("s3141592=")["input_ids"]])
    other = ids.clone()
    other[0, -1] = 5
    with torch.no_grad():
        assert torch.equal(ar(ids).logits[:, :-1], ar(other).logits[:, :-1])
        assert not torch.equal(dllm(ids).logits[:, :-1], dllm(other).logits[:, :-1])


def test_folder(llama: Path) -> None:
    model, tokenizer = sw.load(str(llama))
    assert tokenizer is None
    expected = ROWS["llama"]().state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert sw.load(str(llama), dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(torch.bfloat16, torch.bfloat16), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("auto", torch.float32)],
)
def test_dtypes_as_people_write_them(dtype: Any, found: torch.dtype) -> None:
    assert sw.load("tiny-dllm", dtype=dtype)[0].dtype == found
    assert next(sw.load_skeleton("tiny-dllm", dtype=dtype).parameters()).dtype == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.int8}, "Unknown dtype 'torch.int8'. Available: bfloat16, float16, float32"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"device": "gpu"}, "device='gpu' is no device; use cpu"),
        ({"device": "meta"}, "There is no device 'meta' for weights"),
        ({"device": "xla:7"}, "There is no device 'xla:7' for weights"),
        ({"device": "cpu", "device_map": "auto"}, "both place the weights; give one of them"),
        ({"device_map": "everywhere"}, "cannot be loaded"),
        ({"variant": "fp16"}, "model.fp16.safetensors"),
        ({"quantization_config": 4}, r"quantization_config=4 is none; .*BitsAndBytesConfig\(load_in_4bit=True\)"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    fails("tiny-dllm", message, **settings)


def test_settings_are_checked_before_anything_is_read() -> None:
    for settings in ({"dtype": "int3"}, {"device": "gpu"}, {"device": "cpu", "device_map": "auto"}):
        with pytest.raises(sw.UserError) as caught:
            sw.load("no such model", **settings)
        assert "no such model" not in str(caught.value)


def test_a_device_map_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    fails(
        "tiny-dllm",
        r"needs accelerate, which is not installed. Install it with: pip install 'skipwise\[image\]'",
        device_map="auto",
    )


@pytest.mark.parametrize("name", ["tiny-dllm", "tiny-text", "tiny-dit"])
def test_a_device_map(name: str) -> None:
    """Everything on one device, as accelerate or a dictionary places it: the same weights."""
    plain = sw.load(name)[0].state_dict()
    for wanted in ("auto", {"": "cpu"}):
        placed = sw.load(name, device_map=wanted)[0].state_dict()
        assert all(torch.equal(tensor, placed[key]) for key, tensor in plain.items())


def test_a_variant_of_the_weights(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "model.fp16.safetensors")
    assert sw.load(str(llama), variant="fp16")[0].config.num_hidden_layers == 4


def test_another_tokenizer(llama: Path) -> None:
    assert sw.load(str(llama))[1] is None
    assert sw.load(str(llama), tokenizer="tiny-dllm")[1].get_vocab() == sw.load("tiny-dllm")[1].get_vocab()


@pytest.mark.parametrize("name", ["gpt2", "bert", "modernbert", "gemma3", "diffusion_gemma"])
def test_transformers_folders_of_every_kind(name: str, tmp_path: Path) -> None:
    model = ROWS[name]()
    model.save_pretrained(tmp_path / "m")
    assert type(sw.load(str(tmp_path / "m"))[0]) is type(model)


@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers_folder(pipeline: bool, tmp_path: Path) -> None:
    model = ROWS["sana"]()
    model.save_pretrained(tmp_path / "transformer" if pipeline else tmp_path)
    if pipeline:
        (tmp_path / "model_index.json").write_text("{}")
    loaded, tokenizer = sw.load(str(tmp_path))
    assert tokenizer is None
    assert type(loaded) is type(model)
    assert torch.equal(loaded.state_dict()["proj_out.weight"], model.state_dict()["proj_out.weight"])
    skeleton = sw.load_skeleton(str(tmp_path))
    assert all(p.is_meta for p in skeleton.parameters())


def test_skeleton_from_a_config_alone(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    skeleton = sw.load_skeleton(str(llama))
    assert all(p.is_meta for p in skeleton.parameters())
    assert sw.find_contract(skeleton).stacks["model.layers"].length == 4
    fails(str(llama), "has a config but no .safetensors weights; use it with `skipwise inspect`")


def test_hub_id_from_the_offline_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that was fetched before is found in the hub's cache without a network."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    llama.rename(cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, _ = sw.load("org/name")
    assert model.name_or_path == "org/name"
    fails("org/other", "org/other is no folder here and cannot be fetched from the hub")


def test_names_with_a_typo() -> None:
    fails(
        "tiny-dlm",
        r"Unknown model 'tiny-dlm'. Did you mean 'tiny-dllm'\?.*an existing folder, a .gguf file, or a hub id",
    )
    fails("llada-8", "Did you mean 'llada-8b'")
    fails("llada-8b", "is a preset, a config without weights; use it with `skipwise inspect`")
    fails("./nowhere/model", "Unknown model")
    fails("tiny-ar", r"Unknown dtype 'float23'. Did you mean 'float32'", dtype="float23")
    with pytest.raises(sw.UserError, match="Unknown model"):
        sw.load_skeleton("flux1-dev")


def test_missing_parts(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    fails(str(tmp_path / "empty"), "has no config.json")
    (llama / "config.json").write_text("{not json")
    fails(str(llama), "config.json cannot be read")
    (llama / "config.json").write_text("[]")
    fails(str(llama), "is not a model's config")
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "empty"))
    fails("smollm2-135m", "run `make smollm2` once")
    fails(str(tmp_path / "no.gguf"), "There is no file")


def test_pickle_is_refused(llama: Path) -> None:
    torch.save({}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    fails(str(llama), r"only as pickle \(pytorch_model.bin\).*convert it to safetensors")


def test_remote_code_is_never_run(llama: Path) -> None:
    marker = llama / "was_run"
    (llama / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((llama / "config.json").read_text())
    config |= {
        "model_type": "novel",
        "auto_map": {"AutoModelForCausalLM": "modeling.Novel", "AutoConfig": "modeling.C"},
    }
    (llama / "config.json").write_text(json.dumps(config))
    fails(str(llama), "model_type 'novel'.*own code is never run")
    assert not marker.exists()


def cut_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def garbage(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")


@pytest.mark.parametrize("damage", [cut_data, cut_header, garbage])
@pytest.mark.parametrize("native", [False, True])
def test_damaged_safetensors(damage: Callable[[Path], None], native: bool, llama: Path, tmp_path: Path) -> None:
    folder = llama
    if native:
        import shutil
        from importlib.resources import files

        folder = tmp_path / "dllm"
        shutil.copytree(str(files("skipwise.zoo").joinpath("weights", "tiny-dllm")), folder)
    damage(folder / "model.safetensors")
    fails(str(folder), "damaged or cut short")


def test_wrong_architecture(llama: Path) -> None:
    """A config that names another model than the weights are of."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    fails(str(llama), "does not fit 'gpt2': the checkpoint lacks")
    official = {
        "model_type": "llada",
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "mlp_hidden_size": 48,
        "vocab_size": 64,
    }
    (llama / "config.json").write_text(json.dumps(official))
    fails(str(llama), "does not fit 'llada'")
    (llama / "config.json").write_text(json.dumps({"model_type": "llada"}))
    fails(str(llama), "LLaDA config lacks d_model")


def test_missing_keys_are_an_error_for_transformers_models_too(llama: Path) -> None:
    weights = ROWS["llama"]().state_dict()
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    fails(str(llama), "lacks model.layers.2.mlp.up_proj.weight")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ROWS["sana"]().save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    fails(str(tmp_path), r"needs diffusers, which is not installed. Install it with: pip install 'skipwise\[image\]'")


def write_gguf(path: Path, model: nn.Module) -> None:
    """A llama in GGUF's layout, with a tokenizer of single letters."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(33 + i) for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for key, tensor in weights.items():
        module = key.removesuffix(".weight")
        if module not in names:
            _, _, number, part = module.split(".", 3)
            if part[-6:-5] in heads and part.endswith("_proj") and "self_attn" in part:
                # GGUF holds rotary pairs interleaved
                n = heads[part[-6]]
                tensor = tensor.view(n, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{number}.{parts[part]}.weight", tensor.contiguous().numpy())
        else:
            writer.add_tensor(f"{names[module]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    """transformers reads a GGUF file; the logits are those of the model that was written."""
    model = ROWS["llama"]()
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = sw.load(str(tmp_path / "tiny.gguf"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert len(tokenizer) >= model.config.vocab_size
