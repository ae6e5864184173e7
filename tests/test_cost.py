"""Prices by formula against torch's own counter, against the papers' figures, and against what is deleted."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.cost import cost_of, estimate, price_blocks
from skipwise.examples import Size, example_inputs, shapes_only
from skipwise.plan import Phase, Plan
from skipwise.skipping import skip
from tests.deleted import deleted
from tests.survey.classes import build
from tests.tiny_models import ROWS, example, output


def counted(model: nn.Module, inputs: dict) -> int:
    """FLOPs by torch's counter, which sees attention and mixtures of experts only as plain products."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output(model, inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ROWS)
def test_formula_equals_torchs_counter(name: str) -> None:
    model = ROWS[name]()
    inputs = example(model, batch=2)
    prices = price_blocks(model, example=inputs)
    assert prices.forward().flops == counted(model, inputs)


@pytest.mark.parametrize("name", ["JetMoeForCausalLM", "SwitchTransformersForConditionalGeneration"])
def test_experts_that_are_looped_over_are_priced_as_they_are_met(name: str) -> None:
    """Such loops read which experts were chosen, and how often, which shapes alone do not say."""
    model = build(name)
    inputs = example_inputs(model, Size(batch=2))
    assert price_blocks(model, Size(batch=2)).forward().flops == counted(model, inputs)


def test_what_is_chosen_on_shapes_alone_is_chosen_in_turn() -> None:
    scores = torch.empty(3, 4, device="meta")
    with shapes_only():
        values, indices = scores.topk(2, dim=-1)
        kept = scores[scores > 0]
        assert (values.device.type, indices.tolist()) == ("meta", [[0, 1], [2, 3], [0, 1]])
        assert scores.topk(2, dim=0).indices.T.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
        assert (scores.argmax(dim=-1).tolist(), scores.argmax().tolist()) == ([0, 1, 2], 0)
        assert kept.shape == (12,)


@pytest.mark.parametrize("name", ROWS)
def test_price_under_a_plan_is_the_price_of_the_deleted_model(name: str) -> None:
    model = ROWS[name]()
    inputs = example(model, batch=1)
    stack = find_contract(model).main_stack
    plan = Plan.static(find_contract(model).shape, {stack: [1]})
    with skip(model, plan):
        left = counted(model, inputs)
    cost = estimate(model, plan, example=inputs)
    assert cost.all_in_flops == left
    assert 0 < cost.saved_all_in_flops < cost.saved_block_flops < 1


@pytest.mark.parametrize("name", ROWS)
def test_price_does_not_touch_the_model(name: str) -> None:
    model = ROWS[name]()
    inputs = example(model)
    expected, parameters = output(model, inputs), {n: id(p) for n, p in model.named_parameters()}
    price_blocks(model, Size(tokens=16))
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "flux", "diffusion_gemma"])
def test_weight_bytes_are_those_of_the_parameters(name: str) -> None:
    model = ROWS[name]()
    cost = estimate(model, example=example(model))
    assert cost.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    stack = find_contract(model).main_stack
    plan = Plan.static(find_contract(model).shape, {stack: [1]})
    short = deleted(model, stack, {1})
    expected = sum(p.numel() * p.element_size() for p in short.parameters())
    assert estimate(model, plan, example=example(model)).weight_bytes == expected


def test_the_paper_s_figures_for_llada_8b() -> None:
    """6 of 32 layers: 18.75% of layer FLOPs, 17.45% with the language-model head (paper 1)."""
    model = sw.load_skeleton("llada-8b")
    assert all(p.is_meta for p in model.parameters())
    plan = Plan.static(find_contract(model).shape, {"model.layers": [3, 4, 5, 6, 7, 8]})
    cost = estimate(model, plan, Size(tokens=1024))
    assert round(100 * cost.saved_block_flops, 2) == 18.75
    assert round(100 * cost.saved_head_flops, 2) == 17.45
    assert 17.45 < 100 * cost.saved_all_in_flops < 17.6
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    attention = 32 * 2 * 1024 * 4096
    assert cost_of(price_blocks(model, Size(tokens=1024)), None).block_flops == 2 * 1024 * (linear + attention)


def test_the_paper_s_figures_for_scheduling() -> None:
    """A quarter of the steps by a 4-block model instead of 12: 16.67% of block FLOPs, about 12.2% all-in (paper 2)."""
    heavy, light = sw.load_skeleton("mdlm-owt"), sw.load_skeleton("mdlm-owt")
    light.blocks = light.blocks[:4]
    shape = find_contract(heavy).shape
    plan = Plan(model=shape, phases=(Phase(until=0.125, model="light"), Phase(until=0.875), Phase(model="light")))
    cost = estimate(heavy, plan, Size(tokens=1024), {"light": light})
    assert round(100 * cost.saved_block_flops, 2) == 16.67
    assert 100 * cost.saved_all_in_flops == pytest.approx(12.2, abs=0.1)
    heavy_bytes, light_bytes = (sum(p.numel() * p.element_size() for p in m.parameters()) for m in (heavy, light))
    assert cost.weight_bytes == heavy_bytes + light_bytes


def test_a_phase_with_a_model_that_is_not_given() -> None:
    model = ROWS["llada"]()
    plan = Plan(model=find_contract(model).shape, phases=(Phase(model="light"),))
    with pytest.raises(sw.UserError, match="Unknown model in a plan's phase 'light'"):
        estimate(model, plan)


def test_phases_are_weighted_by_their_length() -> None:
    model = ROWS["llada"]()
    shape = find_contract(model).shape
    phases = (Phase(until=0.25, skip={"model.layers": (0, 1)}), Phase(until=1.0))
    assert estimate(model, Plan(model=shape, phases=phases)).saved_block_flops == pytest.approx(0.25 * 2 / 4)
    # block 0 and 1 run in the second phase, so their weights must be held
    assert estimate(model, Plan(model=shape, phases=phases)).weight_bytes == estimate(model).weight_bytes


def test_activation_bytes_grow_with_length_and_shrink_with_blocks() -> None:
    model = ROWS["llama"]()
    short, long = (price_blocks(model, Size(tokens=n)).of_blocks().activation_bytes for n in (8, 32))
    assert long > 3 * short
    assert price_blocks(model, Size(tokens=8)).of_blocks({"model.layers": (0,)}).activation_bytes == short * 3 // 4


@pytest.mark.parametrize("name", ["llada", "dream", "mdlm"])
def test_prices_of_a_length_follow_from_those_of_two_others(name: str) -> None:
    model = ROWS[name]()
    one, many = (price_blocks(model, Size(tokens=tokens)) for tokens in (1, 40))
    for tokens in (1, 2, 17, 40):
        assert many.at(tokens, one) == price_blocks(model, Size(tokens=tokens))
