"""Other libraries' caches and a plan: what runs is the model without the blocks, with the same cache."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise import blocks
from skipwise.errors import UserError
from skipwise.examples import example_inputs
from skipwise.plan import Phase, Plan
from skipwise.step_caches import check_caches, end_cache_dit
from tests.tiny_models import IMAGE

NOW = [0]  # the timestep that is being denoised, which caches ask for
TIMES = (999, 950, 500, 400)
CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
    "MagCache": lambda: diffusers.MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: NOW[0],
        is_guidance_distilled=True,
    ),
}
SKIPPED = {"single_transformer_blocks": [1, 3], "transformer_blocks": [0]}  # the first of all and the last


def steps(model: nn.Module) -> list[Tensor]:
    """What four denoising steps with slowly moving inputs give."""
    inputs, found = example_inputs(model), []
    for step, NOW[0] in enumerate(TIMES):
        with torch.no_grad():
            found.append(model(**inputs | {"hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)})[0])
    return found


def cut() -> nn.Module:
    model: Any = IMAGE["flux"]()
    for name, numbers in SKIPPED.items():
        setattr(model, name, nn.ModuleList(b for i, b in enumerate(getattr(model, name)) if i not in numbers))
    return model


def context(model: Any) -> AbstractContextManager:
    return model.cache_context("cond")


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("order", ["cache first", "plan first"])
def test_a_cache_of_diffusers(name: str, order: str) -> None:
    wanted: Any = cut()
    wanted.enable_cache(CACHES[name]())
    with context(wanted):
        expected = steps(wanted)
    whole: Any = IMAGE["flux"]()
    whole.enable_cache(CACHES[name]())
    with context(whole):
        afterwards = steps(whole)

    model: Any = IMAGE["flux"]()
    if order == "cache first":
        model.enable_cache(CACHES[name]())
    with context(model) if order == "cache first" else nullcontext(), sw.skip(model, SKIPPED):
        if order == "plan first":
            model.enable_cache(CACHES[name]())
        with context(model):
            found = steps(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, afterwards, strict=True))
    with context(model):
        assert all(torch.equal(a, b) for a, b in zip(steps(model), afterwards, strict=True))


def test_looking_at_a_model_leaves_no_trace_in_its_cache_or_in_the_random_state() -> None:
    model: Any = IMAGE["flux"]()
    model.enable_cache(CACHES["TaylorSeer"]())
    other: Any = IMAGE["flux"]()
    other.enable_cache(CACHES["TaylorSeer"]())
    state = torch.random.get_rng_state()
    sw.find_contract(model)
    sw.estimate(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    with context(model), context(other):
        assert all(torch.equal(a, b) for a, b in zip(steps(model), steps(other), strict=True))


def test_phases_and_a_cache_are_refused() -> None:
    model: Any = IMAGE["flux"]()
    phases = (Phase(until=0.5, skip={"transformer_blocks": (1,)}), Phase())
    plan = Plan(model=sw.find_contract(model).shape, phases=phases)
    model.enable_cache(CACHES["FirstBlockCache"]())
    with pytest.raises(UserError, match="static plan"), sw.skip(model, plan):
        pass
    model.disable_cache()
    with sw.skip(model, plan) as skipping:
        model.enable_cache(CACHES["FirstBlockCache"]())
        with pytest.raises(UserError, match="static plan"):
            skipping.at(0.7)


def test_blocks_that_keep_their_places_and_a_cache_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = IMAGE["flux"]()
    contract = sw.find_contract(model)
    placed = {name: replace(stack, in_place=True) for name, stack in contract.stacks.items()}
    monkeypatch.setitem(blocks._contracts, model, replace(contract, stacks=placed))
    with sw.skip(model, SKIPPED):
        assert all(torch.equal(a, b) for a, b in zip(steps(model), steps(cut()), strict=True))
    model.enable_cache(CACHES["FirstBlockCache"]())
    with pytest.raises(UserError, match="FirstBlockCacheConfig hangs on whole"), sw.skip(model, SKIPPED):
        pass
    model.disable_cache()
    with sw.skip(model, SKIPPED):
        model.enable_cache(CACHES["FirstBlockCache"]())
        with pytest.raises(UserError, match="FirstBlockCacheConfig hangs on whole"):
            steps(model)


def test_a_control_and_a_cache_are_refused() -> None:
    model: Any = IMAGE["flux"]()
    inputs = example_inputs(model)
    residuals = {"controlnet_block_samples": [torch.zeros(1, 16, 32)] * 3}
    model.enable_cache(CACHES["TaylorSeer"]())
    with sw.skip(model, SKIPPED), pytest.raises(UserError, match="the cache that is on"):
        model(**inputs, **residuals)


def test_cache_dit() -> None:
    """As cache-dit leaves a transformer: a mark, and a forward that goes on with the blocks that it was given."""
    model: Any = IMAGE["flux"]()
    model._is_cached = True
    with pytest.raises(UserError, match=r"cache_dit\.disable_cache"), sw.skip(model, SKIPPED):
        pass
    with pytest.raises(UserError, match=r"cache_dit\.disable_cache"):
        check_caches(model, static=True)


def test_cache_dit_for_real() -> None:
    cache_dit = pytest.importorskip("cache_dit")
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.2, max_warmup_steps=1, num_inference_steps=4
    )
    wanted, model = cut(), IMAGE["flux"]()
    plain = steps(model)
    cache_dit.enable_cache(wanted, cache_config=settings)
    expected = steps(wanted)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with sw.skip(model, SKIPPED):
            cache_dit.enable_cache(model, cache_config=settings)
            found = steps(model)
    assert any("switched on for the blocks" in str(warning.message) for warning in said)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(steps(model), plain, strict=True))
    end_cache_dit(model)  # nothing is on: nothing happens


def test_a_cache_that_does_not_go_with_a_plan_stays_on() -> None:
    """Where it cannot hang on what the plan leaves, the plan is refused, and the model keeps its cache."""
    model: Any = IMAGE["flux"]()
    before = steps(model)
    model.enable_cache(CACHES["FirstBlockCache"]())
    shape = blocks.find_contract(model).shape
    everything = Plan.static(shape, {name: range(length) for name, length in shape.stacks.items()})
    with context(model):
        cached = steps(model)
    with pytest.raises(UserError, match="cannot be switched on"), sw.skip(model, everything):
        pass
    assert model.is_cache_enabled
    model._reset_stateful_cache()
    with context(model):
        assert all(map(torch.equal, steps(model), cached))
    model.disable_cache()
    assert all(map(torch.equal, steps(model), before))
