"""One file of weights: GGUF and .safetensors of diffusers' transformers, GGUF of language models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.loading import load_skeleton, single_file
from skipwise.plan import Plan
from tests.tiny_models import IMAGE, example, output

SD3_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}

JOINED = {
    "x_block.attn.qkv": "attn.to_{}",
    "x_block.attn2.qkv": "attn2.to_{}",
    "context_block.attn.qkv": "attn.add_{}_proj",
}


def authors_layout(model: Any) -> dict[str, Tensor]:
    """The weights of an SD3 as its authors name and join them."""
    weights, found = dict(model.state_dict()), {}
    last = model.config.num_layers - 1
    for number in range(last + 1):
        for there, here in JOINED.items():
            for kind in ("weight", "bias"):
                parts = [f"transformer_blocks.{number}.{here.format(letter)}.{kind}" for letter in "qkv"]
                if parts[0] in weights:
                    found[f"joint_blocks.{number}.{there}.{kind}"] = torch.cat([weights.pop(part) for part in parts])
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".") if name not in SD3_NAMES else (name, "", "")
        block, where = "", stem
        if stem.startswith("transformer_blocks."):
            _, number, where = stem.split(".", 2)
            block = f"joint_blocks.{number}."
        if stem in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        found[f"{block}{SD3_NAMES[where]}{f'.{kind}' if kind else ''}"] = tensor.contiguous()
    return found


def write_gguf(path: Path, tensors: dict[str, Tensor], arch: str) -> Path:
    """Matrices packed to 8 bits where rows are long enough."""
    writer = gguf.GGUFWriter(str(path), arch)
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.numpy())
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    return close(writer, path)


def close(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def beside(config: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sd3() -> Any:
    return IMAGE["sd3"]()


@pytest.fixture(scope="module")
def config(sd3: Any) -> dict[str, Any]:
    return json.loads(sd3.to_json_string())


@pytest.mark.parametrize("layout", ["authors", "with other parts", "diffusers"])
def test_safetensors_of_a_transformer(layout: str, sd3: Any, config: dict[str, Any], tmp_path: Path) -> None:
    path = beside(config, tmp_path) / "sd3.safetensors"
    weights = authors_layout(sd3) if layout != "diffusers" else {k: v.contiguous() for k, v in sd3.state_dict().items()}
    if layout == "with other parts":
        weights = {f"model.diffusion_model.{key}": value for key, value in weights.items()} | {"vae.x": torch.ones(1)}
    save_file(weights, path)
    model, tokenizer = sw.load(str(path), dtype="float32")
    assert tokenizer is None
    assert torch.equal(output(model, example(sd3)), output(sd3, example(sd3)))
    assert find_contract(load_skeleton(str(path))).shape == find_contract(sd3).shape


@pytest.mark.parametrize("authors", [True, False])
def test_gguf_of_a_transformer(authors: bool, sd3: Any, config: dict[str, Any], tmp_path: Path) -> None:
    """Weights stay packed; plans go with it."""
    weights = authors_layout(sd3) if authors else dict(sd3.state_dict())
    path = write_gguf(beside(config, tmp_path) / "sd3-Q8_0.gguf", weights, "sd3")
    model, _ = sw.load(str(path))
    assert any(type(p).__name__ == "GGUFParameter" for p in model.parameters())
    inputs = example(sd3)
    expected = output(sd3, inputs)
    assert (output(model, inputs) - expected).norm() < 0.05 * expected.norm()
    plan = Plan.static(find_contract(sd3).shape, {"transformer_blocks": [1]})
    with sw.skip(sd3, plan):
        expected = output(sd3, inputs)
    with sw.skip(model, plan):
        assert (output(model, inputs) - expected).norm() < 0.05 * expected.norm()


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor less": (lambda w: w.pop("joint_blocks.1.x_block.mlp.fc1.bias"), r"lacks joint_blocks\.1\.x_block"),
    "a block less": (lambda w: [w.pop(k) for k in list(w) if "blocks.3." in k], "lacks|unknown|wrong shape"),
    "a block more": (
        lambda w: w.update({k.replace("blocks.0.", "blocks.4."): v.clone() for k, v in w.items() if "blocks.0." in k}),
        "lacks|unknown|wrong shape",
    ),
    "another tensor": (lambda w: w.update({"joint_blocks.1.x_block.scale": torch.ones(1)}), r"unknown joint_blocks\.1"),
    "another width": (
        lambda w: w.update({"context_embedder.weight": torch.ones(32, 7)}),
        "wrong shape for context_emb",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_that_does_not_fit_is_refused(
    wrong: str, kind: str, sd3: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    """Before any weight is read, also without weights at all."""
    change, why = WRONG[wrong]
    weights = authors_layout(sd3)
    change(weights)
    path = beside(config, tmp_path) / f"sd3.{kind}"
    write_gguf(path, weights, "sd3") if kind == "gguf" else save_file(weights, path)
    for load in (sw.load, load_skeleton):
        with pytest.raises(sw.UserError, match=why) as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_flux_in_its_authors_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shapes of a file as they are published: 3072 wide, joined projections."""
    skeleton = load_skeleton("flux.1-dev")
    joined: dict[str, Tensor] = {}
    wide = 3072
    for kind, sides in (("double_blocks", 19), ("single_blocks", 38)):
        for number in range(sides):
            at = f"{kind}.{number}."
            layers = (
                {f"{side}_{part}": shape for side in ("img", "txt") for part, shape in (
                    ("mod.lin", (6 * wide, wide)), ("attn.qkv", (3 * wide, wide)), ("attn.proj", (wide, wide)),
                    ("mlp.0", (4 * wide, wide)), ("mlp.2", (wide, 4 * wide)))}
                if kind == "double_blocks"
                else {"modulation.lin": (3 * wide, wide), "linear1": (7 * wide, wide), "linear2": (wide, 5 * wide)}
            )  # fmt: skip
            norms = [f"{side}_attn.norm." for side in ("img", "txt")] if kind == "double_blocks" else ["norm."]
            joined |= {f"{at}{norm}{part}_norm.scale": empty(128) for norm in norms for part in ("query", "key")}
            for layer, shape in layers.items():
                joined |= {f"{at}{layer}.weight": empty(*shape), f"{at}{layer}.bias": empty(shape[0])}
    outer = {"img_in": (wide, 64), "txt_in": (wide, 4096), "final_layer.linear": (64, wide),
             "final_layer.adaLN_modulation.1": (2 * wide, wide)}  # fmt: skip
    for name, width in {"time_in": 256, "vector_in": 768, "guidance_in": 256}.items():
        outer |= {f"{name}.in_layer": (wide, width), f"{name}.out_layer": (wide, wide)}
    for name, shape in outer.items():
        joined |= {f"{name}.weight": empty(*shape), f"{name}.bias": empty(shape[0])}
    path = beside(json.loads(skeleton.to_json_string()), tmp_path) / "flux1-dev.safetensors"
    path.touch()
    monkeypatch.setattr(single_file, "_shapes", lambda source: dict(joined))
    found = load_skeleton(str(path))
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in skeleton.state_dict().items()}
    joined.pop("single_blocks.37.linear1.bias")
    with pytest.raises(sw.UserError, match=r"lacks single_blocks\.37\.linear1\.bias"):
        load_skeleton(str(path))


