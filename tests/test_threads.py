"""A generation takes the threads that it is worth, and gives back what it found."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.sampling import Step, threads
from tests.tiny_models import ROWS

PROMPTS = torch.tensor([[9, 10, 11], [4, 5, 6]])


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("grain", "expected"), [(2_000_000, 1), (1, 3)])
def test_threads_of_a_generation(grain: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "GRAIN", grain)
    model: Any = ROWS["llada"]()
    seen: list[int] = []

    def on_step(step: Step) -> None:
        seen.append(torch.get_num_threads())

    sw.generate(model, PROMPTS, gen_length=4, on_step=on_step, stop_at_eos=False)
    assert set(seen) == {expected}
    assert torch.get_num_threads() == 3


def test_they_are_back_after_a_mistake() -> None:
    model: Any = ROWS["llada"]()

    def on_step(step: Step) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sw.generate(model, PROMPTS, gen_length=4, on_step=on_step)
    assert torch.get_num_threads() == 3


def test_more_tokens_are_worth_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ROWS["llada"]()
    middle = sorted(part.numel() for part in model.parameters() if part.ndim == 2)
    monkeypatch.setattr(threads, "GRAIN", 10 * middle[(len(middle) - 1) // 2])
    for tokens, expected in ((1, 1), (19, 1), (20, 2), (1000, 3)):
        with threads.worthwhile_threads(model, tokens):
            assert torch.get_num_threads() == expected


def test_other_devices_are_let_be() -> None:
    with threads.worthwhile_threads(ROWS["llada"]().to("meta"), 1):
        assert torch.get_num_threads() == 3
