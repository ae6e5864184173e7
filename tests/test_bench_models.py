"""Models of any shape with random weights, and how much memory it takes to make or to load one."""

import pytest
import torch

import skipwise as sw
from skipwise.errors import UserError
from skipwise.models import LLaDA
from skipwise.models.mdlm import MDLM, MDLMConfig
from skipwise.models.random import random_model

DIMS = {"width": 32, "layers": 3, "heads": 4, "mlp": 48, "vocab": 64}


def test_from_dims_has_the_shape_and_decodes() -> None:
    model = LLaDA.from_dims(**DIMS, kv_heads=2, mask_token_id=5, max_length=128)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 64)
    assert (config.num_key_value_heads, config.intermediate_size, config.mask_token_id) == (2, 48, 5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    found = sw.generate(model, torch.arange(8, 16).view(2, 4), gen_length=6).sequences
    assert found.shape == (2, 10)
    assert not (found == 5).any()


def test_the_mask_is_the_last_token_when_left_out() -> None:
    assert LLaDA.from_dims(**DIMS).config.mask_token_id == 63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_ordinary_initialisation(dtype: torch.dtype) -> None:
    """Spread and rotary table as when the class itself is called, the same again for a seed, others for another."""
    model = LLaDA.from_dims(**DIMS | {"vocab": 4096}, dtype=dtype, seed=1)
    plain = type(model)(model.config)
    again, other = (LLaDA.from_dims(**DIMS | {"vocab": 4096}, dtype=dtype, seed=seed) for seed in (1, 2))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, again.state_dict()[name])
        assert abs(float(tensor.float().std() - plain.state_dict()[name].std())) < 0.002
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_drawing_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    LLaDA.from_dims(**DIMS)
    assert torch.equal(torch.rand(2), expected)


def test_a_head_that_begins_at_zero_is_drawn() -> None:
    model = random_model(MDLM, MDLMConfig(vocab_size=64, hidden_dim=32, cond_dim=8, n_blocks=2, n_heads=4))
    assert float(model(torch.arange(6)[None]).logits.detach().std()) > 0.01


@pytest.mark.parametrize(("changes", "named"), [({"heads": 5}, "heads=5"), ({"mask_token_id": 64}, "64")])
def test_sizes_that_do_not_go_together_are_named(changes: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LLaDA.from_dims(**DIMS | changes)
