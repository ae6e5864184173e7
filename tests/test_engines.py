"""What an export says of other engines, what it adds for them, and which plans it refuses or moves."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import skipwise as sw
from skipwise import cli
from skipwise.blocks import find_contract
from skipwise.exporting.engines import ENGINES, additions, verdict, wrongs
from skipwise.exporting.patterns import Pattern
from tests.tiny_models import DECODER, _lm

S, F = "sliding_attention", "full_attention"
EIGHT = DECODER | {"num_hidden_layers": 8, "head_dim": 8}
MIXED = {"sliding_window": 8, "layer_types": [S, S, S, F] * 2}
THETA = {"rope_type": "default", "rope_theta": 500.0}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 16}
LLAMA3 = SCALING | {"rope_theta": 500.0}
GEMMA3 = {"rope_parameters": {S: THETA | {"rope_theta": 300.0}, F: THETA}, "query_pre_attn_scalar": 8}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", EIGHT | MIXED | GEMMA3),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", EIGHT | MIXED | {"rope_parameters": THETA}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", EIGHT | {"no_rope_layers": [1, 1, 1, 0] * 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", EIGHT | {"rope_parameters": THETA}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", EIGHT | {"rope_parameters": LLAMA3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", EIGHT | {"rope_parameters": THETA}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", EIGHT | MIXED),
}
IDS = torch.arange(3, 27)[None]


def saved(name: str, at: Path) -> Any:
    model: Any = _lm(ROWS[name][0], ROWS[name][1], **ROWS[name][2])
    model.save_pretrained(at)
    return model


def plan_of(model: Any, *skipped: int) -> sw.Plan:
    return sw.Plan.static(find_contract(model).shape, {"model.layers": skipped})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def stock(at: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(at).eval()


def config_of(at: Path) -> dict[str, Any]:
    return json.loads((at / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "skipped", "more"),
    [
        ("gemma3", (0, 4), {"rope_theta": 500.0, "rope_local_base_freq": 300.0, "sliding_window_pattern": 3}),
        ("cohere2", (1, 6), {"rope_theta": 500.0, "sliding_window_pattern": 3}),
        ("smollm3", (1, 2), {"rope_theta": 2000000.0}),
        ("qwen2", (2, 5), {"rope_theta": 500.0}),
        (
            "llama",
            (2, 5),
            {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        ("qwen3", (2, 5), {}),
    ],
)
def test_what_mlx_lm_needs_changes_nothing_for_transformers(
    name: str, skipped: tuple[int, ...], more: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(name, tmp_path / "source")
    plan = plan_of(model, *skipped)
    target = sw.export(plan, tmp_path / "source", tmp_path / "target", engine="mlx-lm")
    known = config_of(tmp_path / "source")
    assert {key: value for key, value in config_of(target).items() if key not in known} == more
    with sw.skip(model, plan):
        assert torch.equal(logits(stock(target)), logits(model))


def test_a_plan_that_moves_kinds_of_layers(tmp_path: Path) -> None:
    """Refused with the nearest plan that keeps them, or moved to it on demand."""
    model = saved("gemma3", tmp_path / "source")
    plan = plan_of(model, 1, 2)
    message = r"mlx-lm 0\.32\.2 takes layer_types of gemma3_text by position.*without blocks 1, 2 .* skips 1, 3 "
    with pytest.raises(sw.UserError, match=message) as caught:
        sw.export(plan, tmp_path / "source", tmp_path / "target", engine="mlx-lm")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()
    target = sw.export(plan, tmp_path / "source", tmp_path / "target", engine="mlx-lm", nearest=True)
    moved = sw.Plan.load(target / "skipwise-plan.json")
    assert moved.phases[0].skip == {"model.layers": (1, 3)}
    assert moved.made_by.settings == {"moved for": "mlx-lm 0.32.2", "skipped before": {"model.layers": [1, 2]}}
    with sw.skip(model, moved):
        assert torch.equal(logits(stock(target)), logits(model))
    assert config_of(target)["layer_types"] == [S] * 5 + [F]
    kept = sw.export(plan_of(model, 0, 4), tmp_path / "source", tmp_path / "kept", engine="mlx-lm", nearest=True)
    assert sw.Plan.load(kept / "skipwise-plan.json").made_by.settings == {}
    with pytest.raises(sw.UserError, match=r"without blocks 3, 7 .* skips"):
        sw.export(plan_of(model, 3, 7), tmp_path / "source", tmp_path / "other", engine="mlx-lm")


def test_what_an_engine_cannot_run_is_refused(tmp_path: Path) -> None:
    model = saved("olmo3", tmp_path / "olmo3")
    with pytest.raises(sw.UserError, match=r"mlx-lm 0.32.2 fails unless layers of both kinds are left"):
        sw.export(plan_of(model, 3, 7), tmp_path / "olmo3", tmp_path / "target", engine="mlx-lm")
    with pytest.raises(sw.UserError, match=r"ctranslate2 4.8.5 has no conversion for this family"):
        sw.export(plan_of(model, 1, 5), tmp_path / "olmo3", tmp_path / "target", engine="ctranslate2")
    model = saved("llama", tmp_path / "llama")
    with pytest.raises(sw.UserError, match=r"ctranslate2 4.8.5 computes rope scaling of type llama3 otherwise"):
        sw.export(plan_of(model, 1), tmp_path / "llama", tmp_path / "target", engine="ctranslate2")
    with pytest.raises(sw.UserError, match=r"Unknown engine 'mlx'. Did you mean 'mlx-lm'"):
        sw.export(plan_of(model, 1), tmp_path / "llama", tmp_path / "target", engine="mlx")
    assert not (tmp_path / "target").exists()


def test_the_card_says_what_engines_make_of_it(tmp_path: Path) -> None:
    model = saved("gemma3", tmp_path / "source")
    card = (sw.export(plan_of(model, 1, 2), tmp_path / "source", tmp_path / "a") / "README.md").read_text()
    told = card.split("## In other engines\n")[1]
    assert "- mlx-lm 0.32.2: takes layer_types by position, and these layers do not follow its rule" in told
    assert "- ctranslate2 4.8.5: takes rope bases of its own, whatever the config says." in told
    assert "- openvino 2026.4.1: the logits are transformers' own." in told
    card = (
        sw.export(plan_of(model, 0, 4), tmp_path / "source", tmp_path / "b", engine="mlx-lm") / "README.md"
    ).read_text()
    assert "- mlx-lm 0.32.2: the logits are transformers' own." in card


def test_windows_that_an_engine_ignores() -> None:
    config = {"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 4096, "use_sliding_window": True}
    assert verdict("mlx-lm", config).startswith("right for texts of up to 4096 tokens")
    assert verdict("mlx-lm", config | {"use_sliding_window": False}) == "the logits are transformers' own."
    assert not wrongs("mlx-lm", config)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_said_of_what_was_not_measured(engine: str) -> None:
    config = {"model_type": "hyena", "rope_parameters": THETA}
    assert verdict(engine, config).startswith("not measured for this family")
    assert additions(engine, config) == {}


@pytest.mark.parametrize("setting_key", ["", "sliding_window_pattern"])
@pytest.mark.parametrize("length", [5, 8])
def test_the_nearest_plan_is_the_nearest(length: int, setting_key: str) -> None:
    """Against all choices of as many blocks."""
    pattern = Pattern("layer_types", F, 3, setting_key)
    kinds = [(number + 1) % 4 == 0 or number == 1 for number in range(length)]
    for count in range(1, length):
        choices = list(itertools.combinations(range(length), count))
        periods = range(1, count + 1) if setting_key else [3]
        right = [c for c in choices if any(pattern.fits([kinds[i] for i in c], p) for p in periods)]
        for kept in choices:
            found = pattern.nearest(kinds, kept)
            assert (found is None) == (not right)
            if found is not None:
                assert tuple(found) in right
                assert len(set(found) - set(kept)) == min(len(set(c) - set(kept)) for c in right)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(saved("gemma3", tmp_path / "source"), 1, 2).save(tmp_path / "plan.json")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["skipwise", "export", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    capsys.readouterr()
    given = (tmp_path / "plan.json", tmp_path / "source", tmp_path / "target", "--for", "mlx-lm")
    assert run(*given) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(*given, "--nearest") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "mlx-lm 0.32.2: the logits are transformers' own." in told
    assert "moved for mlx-lm; it was: " in told
    assert run(*given[:2], tmp_path / "other", "--nearest") == 2
    assert "name the engine too" in capsys.readouterr().err
