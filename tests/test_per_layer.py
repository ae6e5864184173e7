"""What a config says of single layers is right under a plan, with a KV cache too, and in an export.

The oracle of each row is a model built from settings that are written out by hand here.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.per_layer import changed_settings, cut_setting
from tests.tiny_models import DECODER, _lm

S, F, L = "sliding_attention", "full_attention", "linear_attention"
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIX = DECODER | {"num_hidden_layers": 6}


@dataclass(frozen=True)
class Row:
    """A model of `name`, the blocks to skip, and what the settings of the model without them are.

    smaller: None where no config describes it; cached: whether it has a KV cache.
    """

    name: str
    settings: Mapping[str, Any]
    skipped: tuple[int, ...]
    smaller: Mapping[str, Any] | None = None
    cached: bool = True
    config: str = ""
    stack: str = "model.layers"

    def build(self, smaller: bool = False) -> Any:
        settings = dict(self.settings) | (dict(self.smaller or {}) if smaller else {})
        return _lm(self.config or f"{self.name}Config", f"{self.name}ForCausalLM", **settings)


JAMBA = SIX | {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
JAMBA |= {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False}
NEO = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_layers": 6, "max_position_embeddings": 64}
GEMMA4 = SIX | {"head_dim": 16, "global_head_dim": 16, "sliding_window": 4, "hidden_size_per_layer_input": 0}
NEMOTRON = {k: v for k, v in DECODER.items() if k != "num_hidden_layers"} | {"n_routed_experts": 4, "n_group": 1}
NEMOTRON |= {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
NEMOTRON |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "topk_group": 1, "chunk_size": 8}

ROWS = {
    "bamba": Row(
        "Bamba",
        SIX | MAMBA | {"attn_layer_indices": [1, 4], "mamba_chunk_size": 8},
        (0, 4),
        {"num_hidden_layers": 4, "attn_layer_indices": [0]},
    ),
    "jamba": Row("Jamba", JAMBA, (0, 3)),
    "gpt_neo": Row(
        "GPTNeo",
        NEO | {"attention_types": [[["global", "local"], 3]], "window_size": 4},
        (0, 3),
        {"num_layers": 4, "attention_types": [[["local", "global", "global", "local"], 1]]},
        stack="transformer.h",
    ),
    "granitemoehybrid": Row(
        "GraniteMoeHybrid",
        SIX
        | MAMBA
        | {"layer_types": [L, F] * 3, "mamba_chunk_size": 8, "shared_intermediate_size": 16}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
        (0, 5),
        {"num_hidden_layers": 4, "layer_types": [F, L, F, L]},
    ),
    "nemotron_h": Row(
        "NemotronH",
        NEMOTRON | {"layers_block_type": [L, "moe", F, L, "mlp", F]},
        (0, 4),
        {"layers_block_type": ["moe", F, L, F]},
    ),
    "afmoe": Row(
        "Afmoe",
        SIX | EXPERTS | {"head_dim": 8, "sliding_window": 4, "num_dense_layers": 2, "layer_types": [S, S, F] * 2},
        (1, 4),
        {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": [S, F, S, F]},
    ),
    "lfm2_moe": Row(
        "Lfm2Moe",
        SIX | EXPERTS | {"num_dense_layers": 2, "layer_types": ["conv", F] * 3},
        (0, 3),
        {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": [F, "conv", "conv", F]},
    ),
    "ernie4_5_moe": Row(
        "Ernie4_5_Moe",
        SIX
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
        | {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
        (0, 3),
        {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    ),
    "recurrent_gemma": Row(
        "RecurrentGemma",
        SIX | {"attention_window_size": 4, "lru_width": 32},
        (0, 3),
        {"num_hidden_layers": 4, "block_types": ["recurrent", "attention", "recurrent", "attention"]},
        cached=False,  # it has no cache in transformers' sense
    ),
    "gemma4": Row(
        "Gemma4",
        GEMMA4 | {"layer_types": [S, S, F] * 2, "num_kv_shared_layers": 0},
        (1, 2),
        {"num_hidden_layers": 4, "layer_types": [S, S, S, F]},
        config="Gemma4TextConfig",
    ),
    "gemma3, one kind left": Row(
        "Gemma3",
        SIX | {"head_dim": 8, "sliding_window": 4, "layer_types": [S, S, S, S, S, F]},
        (5,),
        {"num_hidden_layers": 5, "layer_types": [S] * 5},
        config="Gemma3TextConfig",
    ),
    "two layers": Row(  # [0, 1] is a flag for each, not two numbers
        "SmolLM3",
        DECODER | {"num_hidden_layers": 2, "no_rope_layers": [0, 1]},
        (0,),
        {"num_hidden_layers": 1, "no_rope_layers": [1]},
    ),
}
IDS = torch.arange(3, 15)[None]
every = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
with_a_config = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.smaller is not None]
)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def decoded(model: Any, first: int = 6) -> Tensor:
    """Logits of all positions, the later ones one by one with the cache."""
    ends = [first, *range(first + 1, IDS.shape[1] + 1)]
    parts, past = [], None
    with torch.no_grad():
        for start, end in itertools.pairwise([0, *ends]):
            positions = torch.arange(start, end)[None]  # left out, Bamba takes them as beginning at 0
            result = model(input_ids=IDS[:, start:end], position_ids=positions, past_key_values=past, use_cache=True)
            past = result.past_key_values
            parts.append(result.logits)
    return torch.cat(parts, 1)


def greedy(model: Any, use_cache: bool) -> Tensor:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(IDS[:, :6], use_cache=use_cache, **settings)


def plan_of(row: Row, model: nn.Module) -> sw.Plan:
    return sw.Plan.static(find_contract(model).shape, {row.stack: row.skipped})


def without_blocks(row: Row, model: Any) -> Any:
    """A model of the settings written out above, with the weights of the blocks that are left."""
    other = row.build(smaller=True)
    length = len(model.get_submodule(row.stack))
    new = {old: number for number, old in enumerate(i for i in range(length) if i not in row.skipped)}
    weights = {}
    for key, tensor in model.state_dict().items():
        found = re.match(rf"{re.escape(row.stack)}\.(\d+)(\..*)", key)
        if found is None:
            weights[key] = tensor
        elif int(found[1]) in new:
            weights[f"{row.stack}.{new[int(found[1])]}{found[2]}"] = tensor
    other.load_state_dict(weights)
    return other


@every
def test_decoding_with_a_cache_is_decoding_without_one(row: Row) -> None:
    model = row.build()
    if not row.cached:
        pytest.skip("this model has no KV cache")
    settings = dict(vars(model.config))
    with sw.skip(model, plan_of(row, model)):
        torch.testing.assert_close(decoded(model), logits(model), atol=1e-4, rtol=1e-4)
        assert torch.equal(greedy(model, True), greedy(model, False))
    assert dict(vars(model.config)) == settings
    assert type(model.config) is type(row.build().config)


@with_a_config
def test_skipping_is_the_model_without_the_blocks(row: Row) -> None:
    model = row.build()
    smaller, whole = without_blocks(row, model), logits(model)
    with sw.skip(model, plan_of(row, model)):
        assert torch.equal(logits(model), logits(smaller))
        assert not torch.equal(logits(model), whole)
        if row.cached:
            assert torch.equal(decoded(model), decoded(smaller))
        assert torch.equal(greedy(model, True), greedy(smaller, True))


@with_a_config
def test_an_export_is_the_source_under_its_plan(row: Row, tmp_path: Path) -> None:
    model = row.build()
    model.save_pretrained(tmp_path / "source")
    plan = plan_of(row, model)
    target = sw.export(plan, tmp_path / "source", tmp_path / "target")
    exported, report = getattr(transformers, f"{row.name}ForCausalLM").from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    with sw.skip(model, plan):
        assert torch.equal(logits(exported.eval()), logits(model))


def test_a_place_that_is_kept_counts_positions() -> None:
    """Where numbers stay, the first layer's cache is asked how long the text is, also when that layer is skipped."""
    settings = SIX | {"head_dim": 8, "sliding_window": 4, "num_kv_shared_layers": 2, "layer_types": [S, F] * 3}
    settings |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64, "laurel_rank": 4}
    model: Any = _lm("Gemma3nTextConfig", "Gemma3nForCausalLM", **settings)
    shape = find_contract(model).shape
    with sw.skip(model, sw.Plan.static(shape, {"model.layers": (0, 4)})):
        torch.testing.assert_close(decoded(model), logits(model), atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(sw.UserError, match=r"Later blocks .5. use the keys and values of block 3 of model.layers"),
        sw.skip(model, sw.Plan.static(shape, {"model.layers": (3,)})),
    ):
        pass
    with sw.skip(model, sw.Plan.static(shape, {"model.layers": (3, 5)})):
        torch.testing.assert_close(decoded(model), logits(model), atol=1e-4, rtol=1e-4)


