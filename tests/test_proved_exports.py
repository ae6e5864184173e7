"""Exports that are proved by running them: of blocks that depend on their number, or on how many there are.

Where they depend on their number the first blocks keep theirs, so that the last may be left out.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.big_bird import modeling_big_bird

import skipwise as sw
from skipwise.errors import UserError
from skipwise.examples import Size, example_inputs
from tests.survey.shrinking import shake
from tests.tiny_models import ROWS, output

SETTINGS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}


def big_bird() -> nn.Module:
    """Draws the blocks that its attention looks at from each layer's number."""
    config = transformers.BigBirdConfig(**SETTINGS, block_size=2, num_random_blocks=1)
    return shake(transformers.BigBirdForMaskedLM(config))


def zamba2() -> nn.Module:
    """Two layers share a transformer, and each is told its number."""
    config = transformers.Zamba2Config(
        **SETTINGS | {"num_hidden_layers": 5}, layers_block_type=["mamba", "hybrid"] * 2 + ["mamba"],
        attention_hidden_size=64, num_key_value_heads=4, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4,
        mamba_ngroups=1, chunk_size=4, use_long_context=False, adapter_rank=4, num_mem_blocks=1,
    )  # fmt: skip
    return shake(transformers.Zamba2ForCausalLM(config))


def openai_gpt() -> nn.Module:
    """All blocks share one module, the activation, which is no part of any one."""
    config = transformers.OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    return shake(transformers.OpenAIGPTLMHeadModel(config))


def minicpm3() -> nn.Module:
    """Divides what blocks add by the root of their number."""
    config = transformers.MiniCPM3Config(
        **SETTINGS, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, scale_depth=1.4,
    )  # fmt: skip
    return shake(transformers.MiniCPM3ForCausalLM(config))


def minimax() -> nn.Module:
    """Computes decays from each block's number and that of all, and stores them with the weights."""
    config = transformers.MiniMaxConfig(
        **SETTINGS, num_key_value_heads=2, head_dim=8, num_local_experts=2, block_size=4,
        layer_types=["linear_attention", "full_attention"] * 2,
    )  # fmt: skip
    return shake(transformers.MiniMaxForCausalLM(config))


def longformer() -> nn.Module:
    """Has a window for each layer."""
    config = transformers.LongformerConfig(**SETTINGS, attention_window=[8, 4, 4, 8], pad_token_id=1)
    return shake(transformers.LongformerForMaskedLM(config))


SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1,
}  # fmt: skip


def led() -> nn.Module:
    """Windows of its encoder, whose decoder is as long."""
    return shake(
        transformers.LEDForConditionalGeneration(transformers.LEDConfig(**SEQ2SEQ, attention_window=[4, 8, 8]))
    )


def exported(model: nn.Module, stack: str, numbers: list[int], folder: Path) -> Any:
    model.save_pretrained(folder / "source")
    plan = sw.Plan.static(sw.find_contract(model).shape, {stack: numbers})
    return type(model).from_pretrained(sw.export(plan, folder / "source", folder / "smaller")).eval()


def check(model: nn.Module, stack: str, numbers: list[int], folder: Path) -> None:
    smaller = exported(model, stack, numbers, folder)
    inputs = example_inputs(model, Size(batch=2, tokens=24))
    with torch.no_grad(), sw.skip(model, {stack: numbers}):
        expected = output(model, inputs)
    with torch.no_grad():
        assert torch.equal(output(smaller, inputs), expected)


def test_last_blocks_whose_attention_is_drawn_by_number(tmp_path: Path) -> None:
    check(big_bird(), "bert.encoder.layer", [2, 3], tmp_path)


def test_a_last_block_of_a_diffusion_transformer(tmp_path: Path) -> None:
    check(ROWS["dit"](), "transformer_blocks", [3], tmp_path)


def test_a_last_block_beside_blocks_that_share_weights(tmp_path: Path) -> None:
    check(zamba2(), "model.layers", [4], tmp_path)


def test_an_activation_that_all_blocks_share_is_no_part_of_one(tmp_path: Path) -> None:
    model = openai_gpt()
    assert not sw.find_contract(model).stacks["transformer.h"].in_place
    check(model, "transformer.h", [0], tmp_path)


@pytest.mark.parametrize(
    ("make", "stack", "numbers"),
    [
        (minicpm3, "model.layers", [1]),
        (minicpm3, "model.layers", [0, 2, 3]),
        (minimax, "model.layers", [2]),
        (longformer, "longformer.encoder.layer", [1, 2]),
        (led, "led.encoder.layers", [0]),
        (led, "led.decoder.layers", [1]),
    ],
)
def test_what_is_made_from_how_many_blocks_there_are(
    make: Callable[[], nn.Module], stack: str, numbers: list[int], tmp_path: Path
) -> None:
    check(make(), stack, numbers, tmp_path)


def test_the_widest_window_stays(tmp_path: Path) -> None:
    """The forward pads its input to it."""
    config = transformers.LongformerConfig(**SETTINGS, attention_window=[4, 8, 4, 4], pad_token_id=1)
    with pytest.raises(UserError, match="cannot be exported"):
        exported(transformers.LongformerForMaskedLM(config), "longformer.encoder.layer", [1], tmp_path)


def test_tables_that_no_checkpoint_holds(tmp_path: Path) -> None:
    model = transformers.MarianMTModel(transformers.MarianConfig(**SEQ2SEQ, decoder_start_token_id=1)).eval()
    check(model, "model.encoder.layers", [1], tmp_path)


def test_a_head_that_reads_the_attentions_of_all_layers(tmp_path: Path) -> None:
    config = transformers.EsmConfig(**SETTINGS, pad_token_id=1, mask_token_id=5)
    model: Any = shake(transformers.EsmForMaskedLM(config))
    check(model, "esm.encoder.layer", [1], tmp_path)
    model.set_attn_implementation("eager")  # which gives attentions
    smaller: Any = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "smaller", attn_implementation="eager")
    ids = torch.arange(4, 24)[None]
    head = model.esm.contact_head
    head.regression.weight.data = head.regression.weight.data.view(4, 4)[[0, 2, 3]].view(1, 12)
    with torch.no_grad(), sw.skip(model, [1]):
        expected = model.esm.predict_contacts(ids, torch.ones_like(ids))
    with torch.no_grad():
        assert torch.equal(smaller.eval().esm.predict_contacts(ids, torch.ones_like(ids)), expected)


def test_a_vocabulary_that_shrinks_by_as_much_is_another_models(tmp_path: Path) -> None:
    """Three quarters of the rows, as of the blocks, but not for these."""
    source = tmp_path / "source"
    model = ROWS["llama"]()
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] = config["vocab_size"] * 3 // 4
    (source / "config.json").write_text(json.dumps(config))
    plan = sw.Plan.of(sw.find_contract(model).shape, [1])
    with pytest.raises(UserError, match="does not fit its config"):
        sw.export(plan, source, tmp_path / "smaller")


@pytest.mark.parametrize("numbers", [[1], [1, 3]])
def test_other_blocks_are_refused(numbers: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="depend on their number"):
        exported(big_bird(), "bert.encoder.layer", numbers, tmp_path)


def test_a_forward_that_counts_all_blocks_is_found_by_running_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = modeling_big_bird.BigBirdEncoder.forward

    @functools.wraps(forward)
    def counting(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states * len(self.layer), *args, **kwargs)

    monkeypatch.setattr(modeling_big_bird.BigBirdEncoder, "forward", counting)
    with pytest.raises(UserError, match="it counts its blocks") as error:
        exported(big_bird(), "bert.encoder.layer", [3], tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "smaller").exists()
