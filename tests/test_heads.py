"""A large head by a packed weight: the same logits, of the weight as it is now, and nobody's hook goes unheard."""

import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import skipwise as sw
from skipwise.models import heads, linear
from skipwise.models.heads import prepared
from skipwise.sampling import Step
from tests.tiny_models import ROWS

PROMPTS = torch.tensor([[9, 10, 11], [4, 5, 6]])
pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is packed, whatever the machine."""
    monkeypatch.setattr(linear, "PREFERRED", True)
    monkeypatch.setattr(heads, "LARGE", 0)
    monkeypatch.setattr(heads, "SHARE", 1000)


def is_packed(head: nn.Module) -> bool:
    return head in heads._packed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@torch.no_grad()
def test_logits(bias: bool, rows: int) -> None:
    head, x = nn.Linear(24, 100, bias), torch.randn(rows, 24)
    logits = prepared(head, head)(x)
    assert is_packed(head)
    torch.testing.assert_close(logits, head(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_changed_weight_is_noticed() -> None:
    """Even where torch counts no new version of it."""
    head, x = nn.Linear(24, 100), torch.randn(3, 24)
    first = heads._packed
    prepared(head, head)
    kept = first[head][0]
    prepared(head, head)
    assert first[head][0] is kept, "it is packed once"
    version = head.weight._version
    head.weight.data[7] += 0.01
    head.bias.data[3] += 1
    assert head.weight._version == version
    torch.testing.assert_close(prepared(head, head)(x), head(x), rtol=1e-5, atol=1e-5)
    assert first[head][0] is not kept


@torch.no_grad()
def test_it_goes_with_its_module() -> None:
    head = nn.Linear(24, 100)
    use = prepared(head, head)
    before = len(heads._packed)
    del head, use
    gc.collect()
    assert len(heads._packed) == before - 1


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, half precision, hooks and adapters; heads that are small, in bytes or beside their model."""
    head = nn.Linear(24, 100)
    prepared(head, head)
    with torch.no_grad():
        prepared(half := nn.Linear(24, 100).bfloat16(), half)
        hooked = nn.Linear(24, 100)
        hooked.register_forward_hook(lambda *call: None)
        prepared(hooked, hooked)
        config = LoraConfig(target_modules=["0"], init_lora_weights=False)
        adapted: Any = inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 100)))
        x = torch.randn(2, 24)
        assert torch.equal(prepared(adapted[0], adapted)(x), adapted(x))
        monkeypatch.setattr(heads, "SHARE", 2)
        prepared(little := nn.Linear(24, 100), nn.Linear(100, 100))
        monkeypatch.setattr(heads, "LARGE", 2**25)
        prepared(small := nn.Linear(24, 100), small)
    assert not any(map(is_packed, (head, half, hooked, adapted[0], little, small)))


@pytest.mark.parametrize("name", ["llada", "dream", "mdlm"])
def test_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ROWS[name]()
    found = sw.generate(model, PROMPTS, gen_length=8, steps=4, stop_at_eos=False)
    assert is_packed(model.head)
    with torch.no_grad():
        model.head.weight.data.copy_(model.head.weight.data.roll(1, 0))
    changed = sw.generate(model, PROMPTS, gen_length=8, steps=4, stop_at_eos=False)
    monkeypatch.setattr(linear, "PREFERRED", False)
    plain = sw.generate(model, PROMPTS, gen_length=8, steps=4, stop_at_eos=False)
    assert torch.equal(changed.sequences, plain.sequences)
    assert not torch.equal(changed.sequences, found.sequences)


def test_who_is_told_of_steps_may_change_the_head() -> None:
    """A hook that comes in the middle of a generation is called from then on."""
    model: Any = ROWS["llada"]()
    heard: list[int] = []

    def on_step(step: Step) -> None:
        if step.index == 2:
            model.lm_head.register_forward_hook(lambda module, args, out: heard.append(len(out)))

    sw.generate(model, PROMPTS, gen_length=4, steps=4, on_step=on_step, stop_at_eos=False)
    assert heard[:2] == [4, 2], "masks of two rows in the last two steps"
