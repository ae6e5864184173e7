"""Numbers that are not finite are refused, and the block that makes them is named, wherever a model is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import skipwise as sw
from skipwise.calibration import Calibration
from skipwise.errors import UserError
from skipwise.evaluation import evaluate
from skipwise.finite import Watch, is_finite
from skipwise.healing import HealSettings, heal
from skipwise.plan import Plan

BROKEN = "block 3 of model.layers has weights that are not finite"
OVERFLOW = "block 5 of model.layers overflows in float16; load it in bfloat16 or float32"
TEXTS = [("a12+34=", "46"), ("a1+1=", "2")]


@pytest.fixture
def broken() -> tuple[nn.Module, Any]:
    """tiny-dllm with a weight that is NaN."""
    model, tokenizer = sw.load("tiny-dllm")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    return model, tokenizer


@pytest.fixture
def overflowing() -> tuple[nn.Module, Any]:
    """tiny-dllm in float16, with a block whose states are too large for it."""
    model, tokenizer = sw.load("tiny-dllm", dtype="float16")
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            getattr(model.model.layers[5].mlp, name).weight.mul_(2000)
    return model, tokenizer


SETTINGS: dict[str, dict[str, Any]] = {
    "quota": {},
    "threshold": {"threshold": 0.9},
    "random": {"remasking": "random"},
    "hot": {"temperature": 1.0},
    "compat": {"compat": "llada"},
    "dream": {"family": "dream"},
    "dream by entropy": {"family": "dream", "alg": "entropy", "temperature": 0.5},
    "dream's own": {"family": "dream", "alg": "entropy", "compat": "dream"},
    "mdlm": {"family": "mdlm"},
    "mdlm by steps": {"family": "mdlm", "sampler": "ddpm_cache", "steps": 4},
    **{f"{kind} cache": {"cache": kind, "threshold": 0.9} for kind in ("prefix", "dual", "delayed", "interval")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_ends_and_names_the_block(name: str, broken: tuple[nn.Module, Any]) -> None:
    model, tokenizer = broken
    ids = tokenizer(["a1+1="], return_tensors="pt")["input_ids"]
    with pytest.raises(UserError, match=BROKEN):
        sw.generate(model, ids, gen_length=4, **SETTINGS[name])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_autoregressive_model_is_named_too(temperature: float) -> None:
    model, tokenizer = sw.load("tiny-ar")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=BROKEN):
        sw.generate(model, tokenizer(["a1+1="])["input_ids"], gen_length=4, temperature=temperature)


def test_what_runs_a_model_names_the_block(broken: tuple[nn.Module, Any], overflowing: Any, tmp_path: Path) -> None:
    for (model, tokenizer), match in ((broken, BROKEN), (overflowing, OVERFLOW)):
        calibration = Calibration.of(model, tokenizer, TEXTS)
        plan = Plan.static(sw.find_contract(model).shape, {"model.layers": [7]})
        with pytest.raises(UserError, match=match):
            sw.analyze(model, tokenizer, TEXTS, max_steps=1, noise_levels=1)
        whole, tokens = sw.load("tiny-dllm")
        analysis = sw.analyze(whole, tokens, TEXTS, max_steps=1, noise_levels=1)
        with pytest.raises(UserError, match=match):
            sw.make_plan(analysis, method="greedy", skip=1, calibration=calibration)
        if match is BROKEN:  # training in float16 is another matter
            with pytest.raises(UserError, match=match):
                heal(plan, calibration, tmp_path / "healed.json", HealSettings(steps=1))
            assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match=match):
            evaluate(model, tokenizer, ["sort"], examples=2)


def test_a_rate_that_leads_nowhere_writes_no_adapter(tmp_path: Path) -> None:
    model, tokenizer = sw.load("tiny-dllm")
    plan = Plan.static(sw.find_contract(model).shape, {"model.layers": [7]})
    settings = HealSettings(steps=4, learning_rate=1e30)
    with pytest.raises(UserError, match="not finite"):
        heal(plan, Calibration.of(model, tokenizer, TEXTS), tmp_path / "healed.json", settings)
    assert not list(tmp_path.iterdir())


def test_an_analysis_of_nan_is_refused(tmp_path: Path) -> None:
    model, tokenizer = sw.load("tiny-dllm")
    folder = sw.analyze(model, tokenizer, TEXTS, max_steps=1, noise_levels=1).save(tmp_path / "analysis")
    path = folder / "analysis.safetensors"
    tensors = load_file(path)
    tensors["model.layers/similarity"][2, 3] = float("nan")
    facts = (folder / "analysis.json").read_text()
    total = facts.split('"sum": "')[1].split('"')[0]
    save_file(tensors, path, {"sum": total})
    with pytest.raises(UserError, match=r"not finite, in model\.layers/similarity"):
        sw.Analysis.load(folder)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"is not what analysis\.json was written with"):
        sw.Analysis.load(folder)


def test_is_finite() -> None:
    assert is_finite(torch.tensor([1e38, 1e38, 1e38]))  # whose sum is not
    assert is_finite(torch.tensor([1, 2]))
    assert not is_finite(torch.tensor([1.0, float("-inf")]))
    watch = Watch()
    assert watch.fine(torch.device("cpu"))
    watch.add(torch.tensor([0.0, float("-inf")]))  # a token that cannot be
    assert watch.fine(torch.device("cpu"))
    watch.add(torch.tensor([float("nan"), 0.0]))
    watch.add(torch.tensor([0.0]))
    assert not watch.fine(torch.device("cpu"))


@pytest.mark.parametrize("name", [name for name in SETTINGS if "own" not in name and name != "compat"])
def test_a_head_that_is_not_finite_ends_it_too(name: str) -> None:
    """No state shows it; the blocks are not to blame."""
    model, tokenizer = sw.load("tiny-dllm")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    ids = tokenizer(["a1+1="], return_tensors="pt")["input_ids"]
    with pytest.raises(UserError, match="what is made of them is not"):
        sw.generate(model, ids, gen_length=4, **SETTINGS[name])


def test_a_bin_without_texts_is_no_fault(tmp_path: Path) -> None:
    model, tokenizer = sw.load("tiny-dllm")
    analysis = sw.analyze(model, tokenizer, TEXTS, max_steps=1, noise_levels=2)
    analysis.tensors["model.layers/noise_similarity"][1] = float("nan")
    again = sw.Analysis.load(analysis.save(tmp_path))
    assert again.tensors["model.layers/noise_similarity"][1].isnan().all()
    analysis.tensors["model.layers/noise_similarity"][1] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        sw.Analysis.load(analysis.save(tmp_path))
