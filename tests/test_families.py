"""What differs between the families agrees with what their stock pipelines do."""

import json
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

from skipwise.errors import UserError
from skipwise.finetuning.families import FAMILIES, Flux, PixArt, Sana, family_of
from skipwise.finetuning.lora import load_lora, lora_targets, save_lora
from skipwise.finetuning.patches import Patch, Place, place_in_picture
from tests.tiny_models import IMAGE
from tests.tiny_pipelines import PROMPT, ROWS, pipeline, save

STEPS, SIDE = 2, 32  # denoising steps, pixels
every = pytest.mark.parametrize("name", ROWS)


@cache
def stock(name: str) -> Any:
    """A row's pipeline, shared by the tests that leave it as it is."""
    return pipeline(name)


@cache
def text_of(name: str) -> dict[str, torch.Tensor]:
    """The prompt, encoded."""
    return family_of(stock(name)).encode_prompts(stock(name), [PROMPT])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a row's pipeline, written once."""
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generated(pipe: Any, output_type: str = "latent", **settings: Any) -> torch.Tensor:
    """What the stock pipeline makes of the prompt, without classifier-free guidance."""
    guidance = 3.5 if isinstance(pipe, diffusers.FluxPipeline) else 1.0
    binned = {} if isinstance(family_of(pipe), FAMILIES[:2]) else {"use_resolution_binning": False}
    return pipe(
        PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=seeded(),
        output_type=output_type,
        **binned,
        **settings,
    ).images


def noise_of(pipe: Any, batch: int = 1, seed: int = 0) -> torch.Tensor:
    side = SIDE // pipe.vae_scale_factor
    return torch.randn(batch, 4, side, side, generator=seeded(seed))


