"""Every way of loading is as strict about missing and surplus keys: right, or one line that names one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import skipwise as sw
from tests.tiny_models import IMAGE, LANGUAGE, example, output


def saved(kind: str, folder: Path, shards: bool = False) -> nn.Module:
    model = (IMAGE | LANGUAGE)[kind]()
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    return model


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(weights_of(folder))
    change(weights)
    save_file(weights, weights_of(folder), {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BLOCK = {"qwen2": "model.layers", "flux": "transformer_blocks"}
COUNT = {"qwen2": "num_hidden_layers", "flux": "num_layers"}


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_blocks(kind: str, change: int, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    count = getattr(model.config, COUNT[kind])
    configure(
        tmp_path,
        **{COUNT[kind]: count + change, "layer_types": None} if kind == "qwen2" else {COUNT[kind]: count + change},
    )
    what = "unknown" if change < 0 else "lacks"
    with pytest.raises(sw.UserError, match=rf"{what} {BLOCK[kind]}\.{count + min(change, 0)}\.") as caught:
        sw.load(str(tmp_path))
    assert "\n" not in str(caught.value)


PARTS = {
    "qwen2": ["model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.k_norm.weight", "model.norm.bias"],
    "flux": ["transformer_blocks.0.attn.gate", "other.weight"],
    "llada": ["model.transformer.blocks.0.odd.weight", "other.weight"],
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_the_model_has_no_place_for(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    original = weights_of(tmp_path).read_bytes()
    for key in PARTS[kind]:
        weights_of(tmp_path).write_bytes(original)
        rewrite(tmp_path, lambda weights, key=key: weights.update({key: torch.ones(3)}))
        with pytest.raises(sw.UserError, match=f"unknown {key.split('.')[0]}"):
            sw.load(str(tmp_path))


def test_what_a_class_lacks_by_design_is_left_out(tmp_path: Path) -> None:
    """As BERT's checkpoints have another head and a pooler, and old ones of GPT-2 the mask."""
    for kind, extra in (
        ("bert", {"bert.pooler.dense.weight": torch.ones(3, 3), "cls.seq_relationship.weight": torch.ones(2, 3)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ):
        model = saved(kind, tmp_path / kind)
        rewrite(tmp_path / kind, lambda weights, extra=extra: weights.update(extra))
        loaded, _ = sw.load(str(tmp_path / kind))
        assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())


def test_a_block_without_the_outer_prefix(tmp_path: Path) -> None:
    """As GPT-2 was published: the keys of further blocks do not look like the model's."""
    saved("gpt2", tmp_path)

    def older(weights: dict[str, Tensor]) -> None:
        for key in list(weights):
            weights[key.removeprefix("transformer.")] = weights.pop(key)
        weights["h.4.ln_1.weight"] = torch.ones(32)

    rewrite(tmp_path, older)
    with pytest.raises(sw.UserError, match=r"unknown h\.4\.ln_1"):
        sw.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen2", "flux"])
@pytest.mark.parametrize("shards", [False, True])
def test_only_a_variant(kind: str, shards: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is taken, and that is said; beside the plain weights it is taken when it is asked for."""
    model = saved(kind, tmp_path / "plain").half()
    model.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="60KB" if shards else "1GB")
    assert any(".fp16" in path.name for path in (tmp_path / "half").iterdir())
    with caplog.at_level("INFO", logger="skipwise"):
        loaded, _ = sw.load(str(tmp_path / "half"))
    assert "only in the variant fp16" in caplog.text
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    for path in (tmp_path / "half").iterdir():
        if path.name != "config.json":
            path.rename(tmp_path / "plain" / path.name)
    assert {p.dtype for p in sw.load(str(tmp_path / "plain"), variant="fp16", dtype="float16")[0].parameters()} == {
        torch.float16
    }
    full, _ = sw.load(str(tmp_path / "plain"))
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    with pytest.raises(sw.UserError):
        sw.load(str(tmp_path / "plain"), variant="bf16")


@pytest.mark.parametrize("kind", ["qwen2", "flux"])
def test_an_index_that_names_what_is_not_there(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path, shards=True)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded, _ = sw.load(str(tmp_path))
    if kind == "flux":
        assert torch.equal(output(loaded, example(model)), output(model, example(model)))
    shards[1].unlink()
    with pytest.raises(sw.UserError) as caught:
        sw.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert shards[1].name in str(caught.value)


def test_a_wrong_shape(tmp_path: Path) -> None:
    for kind, change in (("flux", {"joint_attention_dim": 17}), ("qwen2", {"intermediate_size": 52})):
        saved(kind, tmp_path / kind)
        configure(tmp_path / kind, **change)
        with pytest.raises(sw.UserError) as caught:
            sw.load(str(tmp_path / kind))
        assert "context_embedder" in str(caught.value) or "mlp" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_of_a_text_tower_alone_are_right(tmp_path: Path) -> None:
    """A class of transformers that names keys as surplus by design keeps its own list."""
    saved("gpt_neox", tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4)}))
    assert isinstance(sw.load(str(tmp_path))[0], transformers.GPTNeoXForCausalLM)