def test_a_file_of_a_language_model_is_in_its_folder(tmp_path: Path) -> None:
    beside({"model_type": "qwen2"}, tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(sw.UserError, match=r"is one file of the model in .*; give that folder"):
        sw.load(str(tmp_path / "model.safetensors"))


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_without_a_config_the_next_step_is_told(
    sd3: Any, tmp_path: Path, skipwise: Callable[..., tuple[int, str, str]]
) -> None:
    unknown = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32)}
    files = [write_gguf(tmp_path / "flux1-dev-Q8_0.gguf", unknown, "flux"), tmp_path / "flux1-dev.safetensors"]
    save_file(unknown, files[1])
    for path in files:
        for command in (["inspect"], ["generate"]):
            code, _, err = skipwise(*command, path, *(["hello"] if command == ["generate"] else []))
            assert code == 2
            assert "put the transformer's config.json of its diffusers pipeline beside it" in err
        code, _, err = skipwise("finetune", path, "--dry-run")
        assert code == 2
        assert "give the folder of the whole diffusers pipeline" in err
    beside(json.loads(sd3.to_json_string()), tmp_path)
    code, out, _ = skipwise("inspect", write_gguf(tmp_path / "sd3.gguf", authors_layout(sd3), "sd3"), "--image", 16)
    assert code == 0
    assert "SD3Transformer2DModel" in out