@torch.no_grad()
def denoised(pipe: Any, text: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by hand, with the family's text, inputs and prediction, on the schedule that the pipeline set."""
    family, scheduler, latents = family_of(pipe), pipe.scheduler, noise_of(pipe)
    solver = not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    if solver:
        scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        t = (timestep.reshape(1) + 0.5 * isinstance(family, PixArt)) / 1000
        output = pipe.transformer(**family.inputs(pipe.transformer, latents, t, text))
        prediction = family.prediction(output, latents)
        if solver:
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        else:
            latents = latents + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * prediction
    return latents


def unpacked(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    return family_of(pipe).prediction((latents,), noise_of(pipe))


@every
def test_a_loop_by_hand_gives_what_the_pipeline_gives(name: str):
    pipe = stock(name)
    expected = unpacked(pipe, generated(pipe))
    by_hand = denoised(pipe, text_of(name))
    assert (expected - noise_of(pipe)).abs().max() > 0.1  # something was denoised
    torch.testing.assert_close(by_hand, expected, atol=1e-5, rtol=1e-5)


@every
def test_the_prompt_matters(name: str):
    """Otherwise the loop by hand would pass with any text."""
    pipe, other = stock(name), "zebras at 7 lakes!"
    family, latents = family_of(pipe), noise_of(pipe, batch=2)
    both = family.encode_prompts(pipe, [PROMPT, other])
    assert {tensor.shape[0] for tensor in both.values()} == {2}
    alone = family.encode_prompts(pipe, [other])
    for argument, tensor in alone.items():
        torch.testing.assert_close(both[argument][1:], tensor)
    with torch.no_grad():
        output = pipe.transformer(**family.inputs(pipe.transformer, latents[:1].repeat(2, 1, 1, 1), halves(2), both))
    prediction = family.prediction(output, latents)
    assert (prediction[0] - prediction[1]).abs().max() > 1e-4


def halves(batch: int) -> torch.Tensor:
    return torch.full((batch,), 0.5)


@every
def test_prompts_can_be_shortened(name: str):
    pipe = stock(name)
    family = family_of(pipe)
    longest, short = text_of(name), family.encode_prompts(pipe, [PROMPT], 40)
    cut = longest["encoder_hidden_states"].shape[1] - short["encoder_hidden_states"].shape[1]
    assert cut == {"flux": 512 - 40, "sd3": 256 - 40, "pixart-alpha": 120 - 40}.get(name, 300 - 40)


@every
def test_latents_are_scaled_as_the_pipeline_unscales_them(name: str, monkeypatch: pytest.MonkeyPatch):
    pipe = stock(name)
    family, seen = family_of(pipe), []
    decode = pipe.vae.decode

    def spied(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents)
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", spied)
    latents = unpacked(pipe, generated(pipe))
    generated(pipe, "pt")
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: encoded(name, seen[0]))
    assert (seen[0] - latents).abs().max() > 0.1
    torch.testing.assert_close(family.encode_pixels(pipe, torch.zeros(1, 3, SIDE, SIDE)), latents)


def encoded(name: str, latents: torch.Tensor) -> Any:
    """An autoencoder's answer."""
    if name == "sana":
        return diffusers.models.autoencoders.vae.EncoderOutput(latent=latents)
    moments = torch.cat([latents, torch.zeros_like(latents)], dim=1)
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    return diffusers.models.modeling_outputs.AutoencoderKLOutput(latent_dist=distribution)


@every
def test_encoding_is_deterministic_and_samples_by_generator(name: str):
    pipe = stock(name)
    family, pixels = family_of(pipe), torch.rand(2, 3, SIDE, SIDE, generator=seeded()) * 2 - 1
    mode = family.encode_pixels(pipe, pixels)
    assert mode.shape == noise_of(pipe, 2).shape
    assert not mode.requires_grad
    assert torch.equal(mode, family.encode_pixels(pipe, pixels))
    one, same, other = (family.encode_pixels(pipe, pixels, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) == torch.equal(one, mode) == (name == "sana")  # it has no distribution


@every
def test_noise_and_target_agree(name: str):
    pipe = stock(name)
    family, latents, noise = family_of(pipe), noise_of(pipe, 8, seed=1), noise_of(pipe, 8, seed=2)
    t = family.sample_t(8, seeded())
    noisy, target = family.noisy(latents, noise, t), family.target(latents, noise, t)
    if isinstance(family, PixArt):
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, family.timestep(t)))
        clean = [
            scheduler.step(*row).pred_original_sample for row in zip(target, family.timestep(t), noisy, strict=True)
        ]
        scheduler.config.clip_sample or torch.testing.assert_close(torch.stack(clean), latents, atol=1e-3, rtol=1e-3)
    else:  # one step of Euler from t to 0
        torch.testing.assert_close(noisy - t.reshape(-1, 1, 1, 1) * target, latents)
    assert torch.equal(family.loss(target, latents, noise, t), torch.zeros(8))


