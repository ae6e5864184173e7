"""diffusers pipelines under plans with phases: what runs at every step, and that the pipeline is left as it was."""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SanaPipeline, WanPipeline
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.plan import Phase, Plan
from skipwise.sampling.accounts import Share
from skipwise.sampling.pipelines import follow, transformers_of
from tests.tiny_models import ROWS, VIDEO


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

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            follower(pipeline, step, timestep, tensors)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pipeline, call, callback_on_step_end=stop)
        del seen[:]
        run(pipeline, call, callback_on_step_end=follower)  # after a run that was broken off, too
        assert seen == expected
    assert "set_timesteps" not in vars(pipeline.scheduler)
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


def wan(second: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """Wan2.2: the first expert denoises the first half of the noise levels, the second one the other half."""
    first = VIDEO["wan"]()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    second = other_weights(first) if second is None else second
    pipeline = WanPipeline(None, None, None, scheduler, first, second, boundary_ratio=0.5)
    embeddings = torch.randn(1, 6, first.config.text_dim, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": embeddings, "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}
    return pipeline, call


def film(pipeline: Any, call: dict[str, Any], **others: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", "num_inference_steps": 4}
    with torch.no_grad():
        return pipeline(**call, **given, **others).frames


def blocks_run(pipeline: Any) -> dict[str, list[int]]:
    """component -> how many blocks ran in each of its calls, for as long as the pipeline lives."""
    runs: dict[str, list[int]] = {}
    for name, model in transformers_of(pipeline).items():
        runs[name] = []
        model.register_forward_pre_hook(lambda *_, name=name: runs[name].append(0))
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, name=name: runs[name].__setitem__(-1, runs[name][-1] + 1))
    return runs


def test_both_experts_are_planned_and_counted() -> None:
    pipeline, call = wan()
    alone, ran = film(pipeline, call), blocks_run(pipeline)
    whole = len(pipeline.transformer.blocks)
    plan = Plan.static(find_contract(pipeline.transformer).shape, {"blocks": [1]})
    with follow(pipeline, plan) as follower:
        [runs.clear() for runs in ran.values()]
        film(pipeline, call, callback_on_step_end=follower)
        assert len(follower.forwards) == sum(map(len, ran.values())) == 4
        assert set(ran["transformer"]) == set(ran["transformer_2"]) == {whole - 1}
        calls = {name: len(runs) for name, runs in ran.items()}
        apart, together = follower.accounts(), follower.account()  # pricing calls the models, too
    assert {name: taken[None].forwards for name, taken in apart.items()} == calls
    assert together[None] == sum((taken[None] for taken in apart.values()), Share())
    assert together[None].block_flops < together[None].whole_all_in_flops
    assert torch.equal(film(pipeline, call), alone)


def test_each_expert_can_have_its_own_plan() -> None:
    """Progress is the whole pipeline's: the second expert, which runs from the middle on, is in its last phase."""
    pipeline, call = wan()
    ran, whole = blocks_run(pipeline), len(pipeline.transformer.blocks)
    shape = find_contract(pipeline.transformer).shape
    late = Plan(model=shape, phases=(Phase(until=0.75), Phase(skip={"blocks": (0, 1)})))
    with follow(pipeline, {"transformer_2": late}) as follower:
        [runs.clear() for runs in ran.values()]
        film(pipeline, call, callback_on_step_end=follower)
    assert ran["transformer"] + ran["transformer_2"] == [whole, whole, whole, whole - 2]
    with pytest.raises(sw.UserError, match=r"Unknown transformer of WanPipeline 'transformer2'\. Did you mean"):
        follow(pipeline, {"transformer2": late}).__enter__()


def test_a_lighter_model_stands_for_both_experts() -> None:
    pipeline, call = wan()
    light, shape = other_weights(pipeline.transformer), find_contract(pipeline.transformer).shape
    experts = transformers_of(pipeline)
    plan = Plan(model=shape, phases=(Phase(until=0.75, model="light"), Phase()))
    with follow(pipeline, plan, {"light": light}) as follower:
        film(pipeline, call, callback_on_step_end=follower)
        assert {who: share.forwards for who, share in follower.account().items()} == {"light": 3, None: 1}
        assert [running.running.model for running in follower.forwards] == ["light"] * 3 + [None]
    assert transformers_of(pipeline) == experts


def test_one_module_in_two_places_is_planned_once() -> None:
    pipeline, call = wan()
    pipeline.transformer_2 = pipeline.transformer
    light, shape = other_weights(pipeline.transformer), find_contract(pipeline.transformer).shape
    plan = Plan(model=shape, phases=(Phase(until=0.75, skip={"blocks": (1,)}), Phase(model="light")))
    with follow(pipeline, plan, {"light": light}) as follower:
        film(pipeline, call, callback_on_step_end=follower)
    assert {who: share.forwards for who, share in follower.account().items()} == {None: 3, "light": 1}


def test_plans_that_are_not_for_every_expert_are_refused() -> None:
    config = {name: value for name, value in VIDEO["wan"]().config.items() if not name.startswith("_")}
    deeper = diffusers.WanTransformer3DModel(**config | {"num_layers": config["num_layers"] + 1})
    pipeline, _ = wan(deeper)
    plan = Plan.static(find_contract(pipeline.transformer).shape, {"blocks": [1]})
    with pytest.raises(sw.UserError, match=r"transformer_2: This plan was made for .* give each its own plan: follow"):
        follow(pipeline, plan).__enter__()
    pipeline, _ = wan()
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    fitted = plan.with_stand_ins("constant", {"0/blocks/1/bias": torch.zeros(width)})
    with pytest.raises(sw.UserError, match="fitted to the weights of one; give each its own plan"):
        follow(pipeline, fitted).__enter__()
    assert not pipeline.transformer._forward_pre_hooks


def test_a_pipeline_that_does_not_say_how_far_it_is() -> None:
    """PixArt's takes another callback: phases cannot be followed, a static plan can. A callback may be forgotten."""
    transformer = ROWS["pixart"]()
    pipeline = diffusers.PixArtSigmaPipeline(None, None, None, transformer, None)
    shape = find_contract(transformer).shape
    skipped = Phase(until=0.5, skip={"transformer_blocks": (1,)})
    with pytest.raises(sw.UserError, match="PixArtSigmaPipeline does not tell a callback how far it is"):
        follow(pipeline, Plan(model=shape, phases=(skipped, Phase()))).__enter__()
    with follow(pipeline, Plan.static(shape, {"transformer_blocks": [1]})):
        assert len(transformer.transformer_blocks) < find_contract(transformer).stacks["transformer_blocks"].length
    pipeline, call = sana()
    plan = Plan(model=find_contract(pipeline.transformer).shape, phases=(skipped, Phase()))
    with (
        pytest.raises(sw.UserError, match="call the pipeline with callback_on_step_end=follower"),
        follow(pipeline, plan),
    ):
        run(pipeline, call)


def test_no_pipeline_of_diffusers_denoises_with_what_is_not_seen() -> None:
    """Every class that takes several transformers of diffusers: all are found by name, or the pipeline is refused."""
    several = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline):
            parameters = inspect.signature(kind.__init__).parameters.values()
            denoise = [p.name for p in parameters if "models.transformers" in str(p.annotation)]
            if len(denoise) > 1:
                several[name] = denoise
    assert "WanPipeline" in several
    assert "Ideogram4Pipeline" in several
    seen = {name: [part for part in parts if "transformer" in part] for name, parts in several.items()}
    assert all(len(parts) in (0, len(several[name])) for name, parts in seen.items()), several