def test_the_last_block_of_gemma4(tmp_path: Path) -> None:
    """Its config makes the last layer full attention, whatever its list says: a plan that leaves another is refused."""
    row = ROWS["gemma4"]
    row.build().save_pretrained(tmp_path / "source")
    plan = sw.Plan.static(find_contract(row.build()).shape, {"model.layers": (5,)})
    with pytest.raises(sw.UserError, match=r"its last block, model\.layers\.4\.self_attn would have layer_type"):
        sw.export(plan, tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_models_that_scale_blocks_by_number() -> None:
    """RWKV counts its blocks to halve the stream behind every so many: a skipped one keeps its place."""
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32}
    model: Any = _lm("RwkvConfig", "RwkvForCausalLM", **settings)
    plan = sw.Plan.static(find_contract(model).shape, {"rwkv.blocks": (1,)})
    with sw.skip(model, plan):
        found = logits(model)
    block = model.rwkv.blocks[1]
    for part in (block.attention.output, block.feed_forward.value):
        torch.nn.init.zeros_(part.weight)
    assert torch.equal(found, logits(model))


@pytest.mark.parametrize(
    ("key", "value", "kept", "left"),
    [
        ("layer_types", [S, F, S, F], (0, 3), [S, F]),
        ("no_rope_layers", (1, 0, 1, 1), (0, 3), (1, 1)),
        ("dual_attention_layers", [0, 1, 3], (0, 3), [0, 1]),
        ("moe_layers", [0, 1, 2, 3], (0, 3), [0, 1]),
        ("per_layer_config", {"1": {"a": 1}, "3": {"b": 2}}, (0, 3), {"1": {"b": 2}}),
        ("first_k_dense_replace", 3, (0, 2, 3), 2),
        ("moe_layer_end_index", 2, (0, 2, 3), 1),
        ("moe_layer_end_index", -1, (0, 3), -1),
        ("attention_types", [[["global", "local"], 2]], (0, 3), [[["global", "local"], 1]]),
        ("block_types", ["a", "b", "c"], (0, 3), ["a", "a"]),
        ("hybrid_override_pattern", "M-*M", (0, 3), "MM"),
        ("num_hidden_layers", 4, (0, 3), 4),
        ("layer_norm_eps", 1e-5, (0, 3), 1e-5),
        ("sections", [1, 2, 3, 4], (0, 3), [1, 2, 3, 4]),
    ],
)
def test_settings(key: str, value: Any, kept: tuple[int, ...], left: Any) -> None:
    assert cut_setting(key, value, 4, kept) == left


def test_a_config_whose_number_of_layers_is_read_from_another_setting() -> None:
    """ProphetNet's `num_hidden_layers` refuses to be set; Funnel's comes of a list of sizes, which is no number."""
    config = transformers.ProphetNetConfig(num_encoder_layers=3, num_decoder_layers=5)
    assert changed_settings(config, 3, (0, 2)) == {"num_encoder_layers": 2}
    with pytest.raises(sw.UserError, match="FunnelConfig takes no other number of layers"):
        changed_settings(transformers.FunnelConfig(), 12, (0, 1))