def test_losses_are_those_of_diffusers_scripts():
    latents, noise, guess = (noise_of(stock("sd3"), 8, seed) for seed in (1, 2, 3))
    plain = (guess - (noise - latents)).square().mean((1, 2, 3))
    for name in ("flux", "sana"):
        family = family_of(stock(name))
        torch.testing.assert_close(family.loss(guess, latents, noise, family.sample_t(8, seeded())), plain)
    family = family_of(stock("sd3"))
    t = family.sample_t(8, seeded())
    preconditioned = family.noisy(latents, noise, t) - t.reshape(-1, 1, 1, 1) * guess
    error = (preconditioned - latents).square().mean((1, 2, 3))
    torch.testing.assert_close(family.loss(guess, latents, noise, t), error)
    t = family_of(stock("pixart")).sample_t(8, seeded())
    expected = (guess - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(family_of(stock("pixart")).loss(guess, latents, noise, t), expected)


def test_densities_are_those_of_diffusers_scripts(monkeypatch: pytest.MonkeyPatch):
    for name, scheme in (("flux", "none"), ("sana", "none"), ("sd3", "logit_normal")):
        family = family_of(stock(name))
        u = compute_density_for_timestep_sampling(scheme, 64, 0.0, 1.0, generator=seeded())
        shift = 3.0 if name == "sd3" else 1.0
        torch.testing.assert_close(family.sample_t(64, seeded()), shift * u / (1 + (shift - 1) * u))
    scheduler, family = stock("sd3").scheduler, family_of(stock("sd3"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    monkeypatch.setattr(family, "_density", lambda batch, generator: torch.arange(1000, 0, -1) / 1000)
    torch.testing.assert_close(family.sample_t(1000, seeded()), scheduler.sigmas)  # the training schedule, shifted
    family = family_of(stock("pixart"))
    t = family.sample_t(5000, seeded())
    assert 0 < t.min() < t.max() < 1
    assert family.timestep(t).unique().numel() > 900
    torch.testing.assert_close((family.timestep(t) + 0.5) / 1000, t)


@every
def test_half_precision_reaches_the_transformer(name: str):
    pipe = pipeline(name)
    pipe.transformer.to(torch.bfloat16)
    family, latents = family_of(pipe), noise_of(pipe, 2)
    text = {argument: tensor.repeat_interleave(2, 0) for argument, tensor in text_of(name).items()}
    kwargs = family.inputs(pipe.transformer, latents, halves(2), text)
    assert kwargs["hidden_states"].dtype == kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    with torch.no_grad():
        prediction = family.prediction(pipe.transformer(**kwargs), latents)
    assert prediction.shape == latents.shape
    assert prediction.isfinite().all()


def test_flux_keeps_the_place_of_a_crop():
    pipe = stock("flux")
    family = family_of(pipe)
    text = text_of("flux")
    whole = torch.randn(1, 4, 16, 16, generator=seeded())  # a picture of 32 pixels, 8 x 8 tokens

    def ids(latents: torch.Tensor, place: Place | None) -> torch.Tensor:
        return family.inputs(pipe.transformer, latents, halves(1), text, place)["img_ids"]

    grid = ids(whole, None).reshape(8, 8, 3)
    assert torch.equal(ids(whole, Place()).reshape(8, 8, 3), grid)
    crop = Patch(left=16, top=8, side=16)
    kept = ids(whole[..., 4:12, 8:16], place_in_picture(crop, (32, 32), tokens=4, grid=8)).reshape(4, 4, 3)
    assert torch.equal(kept, grid[2:6, 4:8])
    restarted = ids(whole[..., 4:12, 8:16], None).reshape(4, 4, 3)
    assert torch.equal(restarted, grid[:4, :4])
    coarse = ids(whole[..., :8, :8], place_in_picture(Patch(0, 0, 32), (32, 32), tokens=4, grid=8)).reshape(4, 4, 3)
    assert coarse[:, 0, 1].tolist() == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize("name", ["sd3", "sana", "pixart"])
def test_others_cannot_be_told_a_place(name: str):
    pipe = stock(name)
    family = family_of(pipe)
    with pytest.raises(UserError, match="cannot be told where a crop lies"):
        family.inputs(pipe.transformer, noise_of(pipe), halves(1), text_of(name), Place())


@torch.no_grad()
def predicted(name: str, pipe: Any) -> torch.Tensor:
    family, latents = family_of(pipe), noise_of(pipe)
    kwargs = family.inputs(pipe.transformer, latents, halves(1), text_of(name))
    return family.prediction(pipe.transformer(**kwargs), latents)


def adapted(name: str) -> Any:
    """The row's pipeline with a random adapter on two blocks."""
    pipe = pipeline(name)
    targets = lora_targets(pipe.transformer, {"transformer_blocks": [1, 2]})
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.transformer)
    return pipe


@every
def test_an_adapter_makes_the_round_trip_through_the_stock_pipeline(name: str, tmp_path: Path, saved):
    pipe = adapted(name)
    expected = predicted(name, pipe)
    assert (expected - predicted(name, stock(name))).abs().max() > 1e-3
    written = save_lora(type(pipe), tmp_path, pipe.transformer)
    extra = ["adapter_config.json"] if name.startswith("pixart") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*extra, written.name])
    fresh = diffusers.DiffusionPipeline.from_pretrained(saved(name), use_safetensors=True)
    if name.startswith("pixart"):  # has no load_lora_weights
        fresh.transformer = peft.PeftModel.from_pretrained(fresh.transformer, tmp_path)
    else:
        fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(predicted(name, fresh), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_adapters_are_loaded_in_the_way_of_the_family(name: str, tmp_path: Path):
    pipe, other, fresh = adapted(name), adapted(name), pipeline(name)
    with torch.no_grad():
        for parameter in (p for key, p in other.transformer.named_parameters() if "lora_" in key):
            parameter.zero_()
    save_lora(type(pipe), tmp_path, other.transformer)
    save_lora(type(pipe), tmp_path, pipe.transformer)  # the one there is replaced
    load_lora(fresh, tmp_path)
    assert torch.equal(predicted(name, fresh), predicted(name, pipe))


def test_the_attention_projections_are_found():
    flux = IMAGE["flux"]()
    block = lora_targets(flux, {"transformer_blocks": [0]})
    assert len(block) == 8
    assert "transformer_blocks.0.attn.to_out.0" in block
    single = lora_targets(flux, {"single_transformer_blocks": [1, 3]})
    assert single == [f"single_transformer_blocks.{k}.attn.to_{p}" for k in (1, 3) for p in "qkv"]
    assert len(lora_targets(flux)) == 3 * 8 + 4 * 3
    assert len(lora_targets(IMAGE["pixart"]())) == 4 * 8  # self- and cross-attention
    with pytest.raises(UserError, match="no attention projections in blocks"):
        lora_targets(flux, {"transformer_blocks": [9]})


def test_saving_needs_an_adapter(tmp_path: Path):
    with pytest.raises(UserError, match="has no adapter 'default'"):
        save_lora(diffusers.FluxPipeline, tmp_path, IMAGE["flux"]())
    with pytest.raises(UserError, match="holds no adapter"):
        load_lora(stock("flux"), tmp_path)


def test_families_are_told_apart(saved):
    for name in ROWS:
        index = json.loads((saved(name) / "model_index.json").read_text())
        expected = type(family_of(stock(name)))
        assert [type(family_of(source)) for source in (index, stock(name).transformer, index["_class_name"])] == [
            expected
        ] * 3
    assert (family_of("SanaPipeline").scale, family_of(stock("sana")).scale) == (32, 4)
    assert isinstance(family_of("FluxTransformer2DModel"), Flux)
    for other in ("StableDiffusionXLPipeline", {"_class_name": "FluxFillPipeline"}, torch.nn.Linear(1, 1)):
        with pytest.raises(UserError, match=r"Unknown pipeline .*Available: FluxPipeline.*StableDiffusion3Pipeline"):
            family_of(other)
    with pytest.raises(UserError, match="not 'v_prediction'"):
        PixArt({"prediction_type": "v_prediction"})


def test_resolutions_are_checked():
    sana, flux = IMAGE["sana"](), IMAGE["flux"]()
    family_of("FluxPipeline").check_resolution(flux, 512)
    with pytest.raises(UserError, match="Resolution 500 does not suit FLUX; take a multiple of 16: 496"):
        family_of("FluxPipeline").check_resolution(flux, 500)
    with pytest.raises(UserError, match="multiple of 32: 32"):
        Sana().check_resolution(sana, 0)


def test_latent_crops_are_measured_against_exact_ones(
    saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("a.png", "b.png"):
        values = torch.randint(256, (40, 52, 3), generator=seeded(ord(name[0])), dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(tmp_path / name)
    arguments = [str(saved("pixart")), "--images", str(tmp_path), "--resolution", "32", "--levels", "3"]
    monkeypatch.setattr(sys, "argv", ["patch_space.py", *arguments])
    runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "patch_space.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["side"] for row in result["rows"][:3]] == [20, 30, 40]
    assert all(0 < row["error"] < 2 and 0 < row["half_pixel"] < 2 for row in result["rows"])
    assert result["times"]["ratio"] > 0
