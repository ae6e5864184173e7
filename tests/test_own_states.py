"""What a model remembers between calls, under a plan: its cache, or a state that it keeps itself."""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers

import skipwise as sw
from skipwise.errors import UserError
from tests.survey.shrinking import shake
from tests.tiny_models import LANGUAGE

IDS = torch.arange(3, 9)[None]


def rwkv() -> Any:
    """Its state has a place for each layer, and comes back from every block."""
    config = transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, rescale_every=0)
    return shake(transformers.RwkvForCausalLM(config))


def xlstm() -> Any:
    """Its cache has a state for each layer."""
    config = transformers.xLSTMConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_heads=4, qk_dim_factor=1.0, chunk_size=8
    )  # fmt: skip
    return shake(transformers.xLSTMForCausalLM(config))


def greedy(model: Any, new: int = 4) -> torch.Tensor:
    """Without a cache."""
    keywords: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": new, "min_new_tokens": new}
    with torch.no_grad():
        return model.generate(IDS, use_cache=False, do_sample=False, pad_token_id=0, **keywords)


def test_a_model_whose_state_no_plan_cuts_decodes_without_it() -> None:
    model = rwkv()
    short = copy.deepcopy(model)
    del short.rwkv.blocks[1]
    plan = sw.Plan.of(sw.find_contract(model).shape, [1])
    whole = sw.generate(model, IDS, gen_length=4, stop_at_eos=False)
    with pytest.warns(UserWarning, match="decodes without a cache"):
        under = sw.generate(model, IDS, plan=plan, gen_length=4, stop_at_eos=False)
    assert torch.equal(under.sequences, greedy(short))
    assert under.stats.block_flops > whole.stats.block_flops  # every token anew, in two blocks of three
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is known now
        again = sw.generate(model, IDS, plan=plan, gen_length=4, stop_at_eos=False)
        sw.generate(model, IDS, gen_length=4, stop_at_eos=False)
    assert torch.equal(again.sequences, under.sequences)


def test_the_second_try_draws_what_the_first_one_would() -> None:
    model = rwkv()
    plan = sw.Plan.of(sw.find_contract(model).shape, [1])
    with pytest.warns(UserWarning, match="without a cache"):
        first = sw.generate(model, IDS, plan=plan, gen_length=6, temperature=1.0, seed=3)
    second = sw.generate(model, IDS, plan=plan, gen_length=6, temperature=1.0, seed=3)
    assert torch.equal(first.sequences, second.sequences)


def test_an_error_that_is_not_the_states_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LANGUAGE["llama"]()
    plan = sw.Plan.of(sw.find_contract(model).shape, [1])

    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("another one")

    monkeypatch.setattr(model.model.embed_tokens, "forward", broken)
    with pytest.raises(IndexError, match="another one"):
        sw.generate(model, IDS, plan=plan, gen_length=2)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_cache_that_another_plan_filled_is_refused(name: str) -> None:
    model = LANGUAGE[name]()
    with torch.no_grad():
        with sw.skip(model, [1]):
            ours = model(IDS, use_cache=True).past_key_values
            given = transformers.DynamicCache()
            model(IDS, past_key_values=given, use_cache=True)
        with sw.skip(model, [2]):
            for cache in (ours, given, copy.deepcopy(given)):
                with pytest.raises(UserError, match="holds 3 layers that were filled without this plan"):
                    model(IDS[:, :1], past_key_values=cache)
        with sw.skip(model, [1]):
            model(IDS[:, :1], past_key_values=copy.deepcopy(ours))
            model(IDS[:, :1], past_key_values=ours, return_dict=False)


def test_a_cache_beside_an_encoder_is_known_too() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad(), sw.skip(model, {"model.decoder.layers": [1]}):
        cache = model(IDS, decoder_input_ids=IDS, use_cache=True).past_key_values
        model(IDS, decoder_input_ids=IDS[:, :1], past_key_values=cache)
    with (
        torch.no_grad(),
        sw.skip(model, {"model.decoder.layers": [0]}),
        pytest.raises(UserError, match="filled without"),
    ):
        model(IDS, decoder_input_ids=IDS[:, :1], past_key_values=cache)


def xlnet() -> Any:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=3, n_head=4, d_inner=48, mem_len=16)
    return shake(transformers.XLNetLMHeadModel(config))


def test_memories_that_a_forward_returns_are_of_the_blocks_that_ran() -> None:
    model = xlnet()
    short = copy.deepcopy(model)
    del short.transformer.layer[0]
    plan = sw.Plan.of(sw.find_contract(model).shape, [0])
    under = sw.generate(model, IDS, plan=plan, gen_length=4, stop_at_eos=False)
    assert torch.equal(under.sequences, greedy(short))  # which hands on its memories whatever it is told
    with torch.no_grad(), sw.skip(model, plan):
        mems = model(IDS).mems
        model(IDS, use_mems=False)
        model(IDS, mems=mems)
        model(IDS, mems=model(IDS, return_dict=False)[1])


def test_a_cache_of_states_is_of_the_blocks_that_ran() -> None:
    model = xlstm()
    short = copy.deepcopy(model)
    del short.backbone.blocks[1]
    plan = sw.Plan.of(sw.find_contract(model).shape, [1])
    under = sw.generate(model, IDS, plan=plan, gen_length=4, stop_at_eos=False)
    assert torch.equal(under.sequences, greedy(short))
    with torch.no_grad(), sw.skip(model, plan):
        cache = model(IDS, use_cache=True).cache_params
        model(IDS[:, :1], cache_params=cache, use_cache=True)
    with torch.no_grad(), sw.skip(model, [0]), pytest.raises(UserError, match="cache_params was not made"):
        model(IDS[:, :1], cache_params=cache, use_cache=True)


def test_memories_that_others_filled_are_refused() -> None:
    model = xlnet()
    with torch.no_grad():
        whole = model(IDS).mems
        with sw.skip(model, [1]):
            other = model(IDS).mems
        for mems in (whole, other):
            with sw.skip(model, [0]), pytest.raises(UserError, match="mems was not made by a call"):
                model(IDS, mems=mems)
