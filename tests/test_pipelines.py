"""diffusers pipelines under plans with phases: what runs at every step, and that the pipeline is left as it was."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SanaPipeline
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.plan import Phase, Plan
from skipwise.sampling.pipelines import follow
from tests.tiny_models import ROWS


def sana() -> tuple[Any, dict[str, Any]]:
    transformer = ROWS["sana"]()
    pipeline = SanaPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler())
    width = transformer.config.caption_channels
    embeddings = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 6)
    call = {
        "prompt_embeds": embeddings,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": embeddings * 0,
        "negative_prompt_attention_mask": mask,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
    }
    return pipeline, call


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = ROWS["flux"]()
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(1, 6, transformer.config.joint_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, transformer.config.pooled_projection_dim, generator=generator),
        "height": 64,
        "width": 64,
    }
    return pipeline, call


PIPELINES = {"sana": sana, "flux": flux}


def run(pipeline: Any, call: dict[str, Any], **others: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(**call, num_inference_steps=4, output_type="latent", generator=generator, **others).images


def other_weights(model: nn.Module) -> nn.Module:
    light = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in light.parameters():
            parameter.mul_(0.5)
    return light


@pytest.mark.parametrize("name", PIPELINES)
def test_phases_are_followed_and_counted(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    heavy, light = pipeline.transformer, other_weights(pipeline.transformer)
    contract = find_contract(heavy)
    alone = run(pipeline, call)
    phases = (Phase(until=0.25, model="light"), Phase(until=0.75, skip={contract.main_stack: (1,)}), Phase())
    plan = Plan(model=contract.shape, phases=phases)
    seen: list[tuple[str, int]] = []
    lengths = {"heavy": lambda: len(heavy.get_submodule(contract.main_stack)), "light": lambda: 0}
    for label, model in (("heavy", heavy), ("light", light)):
        model.register_forward_pre_hook(lambda *_, label=label: seen.append((label, lengths[label]())))
    whole = lengths["heavy"]()
    with follow(pipeline, plan, {"light": light}) as follower:
        del seen[:]
        first = run(pipeline, call, callback_on_step_end=follower)
        expected = [("light", 0), ("heavy", whole - 1), ("heavy", whole - 1), ("heavy", whole)]
        assert seen == expected
        again = run(pipeline, call, callback_on_step_end=follower)  # begins anew
        assert seen == expected * 2
        taken = follower.account()
    assert torch.equal(first, again)
    assert not torch.equal(first, alone)
    assert {who: share.forwards for who, share in taken.items()} == {"light": 2, None: 6}
    own = taken[None]
    assert own.block_flops < own.all_in_flops < own.whole_all_in_flops
    assert taken["light"].all_in_flops == taken["light"].whole_all_in_flops
    assert pipeline.transformer is heavy
    assert torch.equal(run(pipeline, call), alone)


@pytest.mark.parametrize("name", PIPELINES)
def test_all_heavy_and_all_light(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    heavy, light = pipeline.transformer, other_weights(pipeline.transformer)
    shape = find_contract(heavy).shape
    alone = run(pipeline, call)
    with follow(pipeline, Plan(model=shape)) as follower:
        assert torch.equal(run(pipeline, call, callback_on_step_end=follower), alone)
    with follow(pipeline, Plan(model=shape, phases=(Phase(model="light"),)), {"light": light}) as follower:
        handed = run(pipeline, call, callback_on_step_end=follower)
    pipeline.transformer = light
    assert torch.equal(run(pipeline, call), handed)


def test_the_pipeline_is_put_back_after_an_exception() -> None:
    pipeline, _ = sana()
    heavy = pipeline.transformer
    plan = Plan(model=find_contract(heavy).shape, phases=(Phase(model="light"),))
    inside = []
    with pytest.raises(RuntimeError), follow(pipeline, plan, {"light": other_weights(heavy)}):  # noqa: PT012
        inside.append(pipeline.transformer)
        raise RuntimeError
    assert inside[0] is not heavy
    assert pipeline.transformer is heavy
    assert not heavy._forward_pre_hooks


def test_what_cannot_be_followed_is_refused() -> None:
    pipeline, _ = sana()
    shape = find_contract(pipeline.transformer).shape
    plan = Plan(model=shape, phases=(Phase(model="light"),))
    with pytest.raises(sw.UserError, match="light is a FluxTransformer2DModel with in_channels"):
        follow(pipeline, plan, {"light": ROWS["flux"]()}).__enter__()
    with pytest.raises(sw.UserError, match="Unknown model 'light'"):
        follow(pipeline, plan).__enter__()
    with pytest.raises(sw.UserError, match="SimpleNamespace has no transformer"):
        follow(SimpleNamespace(), plan).__enter__()
