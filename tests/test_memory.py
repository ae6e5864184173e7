"""Estimates of a fine-tuning's memory against what real tensors take, and what is chosen by them."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers

from skipwise.errors import UserError
from skipwise.examples import Size
from skipwise.finetuning.memory.encoders import components, weights_of
from skipwise.finetuning.memory.estimate import Estimator, MemoryEstimate, estimate_memory, optimiser_bytes
from skipwise.finetuning.memory.fitting import (
    CONTEXT,
    bytes_of,
    cheapest,
    consecutive,
    describe_blocks,
    needed,
)
from skipwise.finetuning.memory.simulation import Stage
from skipwise.finetuning.peak import PARTS, Bytes, PeakMemory, Segment, compose
from skipwise.finetuning.precision import computing, plain_norms
from skipwise.finetuning.runs import Train
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.presets import names as preset_names
from skipwise.sizes import GIB, parse_bytes
from tests.tiny_pipelines import pipeline, save

MIB = 2**20
SMALL = FinetuneSettings(resolution=256, text_tokens=48)
PIXELS = dict(sample_size=32, patch_size=2, in_channels=4)
HEADS = dict(num_attention_heads=4, attention_head_dim=32)

# small, but with activations that outweigh the tracker's blind spots
MODELS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=4, num_single_layers=4, joint_attention_dim=64, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        **HEADS, **PIXELS, out_channels=4, num_layers=6, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=32, pos_embed_max_size=32,
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        **HEADS, sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=6, num_cross_attention_heads=4,
        cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=64,
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        **HEADS, **PIXELS, out_channels=8, num_layers=6, cross_attention_dim=128, caption_channels=64,
    ),
}  # fmt: skip


@cache
def estimator(name: str) -> Estimator:
    with torch.device("meta"):
        return Estimator(MODELS[name]())


def settings_for(name: str, **changes: Any) -> FinetuneSettings:
    return replace(SMALL, **({"resolution": 1024} if name == "sana" else {}), **changes)


def own_blocks(name: str) -> int:
    return sum(map(len, estimator(name).block_bytes("bfloat16").values()))


def middle(name: str, count: int) -> dict[str, tuple[int, ...]]:
    return consecutive(estimator(name).block_bytes("bfloat16"), count, "middle")


@contextmanager
def allocated() -> Iterator[list[int]]:
    """[most bytes that torch's CPU allocator held at once, of those it gave within], by the profiler's events."""
    peak = [0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    held = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak[0] = max(peak[0], held)


WHOLE: dict[str, Any] = {}  # bfloat16
PART = {"checkpointing": True, "dtype": "float32"}
CASES = [(name, count, changes) for name in MODELS for count, changes in ((0, WHOLE), (4, PART))]


@pytest.mark.parametrize(("name", "count", "changes"), CASES)
def test_an_estimate_is_what_real_tensors_take(name: str, count: int, changes: dict[str, Any]) -> None:
    """Within 10%, by the tracker on real tensors and by the profiler's events of allocation."""
    settings = settings_for(name, **changes)
    train = middle(name, count or own_blocks(name))
    estimate = estimator(name).estimate(settings, train).training.total
    with torch.device("meta"):
        stage = Stage(MODELS[name](), estimator(name).size, fake=False)
    with allocated() as peak:
        course = stage.play(settings, train, shorten=False)
    tracked = max(segment.peak.total for segment in course.segments)
    assert estimate == pytest.approx(tracked, rel=0.1)
    assert estimate == pytest.approx(peak[0], rel=0.1)
    assert next(stage.model.parameters()).is_meta


VARIANTS: dict[str, tuple[str, int | Train, dict[str, Any]]] = {
    "plain": ("flux", 0, {"rank": 8}),
    "checkpointed": ("flux", 0, {"checkpointing": True, "rank": 64}),
    "pure": ("pixart", 0, {"precision": "pure", "batch": 2}),
    "as CUDA's autocast": ("sd3", 5, {"precision": "autocast", "patch": 128}),
    "late residual": ("sana", 5, {"rank": 64}),
    "late frozen": ("pixart", {"transformer_blocks": (0,)}, {"late": "frozen", "checkpointing": True}),
    "late streamed": ("flux", {"transformer_blocks": (1,)}, {"late": "streamed"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_repeating_one_block_is_running_all(variant: str) -> None:
    """The shortened course, composed, peaks where the whole one does, within 1% and in every part."""
    name, blocks, changes = VARIANTS[variant]
    settings, own = settings_for(name, **changes), estimator(name)
    train = middle(name, blocks or own_blocks(name)) if isinstance(blocks, int) else blocks
    known = list(own._courses.values())
    estimate = own.estimate(settings, train).training
    (short,) = [course for course in own._courses.values() if course not in known]
    course = own._stage.play(settings, train, shorten=False)
    whole = max((segment.peak for segment in course.segments), key=lambda peak: peak.total)
    assert estimate.total == pytest.approx(whole.total, rel=0.01)
    for part in ("weights", "lora", "optimiser", "residuals"):
        assert estimate.as_dict()[part] == pytest.approx(whole.as_dict()[part], rel=0.01), part
    assert len(course.segments) > len(short.segments)


def test_figures_of_the_full_size_models_without_their_weights() -> None:
    """FLUX.1-dev's LoRA takes 30.0 GiB, half its blocks at 256 px 11.3, a third 5.8, and nothing of that here."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    before = highest_resident()
    flux = Estimator("flux.1-dev")
    sizes, patch = flux.block_bytes("bfloat16"), FinetuneSettings(patch=256, late="residual")
    whole = flux.estimate()
    half, third = (flux.estimate(patch, consecutive(sizes, count, "middle")) for count in (28, 17))
    assert whole.training.total / GIB == pytest.approx(30.0, rel=0.01)
    assert half.training.total / GIB == pytest.approx(11.33, rel=0.01)
    assert third.peak / GIB == pytest.approx(5.77, rel=0.01)
    assert 0.695 * GIB < third.making.total < 1.0 * GIB
    assert whole.making.total == whole.record == 0
    assert third.record / MIB == pytest.approx(4.5 + 1.5)  # the outputs of the double blocks are replaced
    assert whole.text_encoders["text_encoder_2"] / 2 == pytest.approx(4.76e9, rel=0.01)
    assert highest_resident() - before < GIB
    assert all(parameter.is_meta for parameter in flux.model.parameters())


def highest_resident() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def test_every_trick_saves() -> None:
    """Fewer blocks, smaller pictures, checkpointing and the 8-bit optimiser each take less than without."""
    own, base = estimator("sd3"), settings_for("sd3", rank=64)
    whole = own.estimate(base)
    for changes in ({"patch": 128}, {"checkpointing": True}, {"optimiser": "adamw8bit"}, {"precision": "pure"}):
        assert own.estimate(base.but(**changes)).training.total < whole.training.total, changes
    half = own.estimate(base.but(late="residual"), middle("sd3", 2))
    frozen = own.estimate(base.but(late="frozen"), middle("sd3", 2))
    streamed = own.estimate(base.but(late="streamed"), middle("sd3", 2))
    assert half.training.total < streamed.training.total < frozen.training.total < whole.training.total
    assert own.estimate(base.but(precision="autocast")).training.total > whole.training.total
    assert half.lora_parameters < whole.lora_parameters


def test_a_model_may_be_given_and_is_not_touched() -> None:
    model = MODELS["pixart"]()
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    estimate = estimate_memory(model, settings_for("pixart"))
    assert estimate.training.total == estimator("pixart").estimate(settings_for("pixart")).training.total
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state
    assert estimate.encoding.total == 0
    content = estimate.to_json()
    assert content["label"] == "estimated"
    assert content["training"]["total"] == sum(content["training"][part] for part in PARTS) == content["peak_bytes"]


def test_the_tracker_counts_storages_once_and_until_they_go() -> None:
    tracker = PeakMemory()
    weight = torch.zeros(256)  # 1 KiB
    tracker.label([weight, weight.view(16, 16)], "weights")
    with tracker:
        first = weight + 1
        tracker.mark("second")
        second = first.repeat(3)
        del first
        third = second[:1]  # a view
        tracker.label([second], "gradients")
    assert tracker.now == Bytes.of(weights=1024, gradients=3 * 1024)
    assert tracker.peak == Bytes.of(weights=1024, activations=4 * 1024)
    assert tracker.segments[0].end.total == 2 * 1024
    del second
    assert tracker.now.total == 4 * 1024  # the view holds it
    del third
    assert tracker.now.total == 1024


def test_a_repeated_segment_rises_or_falls_all_along() -> None:
    def segment(label: str, begin: int, peak: int, end: int) -> Segment:
        return Segment(label, *(Bytes.of(activations=amount) for amount in (begin, peak, end)))

    segments = [segment("up", 10, 13, 12), segment("down", 12, 20, 11)]
    start = Bytes.of(weights=100, activations=10)
    assert compose(segments, {}, start) == (start + Bytes.of(activations=10), start + Bytes.of(activations=1))
    peak, end = compose(segments, {"up": 5, "down": 10}, start)
    assert peak.total == 110 + 5 * 2 + 8
    assert end.total == 110 + 5 * 2 - 10


def test_state_of_the_8_bit_optimiser() -> None:
    settings = FinetuneSettings(optimiser="adamw8bit")
    assert optimiser_bytes(settings, [4096, 1000]) == 2 * 4096 + 2 * 4 * 16 + 2 * 4 * 1000
    assert optimiser_bytes(FinetuneSettings(), [4096, 1000]) == 2 * 4 * 5096
    assert optimiser_bytes(FinetuneSettings(precision="pure"), [4096, 1000]) == 2 * 2 * 5096


class Seen(nn.LayerNorm):
    """Notes whether autocast is on."""

    seen: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.is_autocast_enabled("cpu")
        return super().forward(x)


@pytest.mark.parametrize(("precision", "inside"), [("mixed", False), ("autocast", True), ("pure", False)])
def test_norms_are_left_out_of_autocast(precision: Any, inside: bool) -> None:
    model = nn.Sequential(Seen(4))
    settings = FinetuneSettings(precision=precision)
    with plain_norms(model, settings, "cpu"), computing(settings, "cpu"):
        model(torch.zeros(1, 4))
        assert torch.is_autocast_enabled("cpu") == (precision != "pure")
    assert model[0].seen == inside
    assert "forward" not in vars(model[0])


@pytest.fixture(scope="module")
def fits() -> list[Any]:
    """What is chosen for more and more memory."""
    own = estimator("pixart")
    base = settings_for("pixart")
    most = needed(own.estimate(base))
    least = needed(own.estimate(base.but(checkpointing=True, patch=128, optimiser="adamw8bit"), middle("pixart", 1)))
    steps = [least + round((most - least) * part) for part in (0, 0.5, 1)]
    return [cheapest(own, memory, base) for memory in steps]


def test_more_memory_never_trains_less(fits: list[Any]) -> None:
    own = estimator("pixart")
    whole = sum(map(sum, own.block_bytes("bfloat16").values()))
    for less, more in pairwise(fits):
        assert more.trained_bytes >= less.trained_bytes - 0.05 * whole
    for fit in fits:
        assert needed(fit.estimate) <= fit.memory
        assert fit.trained_bytes == bytes_of(own.block_bytes("bfloat16"), fit.train)
    assert fits[0].estimate.trained < fits[-1].estimate.trained == 6
    assert not fits[-1].settings.checkpointing
    assert fits[-1].settings.patch is None


def test_what_is_chosen_is_told(fits: list[Any]) -> None:
    sentence = fits[1].sentence()
    assert "fits your" in sentence
    assert describe_blocks(fits[1].train) in sentence
    assert f"train {fits[1].estimate.trained} of 6 blocks" in sentence


def test_too_little_memory_says_the_least() -> None:
    with pytest.raises(UserError, match=r"does not fit 0.01 GiB: the nearest that is possible is 0.5\d GiB"):
        cheapest(estimator("pixart"), round(0.01 * GIB), settings_for("pixart"))
    assert CONTEXT < GIB


def test_last_blocks_under_late_mode_none() -> None:
    fit = cheapest(estimator("pixart"), CONTEXT + 4 * MIB, settings_for("pixart", late="none"))
    assert fit.train["transformer_blocks"][-1] == 5
    assert 0 < fit.estimate.trained < 6
    assert fit.settings.late == "none"


def test_blocks_are_described_in_ranges() -> None:
    assert describe_blocks({"a": (0, 1, 4), "b": ()}) == "a 0-1 4"


def test_amounts_of_memory() -> None:
    assert parse_bytes("8GiB") == 8 * GIB
    assert parse_bytes(" 1.5 gb ") == 1_500_000_000
    for wrong in ("8", "lots", "8 XB", "0GiB", "-1GiB"):
        with pytest.raises(UserError, match="no amount of memory"):
            parse_bytes(wrong)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "late": ({"late": "gone"}, "Unknown late of a fine-tuning 'gone'"),
    "dtype": ({"dtype": "float8"}, "Unknown dtype 'float8'"),
    "rank": ({"rank": 0}, "rank is 0"),
    "type": ({"batch": "two"}, "batch is 'two'"),
    "patch": ({"patch": 1024}, "Patches of 1024 px do not fit into pictures of 512 px"),
    "name": ({"ranks": 4}, "Unknown setting of a fine-tuning 'ranks'. Did you mean 'rank'"),
    "targets": ({"targets": ()}, "LoRA has no targets"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_cannot_be(mistake: str) -> None:
    changes, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=re.escape(said)):
        FinetuneSettings().but(**changes)


def test_plans_that_cannot_be() -> None:
    own, settings = estimator("sana"), settings_for("sana")
    with pytest.raises(UserError, match="Unknown stack 'blocks'"):
        own.estimate(settings, {"blocks": (0,)})
    with pytest.raises(UserError, match="No block is to be trained"):
        own.estimate(settings, {"transformer_blocks": ()})
    with pytest.raises(UserError, match="no linear layer that ends in to_z"):
        own.estimate(settings.but(targets=("to_z",)))
    with pytest.raises(UserError, match="is no model of diffusers"):
        estimate_memory(nn.Linear(2, 2))


def test_presets_of_pipelines_belong_to_presets() -> None:
    """Parameters of the encoders are those of the published checkpoints."""
    known = {name: components(name) for name in ("flux.1-dev", "sd3-medium", "sana-1.6b")}
    assert set(known) <= set(preset_names())
    assert components("llada-8b") == {}
    millions = {
        (name, part): weights_of(known[name][part].skeleton(), torch.bfloat16) / 2e6
        for name, part in (
            ("flux.1-dev", "text_encoder"), ("flux.1-dev", "vae"), ("sd3-medium", "text_encoder_2"),
            ("sana-1.6b", "vae"),
        )
    }  # fmt: skip
    expected = {"text_encoder": 123.06, "vae": 83.8, "text_encoder_2": 694.66}
    for part in ("text_encoder", "vae"):
        assert millions["flux.1-dev", part] == pytest.approx(expected[part], rel=0.01)
    assert millions["sd3-medium", "text_encoder_2"] == pytest.approx(694.66, rel=0.01)
    assert millions["sana-1.6b", "vae"] == pytest.approx(312, rel=0.02)


def test_what_is_known_of_a_pipelines_folder(tmp_path: Path) -> None:
    """Its text encoders' weights, and the scale of its autoencoder, which is encoded with on the device."""
    pipe = pipeline("flux")
    own = Estimator(str(save("flux", tmp_path / "flux")))
    estimate = own.estimate(FinetuneSettings(resolution=32, text_tokens=7))
    parts = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    assert estimate.text_encoders == {name: weights_of(part, torch.bfloat16) for name, part in parts.items()}
    assert own.size(estimate.settings).image == 32 // pipe.vae_scale_factor
    assert estimate.encoding.as_dict()["weights"] == weights_of(pipe.vae, torch.bfloat16)
    assert estimate.encoding.as_dict()["activations"] > 0


@pytest.mark.parametrize("script", ["memory_finetune", "gpu/flux_finetune_memory"])
def test_benchmarks_run(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """On a tiny model, without a GPU; what they print last is what they write."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    output = tmp_path / "result.json"
    if script == "memory_finetune":
        kept = (module.ALL, module.CHECKPOINTED, "half the blocks alone", "half, patches")
        monkeypatch.setattr(module, "VARIANTS", {name: module.VARIANTS[name] for name in kept})
        MODELS["pixart"]().save_pretrained(tmp_path / "small")
        arguments = ["--model", str(tmp_path / "small")]
    else:
        arguments = ["--tiny", "--warmup", "1", "--steps", "1", "--variant", "BlockSkip half, 256 px"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [path.name, *arguments, "-o", str(output)])
    module.main()
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    if script == "memory_finetune":
        (rows,) = result["models"].values()
        assert rows["half, patches"]["training"]["total"] < rows[module.ALL]["training"]["total"]
        assert "| half, patches | 3 | 256 |" in output.with_suffix(".md").read_text()
    else:
        (row,) = result["rows"].values()
        assert row["label"] == "measured"
        assert row["estimated_bytes"] == pytest.approx(
            row["peak_bytes"], rel=0.4
        )  # a FLUX on the CPU, mostly temporaries
        assert row["seconds_a_step"] > 0


def test_inspect_estimates_a_finetuning(skipwise: Any, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    MODELS["pixart"]().save_pretrained(folder)
    code, out, _ = skipwise("inspect", folder, "--finetune", "--blocks", "50%", "--set", "patch=256")
    assert code == 0
    last = len(MODELS["pixart"]().transformer_blocks) - 1
    assert f"(transformer_blocks {last - 2}-{last})" in " ".join(out.split())
    assert "making of residuals" in out
    code, out, _ = skipwise("inspect", folder, "--finetune", "--memory", "1GiB", "--set", "rank=4")
    assert code == 0
    assert "fits your 1 GiB card" in " ".join(out.split())
    for arguments, said in (
        (["--memory", "1GiB"], "add --finetune"),
        (["--finetune", "--memory", "1GiB", "--blocks", "2"], "Give either --blocks or --memory"),
        (["--finetune", "--memory", "0.1GiB"], "the nearest that is possible"),
        (["--finetune", "--set", "rnk=2"], "Did you mean 'rank'"),
    ):
        code, _, err = skipwise("inspect", folder, *arguments)
        assert code == 2
        assert said in err
        assert len(err.strip().splitlines()) == 1


def test_estimates_are_data() -> None:
    """Two estimates of the same are equal."""
    own = estimator("pixart")
    assert own.estimate(settings_for("pixart")) == own.estimate(settings_for("pixart"))
    assert isinstance(own.estimate(settings_for("pixart")), MemoryEstimate)
    assert own.size(settings_for("pixart", patch=128)) == Size(image=16, text=48)
