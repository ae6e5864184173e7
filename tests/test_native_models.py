"""The native dLLMs: official layouts load strictly, and the numbers are those of the official mathematics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import skipwise as sw

V, D, MLP, LAYERS, HEADS, KV, COND = 40, 16, 24, 3, 4, 2, 6
HEAD = D // HEADS

LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": D,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV,
    "mlp_hidden_size": MLP,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": V - 2,
    "embedding_size": V,
    "mask_token_id": 7,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "max_sequence_length": 64,
    "block_type": "llama",
    "block_group_size": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "scale_logits": False,
    "alibi": False,
}
DREAM = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "intermediate_size": MLP,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": V,
    "mask_token_id": 7,
    "pad_token_id": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "use_sliding_window": False,
}
MDLM = {
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "model_length": 32,
    "vocab_size": V,
    "hidden_dim": D,
    "cond_dim": COND,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "dropout": 0.1,
    "time_conditioning": False,
}


def llada_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D), "ln_f.weight": (D,), "ff_out.weight": (V, D)}
    for i in range(LAYERS):
        parts = {"attn_norm": (D,), "q_proj": (D, D), "k_proj": (KV * HEAD, D), "v_proj": (KV * HEAD, D)}
        parts |= {"attn_out": (D, D), "ff_norm": (D,), "ff_proj": (MLP, D), "up_proj": (MLP, D), "ff_out": (D, MLP)}
        shapes |= {f"blocks.{i}.{part}.weight": shape for part, shape in parts.items()}
    return {f"transformer.{key}": shape for key, shape in shapes.items()}


def dream_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, rows in (("q", D), ("k", KV * HEAD), ("v", KV * HEAD)):
            parts |= {f"self_attn.{name}_proj.weight": (rows, D), f"self_attn.{name}_proj.bias": (rows,)}
        parts |= {"self_attn.o_proj.weight": (D, D), "mlp.gate_proj.weight": (MLP, D)}
        parts |= {"mlp.up_proj.weight": (MLP, D), "mlp.down_proj.weight": (D, MLP)}
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in parts.items()}
    return shapes


def mdlm_shapes() -> dict[str, tuple[int, ...]]:
    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (V, D)}
    shapes |= linear("sigma_map.mlp.0", COND, 256) | linear("sigma_map.mlp.2", COND, COND)
    for i in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {"norm1.weight": (D,), "norm2.weight": (D,)}
        parts |= {"attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D)}
        parts |= linear("mlp.0", 4 * D, D) | linear("mlp.2", D, 4 * D) | linear("adaLN_modulation", 6 * D, COND)
        shapes |= {f"blocks.{i}.{part}": shape for part, shape in parts.items()}
    ends: dict[str, tuple[int, ...]] = {"output_layer.norm_final.weight": (D,)}
    return shapes | ends | linear("output_layer.linear", V, D) | linear("output_layer.adaLN_modulation", 2 * D, COND)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1) for key, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], prefix: str = "", shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = {prefix + key: tensor for key, tensor in weights.items()}
    if shards == 1:
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(sorted(named))}
    for file in set(files.values()):
        save_file({k: t for k, t in named.items() if files[k] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in named.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def rotate(x: Tensor, base: float) -> Tensor:
    """x (batch, heads, length, width), rotate-half."""
    length, width = x.shape[-2:]
    angles = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, width, 2).float() / width))
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def heads_of(x: Tensor, n: int) -> Tensor:
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def both_ways(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """Attention of every position to every position, key-value heads repeated."""
    q, k = rotate(q, base), rotate(k, base)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def llada_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][ids]
    for i in range(LAYERS):
        p = {k.split(".")[3]: t for k, t in w.items() if k.startswith(f"transformer.blocks.{i}.")}
        h = rms(x, p["attn_norm"], 1e-5)
        q, k, v = (heads_of(h @ p[f"{n}_proj"].T, c) for n, c in (("q", HEADS), ("k", KV), ("v", KV)))
        x = x + both_ways(q, k, v, 500000.0) @ p["attn_out"].T
        h = rms(x, p["ff_norm"], 1e-5)
        x = x + (F.silu(h @ p["ff_proj"].T) * (h @ p["up_proj"].T)) @ p["ff_out"].T
    return rms(x, w["transformer.ln_f.weight"], 1e-5) @ w["transformer.ff_out.weight"].T


def dream_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        start = f"model.layers.{i}."
        p = {k.removeprefix(start): t for k, t in w.items() if k.startswith(start)}
        h = rms(x, p["input_layernorm.weight"], 1e-6)
        q, k, v = (
            heads_of(h @ p[f"self_attn.{n}_proj.weight"].T + p[f"self_attn.{n}_proj.bias"], c)
            for n, c in (("q", HEADS), ("k", KV), ("v", KV))
        )
        x = x + both_ways(q, k, v, 1000000.0) @ p["self_attn.o_proj.weight"].T
        h = rms(x, p["post_attention_layernorm.weight"], 1e-6)
        gated = F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)
        x = x + gated @ p["mlp.down_proj.weight"].T
    z = rms(x, w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T
    return torch.cat([z[:, :1], z[:, :-1]], 1)


def mdlm_logits(w: dict[str, Tensor], ids: Tensor, sigma: float = 0.0) -> Tensor:
    rates = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    features = torch.cat([torch.cos(sigma * rates), torch.sin(sigma * rates)])
    hidden = F.silu(w["sigma_map.mlp.0.weight"] @ features + w["sigma_map.mlp.0.bias"])
    c = F.silu(w["sigma_map.mlp.2.weight"] @ hidden + w["sigma_map.mlp.2.bias"])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    x = w["vocab_embed.embedding"][ids]
    for i in range(LAYERS):
        start = f"blocks.{i}."
        p = {k.removeprefix(start): t for k, t in w.items() if k.startswith(start)}
        parts = (p["adaLN_modulation.weight"] @ c + p["adaLN_modulation.bias"]).chunk(6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = (norm(x, p["norm1.weight"]) * (1 + scale1) + shift1) @ p["attn_qkv.weight"].T
        q, k, v = (heads_of(t, HEADS) for t in h.chunk(3, -1))
        x = x + gate1 * (both_ways(q, k, v, 10000.0) @ p["attn_out.weight"].T)
        h = norm(x, p["norm2.weight"]) * (1 + scale2) + shift2
        h = F.gelu(h @ p["mlp.0.weight"].T + p["mlp.0.bias"], approximate="tanh")
        x = x + gate2 * (h @ p["mlp.2.weight"].T + p["mlp.2.bias"])
    shift, scale = (w["output_layer.adaLN_modulation.weight"] @ c + w["output_layer.adaLN_modulation.bias"]).chunk(2)
    h = norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return h @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


Oracle = Callable[[dict[str, Tensor], Tensor], Tensor]
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, tuple[int, ...]]], Oracle, str]] = {
    "llada": (LLADA, llada_shapes, llada_logits, "model."),
    "dream": (DREAM, dream_shapes, dream_logits, ""),
    "mdlm": (MDLM, mdlm_shapes, mdlm_logits, "backbone."),
}
IDS = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_official_checkpoint_has_the_official_numbers(name: str, prefixed: bool, shards: int, tmp_path: Path) -> None:
    config, shapes, oracle, prefix = MODELS[name]
    weights = random_weights(shapes())
    model, tokenizer = sw.load(str(write(tmp_path / "m", config, weights, prefix if prefixed else "", shards)))
    assert tokenizer is None
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, oracle(weights, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_rows_equal_single_runs(name: str, tmp_path: Path) -> None:
    config, shapes, _, _ = MODELS[name]
    model, _ = sw.load(str(write(tmp_path / "m", config, random_weights(shapes()))))
    padded = torch.cat([torch.full((2, 4), 2), IDS], 1)
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    with torch.no_grad():
        together, alone = model(padded, attention_mask=mask).logits[:, 4:], model(IDS).logits
    start = 1 if name == "dream" else 0  # the shift hands Dream's first position the state of the padding before it
    torch.testing.assert_close(together[:, start:], alone[:, start:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(sorted(w)[0]), "the checkpoint lacks"),
        (lambda w: w.update({"blocks.99.surplus.weight": torch.ones(2)}), "has the unknown blocks.99.surplus.weight"),
        (lambda w: w.update({k: t[:-1].clone() for k, t in w.items() if "0" in k}), "has the wrong shape for"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: Any, message: str, tmp_path: Path) -> None:
    config, shapes, _, _ = MODELS[name]
    weights = random_weights(shapes())
    change(weights)
    with pytest.raises(sw.UserError, match=message) as caught:
        sw.load(str(write(tmp_path / "m", config, weights)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (LLADA, "alibi", True),
        (LLADA, "block_group_size", 4),
        (LLADA, "block_type", "sequential"),
        (LLADA, "include_qkv_bias", True),
        (LLADA, "scale_logits", True),
        (DREAM, "use_sliding_window", True),
        (DREAM, "hidden_act", "gelu"),
    ],
)
def test_unsupported_settings_are_refused_by_name(config: Any, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{key}={value!r}; skipwise implements only"):
        sw.load(str(write(tmp_path / "m", config | {key: value}, {"x": torch.ones(1)})))


def test_tied_llada_has_no_head_of_its_own(tmp_path: Path) -> None:
    weights = random_weights(llada_shapes())
    del weights["transformer.ff_out.weight"]
    model, _ = sw.load(str(write(tmp_path / "m", LLADA | {"weight_tying": True}, weights)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        expected = llada_logits(weights | {"transformer.ff_out.weight": weights["transformer.wte.weight"]}, IDS)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_llada_official_layout_round_trip(tmp_path: Path) -> None:
    from skipwise.models.llada import LLaDAConfig, official_state_dict

    weights = random_weights(llada_shapes())
    model, _ = sw.load(str(write(tmp_path / "m", LLADA, weights)))
    written = official_state_dict(model)
    assert written.keys() == {f"model.{key}" for key in weights}
    assert all(torch.equal(written[f"model.{key}"], tensor) for key, tensor in weights.items())
    again, config = LLaDAConfig.from_official(model.config.to_official()).to_dict(), model.config.to_dict()
    assert {k: v for k, v in config.items() if again[k] != v}.keys() <= {"_name_or_path", "dtype"}


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 8])])
def test_dream_shifts_what_is_kept(keep: Any, tmp_path: Path) -> None:
    model, _ = sw.load(str(write(tmp_path / "m", DREAM, random_weights(dream_shapes()))))
    with torch.no_grad():
        whole, kept = model(IDS).logits, model(IDS, logits_to_keep=keep).logits
    expected = whole[:, keep] if isinstance(keep, Tensor) else whole[:, -keep:]
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


def test_mdlm_is_told_the_noise_level_only_when_it_asks(tmp_path: Path) -> None:
    weights = random_weights(mdlm_shapes())
    plain, _ = sw.load(str(write(tmp_path / "a", MDLM, weights)))
    timed, _ = sw.load(str(write(tmp_path / "b", MDLM | {"time_conditioning": True}, weights)))
    sigma = torch.full((2,), 0.7)
    with torch.no_grad():
        assert torch.equal(plain(IDS, sigma=sigma).logits, plain(IDS).logits)
        torch.testing.assert_close(timed(IDS, sigma=sigma).logits, mdlm_logits(weights, IDS, 0.7), rtol=1e-4, atol=1e-4)


def test_presets_are_the_published_sizes() -> None:
    billions = {"llada-8b": 8.016, "dream-7b": 7.616, "qwen2.5-7b": 7.616, "flux.1-dev": 11.901, "sana-1.6b": 1.604}
    for name, expected in billions.items():
        assert sum(p.numel() for p in sw.load_skeleton(name).parameters()) / 1e9 == pytest.approx(expected, abs=1e-3)
