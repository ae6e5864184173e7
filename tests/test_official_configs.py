"""Published config.json files: every key is used, known to mean nothing, or refused by name, by one rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import skipwise as sw
from skipwise.models import dream, llada, mdlm
from skipwise.models.official import BOOKKEEPING, STORAGE, Layout
from tests.test_native_models import DREAM, HEADS, IDS, LLADA, MDLM, MODELS, D, random_weights, write

# As published: LLaDA-8B-Base, -Instruct and 1.5; Dream-7B, Dream-Coder-7B and DiffuCoder-7B; MDLM on OpenWebText.
PUBLISHED_LLADA = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
PUBLISHED_DREAM = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
PUBLISHED_MDLM = {
    "_name_or_path": "mdlm", "architectures": ["MDLM"], "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "cond_dim": 128, "dropout": 0.1, "hidden_dim": 768, "model_length": 1024, "model_type": "mdlm", "n_blocks": 12,
    "n_heads": 12, "return_dict": False, "time_conditioning": False, "torch_dtype": "float32",
    "transformers_version": "4.38.2", "vocab_size": 50258,
}  # fmt: skip
PUBLISHED = [
    (llada.LLaDAConfig, PUBLISHED_LLADA, llada.LAYOUT),
    (dream.DreamConfig, PUBLISHED_DREAM, dream.LAYOUT),
    (mdlm.MDLMConfig, PUBLISHED_MDLM, mdlm.LAYOUT),
]


def fails(message: str, config_class: Any, official: dict[str, Any]) -> None:
    with pytest.raises(sw.UserError, match=message) as caught:
        config_class.from_official(official)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config_class", "official", "layout"), PUBLISHED)
def test_published_configs_are_read_whole(config_class: Any, official: dict[str, Any], layout: Layout) -> None:
    """What is translated comes back; a key without a known meaning is refused, unless it is empty."""
    config = config_class.from_official(official)
    again = config.to_official()
    used = {*layout.needed, *layout.used} & official.keys() - {"mlp_ratio"}
    assert {key: again[key] for key in used} == {key: official[key] for key in used}
    assert config_class.from_official(again).to_dict() == config.to_dict() | {"dtype": None}
    known = {*layout.needed, *layout.used, *layout.only, *layout.idle, *STORAGE, *BOOKKEEPING}
    assert official.keys() <= known
    fails("has novel_gate='on', a key that skipwise does not know", config_class, official | {"novel_gate": "on"})
    config_class.from_official(official | {"novel_gate": None})
    for key in layout.needed:
        fails(f"config lacks {key}", config_class, {k: v for k, v in official.items() if k != key})
    for key, value in layout.only.items():
        fails(f"{key}='other'; skipwise implements only {key}={value!r}", config_class, official | {key: "other"})


@pytest.mark.parametrize(("config_class", "official", "layout"), PUBLISHED)
def test_how_weights_are_stored_is_kept(config_class: Any, official: dict[str, Any], layout: Layout) -> None:
    assert config_class.from_official(official | {"torch_dtype": "bfloat16"}).dtype == torch.bfloat16
    stored = {"quant_method": "torchao"}
    assert config_class.from_official(official | {"quantization_config": stored}).quantization_config == stored


@pytest.mark.parametrize(("config_class", "official", "layout"), PUBLISHED)
def test_another_architecture_of_the_same_model_type(config_class: Any, official: dict[str, Any], layout: Any) -> None:
    other = {"architectures": ["NovelMoE"], "num_experts": 64}
    fails("NovelMoE, a mixture of 64 experts; skipwise implements", config_class, official | other)


def test_the_official_defaults_stand_in_for_what_is_left_out() -> None:
    """Where they are not those of the transformers class that the native one is made of."""
    small = {"model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_ratio": 3, "vocab_size": 64}
    config = llada.LLaDAConfig.from_official(small)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert (config.intermediate_size, config.num_key_value_heads) == (96, 4)
    assert config.eos_token_id is None
    assert config.bos_token_id is None
    left_out = {key: value for key, value in PUBLISHED_DREAM.items() if key != "rope_theta"}
    assert dream.DreamConfig.from_official(left_out).rope_parameters["rope_theta"] == 10000.0


def test_ends_of_turn_of_the_published_vocabularies() -> None:
    assert llada.LLaDAConfig.from_official(PUBLISHED_LLADA).eot_token_id == 126348
    assert dream.DreamConfig.from_official(PUBLISHED_DREAM).eot_token_id == 151645
    assert dream.DreamConfig.from_official(PUBLISHED_DREAM | {"vocab_size": 99}).eot_token_id is None


@pytest.mark.parametrize("value", [{"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}])
def test_lladas_code_reads_no_rope_scaling(value: dict[str, Any]) -> None:
    fails("rope_scaling=.*LLaDA's own code does not read", llada.LLaDAConfig, PUBLISHED_LLADA | {"rope_scaling": value})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, YARN, LLAMA3, {"rope_type": "default"}])
def test_dreams_rope_scaling_is_qwen2s(scaling: dict[str, Any], tmp_path: Path) -> None:
    """The logits, decoded with the lean decoder and by transformers' own, follow the scaled rotation."""
    weights = random_weights(MODELS["dream"][1]())
    folder = write(tmp_path / "m", DREAM | {"rope_scaling": scaling}, weights)
    model, _ = sw.load(str(folder))
    rope = {key: value for key, value in scaling.items() if key != "type"}
    rope |= {"rope_theta": DREAM["rope_theta"], "rope_type": scaling.get("type") or scaling["rope_type"]}
    width = {"hidden_size": D, "num_attention_heads": HEADS, "max_position_embeddings": 64, "vocab_size": 40}
    qwen = transformers.Qwen2Config(rope_parameters=rope, **width)
    theirs = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(qwen)
    ours = model.model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    plain, _ = sw.load(str(write(tmp_path / "plain", DREAM, weights)))
    long = IDS.repeat(1, 3)
    with torch.no_grad():
        scaled: Tensor = model(long).logits
        torch.testing.assert_close(model.lm_head(model.states(long)), scaled, rtol=1e-4, atol=1e-4)
        assert torch.equal(scaled, plain(long).logits) == (rope["rope_type"] == "default")
    assert dream.DreamConfig.from_official(model.config.to_official()).rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "of the type 'dynamic'; skipwise implements default, linear"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "of the type 'longrope'"),
        ({"type": "linear"}, "has factor=None; give a number"),
        ({"type": "linear", "factor": "2"}, "has factor='2'; give a number"),
        ({"type": "linear", "factor": 0.5}, "has factor=0.5"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "has beta_fast=3; of the type 'linear' are factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "has low_freq_factor=None"),
    ],
)
def test_rope_scalings_that_are_refused(scaling: dict[str, Any], message: str) -> None:
    fails(message, dream.DreamConfig, PUBLISHED_DREAM | {"rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["llada2_moe", "sdar", "sdar_moe", "a2d-qwen3", "Fast_dLLM_Qwen"])
def test_relatives_without_a_native_module_are_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(sw.UserError, match=f"model_type '{kind}'.*it takes LLaDA .*, Dream .* and MDLM"):
        sw.load_skeleton(str(tmp_path))


@pytest.mark.parametrize(("official", "key"), [(LLADA, "d_model"), (DREAM, "hidden_size"), (MDLM, "hidden_dim")])
@pytest.mark.parametrize("value", ["wide", [1], -3])
def test_values_of_the_wrong_kind_are_one_line(
    skipwise: Any, official: Any, key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(official | {key: value}))
    code, _, err = skipwise("inspect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)


FILES = {
    "no weights": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "a shard is gone": lambda folder: next(iter(sorted(folder.glob("model-*")))).unlink(),
    "the index names another": lambda folder: next(iter(sorted(folder.glob("model-*")))).rename(
        folder / "other.safetensors"
    ),
    "weights of another name": lambda folder: [
        path.rename(folder / path.name.replace("model", "weights")) for path in folder.glob("model*")
    ],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config of another name": lambda folder: (folder / "config.json").rename(folder / "configuration.json"),
}


@pytest.mark.parametrize("name", MODELS)
def test_commands_on_official_layouts(skipwise: Any, name: str, tmp_path: Path) -> None:
    """`inspect`, `generate` and `analyze`, with the tokenizer of another folder."""
    from tests.test_tokenizers import write as write_tokenizer

    config, shapes, _, prefix = MODELS[name]
    words = write_tokenizer(tmp_path / "words")
    n = max(
        token["content"] and int(i)
        for i, token in json.loads((words / "tokenizer_config.json").read_text())["added_tokens_decoder"].items()
    )
    rows = {"embedding_size": n + 1, "vocab_size": n + 1} if name == "llada" else {"vocab_size": n + 1}
    tokens = {} if name == "mdlm" else {"mask_token_id": n, "pad_token_id": n - 4}
    wide = {key: (n + 1, *shape[1:]) if shape[0] == 40 else shape for key, shape in shapes().items()}
    folder = write(tmp_path / "m", config | rows | tokens, random_weights(wide), prefix, shards=2)
    assert skipwise("inspect", folder)[0] == 0
    given = ("--tokenizer", words)
    code, out, err = skipwise("generate", folder, "hello", "--gen-length", 4, *given)
    assert code == 0, err
    assert "hello" in out
    texts = tmp_path / "texts.txt"
    texts.write_text("hello world\ndef f(x)\n")
    code, _, err = skipwise("analyze", folder, "--texts", texts, "-o", tmp_path / "analysis", *given)
    assert code == 0, err


@pytest.mark.parametrize("what", FILES)
def test_missing_and_misnamed_files_are_one_line(skipwise: Any, what: str, tmp_path: Path) -> None:
    config, shapes, _, prefix = MODELS["llada"]
    folder = write(tmp_path / "m", config, random_weights(shapes()), prefix, shards=3)
    FILES[what](folder)
    code, _, err = skipwise("generate", folder, "hello", "--tokenizer", "tiny-dllm")
    assert (code, err.count("\n")) == (2, 1), err
    assert str(folder) in err
    assert what not in ("no weights", "weights of another name") or "neither model.safetensors nor" in err


def test_a_shard_without_index_is_refused(tmp_path: Path) -> None:
    """A file that is not the whole model says what it lacks."""
    config, shapes, _, _ = MODELS["llada"]
    weights = random_weights(shapes())
    folder = write(tmp_path / "m", config, weights)
    half = dict(list(weights.items())[::2])
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(sw.UserError, match="the checkpoint lacks"):
        sw.load(str(folder))
