"""What is kept between the forwards of a generation never outlives what it was made of."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.models import lean
from skipwise.models.workspace import Workspace
from skipwise.plan import Phase, Plan
from skipwise.sampling import Step
from skipwise.sampling.denoiser import Denoiser
from tests.tiny_models import ROWS

PROMPTS = torch.tensor([[9, 10, 11], [4, 5, 6]])
NAMES = ("llada", "dream", "mdlm")
GIVEN: dict[str, Any] = {"gen_length": 8, "stop_at_eos": False}


@pytest.fixture
def unpriced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward but those that decode."""
    monkeypatch.setattr(sys.modules["skipwise.sampling.generate"], "account", lambda denoiser: {})


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return ROWS[request.param]()


def layers_of(model: nn.Module) -> Any:
    contract = find_contract(model)
    return model.get_submodule(contract.main_stack)


def anew(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Tensor:
    """What is decoded with nothing kept."""
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "_is_overheard", lambda *_: True)
        return sw.generate(model, PROMPTS, **GIVEN, **given).sequences


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    init = Workspace.__init__
    monkeypatch.setattr(Workspace, "__init__", lambda self: (made.append(1), init(self))[1])
    return made


def test_one_for_a_generation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, made = anew(model, monkeypatch), counted(monkeypatch)
    assert torch.equal(sw.generate(model, PROMPTS, **GIVEN).sequences, expected)
    assert len(made) == 1


def test_one_for_a_phase(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = find_contract(model)
    phases = [Phase(until=until, skip={contract.main_stack: skip}) for until, skip in ((0.5, (0, 3)), (1.0, (1,)))]
    plan = Plan(model=contract.shape, phases=tuple(phases))
    expected, made = anew(model, monkeypatch, plan=plan), counted(monkeypatch)
    assert torch.equal(sw.generate(model, PROMPTS, plan=plan, **GIVEN).sequences, expected)
    assert len(made) == 2


def test_changed_weights_are_used(model: Any) -> None:
    """Every parameter, between two generations."""
    first = sw.generate(model, PROMPTS, **GIVEN).sequences
    other = ROWS[model.family]()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.mul_(1.5).add_(0.05)
            theirs.copy_(mine)
    second = sw.generate(model, PROMPTS, **GIVEN).sequences
    assert torch.equal(second, sw.generate(other, PROMPTS, **GIVEN).sequences)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("unpriced")
def test_who_is_told_of_steps_may_change_the_model(model: Any) -> None:
    """A hook on the inside of a block that comes in the middle is called from then on."""
    steps: list[int] = []
    heard: list[int] = []

    def on_step(step: Step) -> None:
        steps.append(step.index)
        if len(steps) == 4:
            layers_of(model)[1].mlp.register_forward_hook(lambda *_: heard.append(1))

    sw.generate(model, PROMPTS, on_step=on_step, **GIVEN)
    assert len(heard) == len(steps) - 3 > 1


@pytest.mark.usefixtures("unpriced")
def test_so_may_a_hook_on_the_model(model: Any) -> None:
    calls: list[int] = []
    heard: list[int] = []
    first = layers_of(model)[0].mlp

    def hook(module: nn.Module, args: tuple) -> None:
        calls.append(1)
        if len(calls) == 2:
            first.register_forward_hook(lambda *_: heard.append(1))

    model.register_forward_pre_hook(hook)
    sw.generate(model, PROMPTS, **GIVEN)
    assert len(heard) == len(calls) - 1 > 1


@pytest.mark.usefixtures("unpriced")
@pytest.mark.parametrize("part", ["sigma_map", "output_layer"])
def test_parts_with_hooks_are_called_at_every_step(part: str) -> None:
    model: Any = ROWS["mdlm"]()
    heard: list[int] = []
    inside = model.sigma_map.mlp if part == "sigma_map" else model.output_layer.adaLN_modulation
    inside.register_forward_hook(lambda *_: heard.append(1))
    sw.generate(model, PROMPTS, **GIVEN)
    assert len(heard) == 8


def test_a_model_that_is_told_the_time_keeps_no_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ROWS["mdlm"]()
    model.config.time_conditioning = True
    for block in model.blocks:
        nn.init.normal_(block.adaLN_modulation.weight, std=0.5)
    expected = anew(model, monkeypatch)
    assert torch.equal(sw.generate(model, PROMPTS, **GIVEN).sequences, expected)
    space = Workspace()
    with torch.no_grad():
        states = [model.states(PROMPTS, sigma=torch.full((2,), sigma), space=space) for sigma in (0.1, 3.0)]
    assert not torch.equal(*states)
    assert space.known_flops == 0


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_tables_of_all_heads(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, written out or not."""
    x = torch.randn(2, 5, heads, 8)
    table = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    small = lean.signed(table, 4)
    monkeypatch.setattr(lean, "SPREAD", 0)
    large = lean.signed(table, 4)
    assert (small[0].shape[2], large[0].shape[2]) == (4, 1)
    assert torch.equal(lean._rotated(x, small), lean._rotated(x, large))
