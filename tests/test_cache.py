"""Caches for block-wise decoding: where they are exact, what they run, and what they refuse."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.plan import Phase, Plan
from skipwise.blocks import find_contract
from skipwise.sampling import agreement
from skipwise.sampling.cache import KINDS, Kind, Windows
from tests.tiny_models import ROWS

MASK, EOS = 3, 7
LENGTH, PROMPT = 18, 6
MODELS = ("llada", "dream")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return ROWS[request.param]()


def plan_for(model: nn.Module, *skips: tuple[int, ...]) -> Plan:
    """A phase for each set of skipped blocks, all of the same share of the trajectory."""
    contract = find_contract(model)
    (stack,) = contract.stacks
    phases = tuple(Phase(until=(n + 1) / len(skips), skip={stack: numbers}) for n, numbers in enumerate(skips))
    return Plan(model=contract.shape, phases=phases)


def prompts(rows: int = 3, padding: bool = True) -> tuple[Tensor, Tensor | None]:
    """(rows, PROMPT) tokens, the r-th row with r of padding when there is any."""
    torch.manual_seed(1)
    tokens = torch.randint(8, 60, (rows, PROMPT))
    if not padding:
        return tokens, None
    mask = (torch.arange(PROMPT) >= torch.arange(rows)[:, None]).long()
    return tokens.where(mask.bool(), 0), mask


def half_written(padding: bool) -> tuple[Tensor, Tensor | None]:
    """Sequences (rows, LENGTH) with the block of positions 10 to 14 half masked and all masks behind it."""
    tokens, mask = prompts(padding=padding)
    text = torch.randint(8, 60, (len(tokens), LENGTH - PROMPT))
    text[:, 8:], text[:, 4:8:2] = MASK, MASK
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(text)], dim=1)
    return torch.cat([tokens, text], dim=1), mask


@torch.no_grad()
def run(model: nn.Module, windows: Windows, tokens: Tensor, mask: Tensor | None, before: int) -> Tensor:
    """Logits of a window as the cache asks for it."""
    stored = windows.next(tokens.shape[1], None, before)
    return model(input_ids=tokens[:, stored.window], attention_mask=mask, past_key_values=stored).logits


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", ((), (1, 2)))
def test_a_window_right_after_a_refresh_gives_the_logits_of_the_whole(
    model: nn.Module, kind: Kind, padding: bool, skipped: tuple[int, ...]
) -> None:
    tokens, mask = half_written(padding)
    before = 1 if model.family == "dream" else 0
    with sw.skip(model, plan_for(model, skipped)):
        windows = Windows(kind, PROMPT)
        windows.begin(slice(10, 14))
        whole = run(model, windows, tokens, mask, before)
        part = run(model, windows, tokens, mask, before)
        window = windows.stored.window
    assert window == slice(10 - before, LENGTH if kind == "prefix" else 14)
    kept = whole[:, window][:, before:]
    torch.testing.assert_close(part[:, before:], kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(part[:, before:].argmax(-1), kept.argmax(-1))
