"""A plan is a file: it round-trips, refuses what cannot be, and says so in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import skipwise as sw
from skipwise.plan import ModelShape, Phase, Plan, Provenance

SHAPE = ModelShape(architecture="LLaDAModelLM", stacks={"model.layers": 32}, hidden_size=4096)
PHASES = (
    Phase(until=0.125, skip={"model.layers": (3, 4, 5)}),
    Phase(until=0.875),
    Phase(until=1.0, model="light"),
)


def plan() -> Plan:
    made_by = Provenance(method="similarity", settings={"skip": 3}, calibration={"tokens": 4096})
    return Plan(model=SHAPE, phases=PHASES, train={"model.layers": (6, 7)}, made_by=made_by)


def test_round_trip(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "deep" / "plan.json")
    assert Plan.load(path) == plan()
    assert json.loads(path.read_text())["format"] == "skipwise-plan/1"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"], "a temporary file was left behind"


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan().phases = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0), (0.124, 0), (0.125, 1), (0.5, 1), (0.875, 2), (0.999, 2), (1.0, 2)]
)
def test_phase_at(progress: float, expected: int) -> None:
    assert plan().phase_at(progress) is plan().phases[expected] or plan().phase_at(progress) == PHASES[expected]


def test_describe() -> None:
    assert Plan.static(SHAPE, {"model.layers": [4, 3]}).describe() == "skip model.layers: 3, 4"
    assert Plan.static(SHAPE, {}).describe() == "run all blocks"
    text = "until 0.125 skip model.layers: 3, 4, 5 | until 0.875 run all blocks | until 1 run light"
    assert plan().describe() == text


def change(**changes: Any) -> dict[str, Any]:
    return plan().model_dump(mode="json") | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            change(fases=[]),
            r"Unknown key 'fases'. Did you mean 'phases'\? Available: adapter, format, made_by, model, phases, "
            "stand_ins, train",
        ),
        (
            change(phases=[{"until": 1.0, "skipp": {}}]),
            r"Unknown key 'phases.0.skipp'. .*Available: model, skip, stand_in, until",
        ),
        (change(phases=[{"until": 0.5}]), "phases end at \\[0.5\\]; they must rise and the last must end at 1.0"),
        (change(phases=[{"until": 0.5}, {"until": 0.5}, {"until": 1.0}]), "they must rise"),
        (change(phases=[]), "phases end at \\[\\]"),
        (change(phases=[{"until": 1.5}]), "phases.0.until: .*less than or equal to 1 \\(got 1.5\\)"),
        (
            change(phases=[{"skip": {"model.layers": [32]}}]),
            "Block 32 is not in model.layers, which has blocks 0 to 31",
        ),
        (change(phases=[{"skip": {"model.layers": [-1]}}]), "Block -1 is not in"),
        (change(phases=[{"skip": {"model.layers": [3, 3]}}]), "must be listed once each, in ascending order"),
        (change(phases=[{"skip": {"model.layer": [3]}}]), "Unknown stack 'model.layer'. Did you mean 'model.layers'"),
        (change(train={"nowhere": [1]}), "Unknown stack 'nowhere'"),
        (change(format="skipwise-plan/2"), "is not a skipwise-plan/1 file \\(its format is 'skipwise-plan/2'\\)"),
        ([1, 2], "is not a skipwise-plan/1 file"),
    ],
)
def test_what_cannot_be_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(sw.UserError, match=message) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe\x00", b""])
def test_unreadable(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(sw.UserError, match="cannot be read as a plan"):
        Plan.load(path)
    with pytest.raises(sw.UserError, match="There is no plan at"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("field", "value"), [("architecture", "Other"), ("hidden_size", 64), ("stacks", {"model.layers": 30})]
)
def test_another_model(field: str, value: Any) -> None:
    other = SHAPE.model_copy(update={field: value})
    with pytest.raises(sw.UserError, match=f"made for a model with {field}"):
        plan().check_model(other)
    plan().check_model(SHAPE)


def test_nothing_is_written_where_it_cannot_be(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(sw.UserError, match="Cannot write"):
        plan().save(blocker / "plan.json")
    assert blocker.read_text() == "in the way"


def test_a_companion_is_a_bare_name(tmp_path: Path) -> None:
    """A plan cannot point at a file elsewhere."""
    tensors = {"0/model.layers/3": torch.zeros(4096)}
    path = Plan.static(SHAPE, {"model.layers": [3]}).with_stand_ins("constant", tensors).save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    for name in ("../plan.stand-ins.safetensors", "/etc/passwd", "a/b"):
        content["stand_ins"]["name"] = name
        path.write_text(json.dumps(content))
        with pytest.raises(sw.UserError, match="a bare name is legal, a path is not"):
            Plan.load(path).stand_in_tensors()