def qwen2(path: Path, change: Callable[[Any], None] | None = None, arch: str = "qwen2", **shape: Any) -> Any:
    """A tiny language model, written as a GGUF file; change(writer) adds to it. rope: of the model's config."""
    torch.manual_seed(0)
    config = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
              "num_key_value_heads": 2, "num_hidden_layers": 4, "tie_word_embeddings": False}  # fmt: skip
    classes = {"qwen2": ("Qwen2", "QWEN2"), "gemma3": ("Gemma3", "GEMMA3")}[arch]
    suffix = "TextConfig" if arch == "gemma3" else "Config"
    extra = {"head_dim": 16, "sliding_window": 8, "layer_types": ["full_attention"] * 4} if arch == "gemma3" else {}
    model_class = getattr(transformers, f"{classes[0]}ForCausalLM")
    if "rope" in shape:
        extra["rope_parameters"] = shape["rope"]
    model = model_class(getattr(transformers, f"{classes[0]}{suffix}")(**config | extra)).eval()
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(shape.get("blocks", 4))
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_rope_freq_base(1e4)
    if arch == "gemma3":
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_sliding_window(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [chr(33 + i).encode() for i in range(94)] + [b'!"', b"#$"]
    if arch == "gemma3":  # its tokenizer adds those of these that are not there
        tokens[10:15] = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"<mask>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 96)
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[classes[1]], 4)
    for key, value in model.state_dict().items():
        stem, kind = key.rsplit(".", 1)
        shift = 1 if arch == "gemma3" and "norm" in key else 0  # as llama.cpp holds them
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(value.numpy() + shift))
    if change:
        change(writer)
    close(writer, path)
    return model


def test_gguf_of_a_language_model(tmp_path: Path) -> None:
    model = qwen2(tmp_path / "m.gguf")
    loaded, tokenizer = sw.load(str(tmp_path / "m.gguf"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert tokenizer is not None
    assert find_contract(load_skeleton(str(tmp_path / "m.gguf"))).shape == find_contract(model).shape


def test_llama3s_rotations_are_read(tmp_path: Path) -> None:
    """The factors that llama.cpp writes for Llama 3, by which it divides frequencies, are put back into the config."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    lengths = 2 * torch.pi * 1e4 ** (torch.arange(0, 16, 2) / 16)
    smooth = (8192 / lengths - 1) / 3
    factors = torch.where(lengths < 2048, 1.0, torch.where(lengths > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    assert 1 < factors[-2] < 8, "one in between"
    model = qwen2(
        tmp_path / "m.gguf",
        lambda writer: writer.add_tensor("rope_freqs.weight", factors.float().numpy()),
        rope=rope | {"original_max_position_embeddings": 8192},
    )
    loaded, _ = sw.load(str(tmp_path / "m.gguf"))
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


SHORT: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None, str]] = {
    "fewer blocks": ({"blocks": 6}, None, r"has 6 blocks \(qwen2.block_count\), but lacks the tensors of block 4"),
    "more blocks": ({"blocks": 3}, None, "has 3 blocks .*, but has the tensors of block 3"),
    "another tensor": (
        {},
        lambda w: w.add_tensor("blk.0.attn_k_norm.weight", np.ones(16, "float32")),
        "some tensors were not read",
    ),
    "scaled rotations": (
        {},
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype="float32")),
        r"has rope_freqs.weight=1 to 8, which transformers does not read",
    ),
    "yarn": ({}, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"rope.scaling.type=yarn, which"),
}


@pytest.mark.parametrize("wrong", SHORT)
def test_every_tensor_and_fact_of_a_gguf_file_counts(wrong: str, tmp_path: Path) -> None:
    shape, change, why = SHORT[wrong]
    qwen2(tmp_path / "m.gguf", change, **shape)
    with pytest.raises(sw.UserError, match=why) as caught:
        sw.load(str(tmp_path / "m.gguf"))
    assert "\n" not in str(caught.value)


def test_the_kinds_of_layers_of_a_gguf_file_count(tmp_path: Path) -> None:
    """transformers makes Gemma 3's kinds by position and does not look at the file's list."""

    def kinds(*full: int) -> Callable[[Any], None]:
        return lambda writer: writer.add_sliding_window_pattern([number not in full for number in range(4)])

    qwen2(tmp_path / "odd.gguf", kinds(0, 2), "gemma3")
    with pytest.raises(sw.UserError, match=r"gemma3.attention.sliding_window_pattern=\[False, True, False, True\]"):
        sw.load(str(tmp_path / "odd.gguf"))
    qwen2(tmp_path / "as-built.gguf", kinds(), "gemma3")
    assert sw.load(str(tmp_path / "as-built.gguf"))[0].config.layer_types == ["sliding_attention"] * 4
