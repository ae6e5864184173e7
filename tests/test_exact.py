"""Exact speed: the samplers make the tokens of the plain loops with less work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipwise.models.bidirectional import kept
from skipwise.sampling import Denoiser, Step, prediction
from skipwise.sampling.prediction import Prediction
from tests.tiny_models import ROWS, VOCABULARY

FAMILIES = ("llada", "dream", "mdlm")
IDS = torch.tensor([[0, 0, 9, 3, 11], [4, 3, 6, 7, 3]])
PRESENT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
WHERE = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()
NOWHERE = torch.zeros_like(WHERE)


def step(ids: Tensor) -> Step:
    return Step(0, 1, ids, 0.0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mask", [None, PRESENT, PRESENT.bool()])
def test_logits_where_they_are_wanted(name: str, mask: Tensor | None) -> None:
    """Logits of some positions are those positions' rows of all logits, and the accounts know how many were made."""
    model, denoiser = ROWS[name](), Denoiser(ROWS[name]())
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=mask).logits
        for where in (WHERE, WHERE.nonzero(as_tuple=True), NOWHERE):
            some = denoiser(step(IDS), IDS, mask, where)
            torch.testing.assert_close(some, whole[where], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(denoiser(step(IDS), IDS, mask), whole)
    assert [forward.predicted for forward in denoiser.forwards] == [5, 5, 0, None]


class Bare(nn.Module):
    """A model that can only be run whole."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ROWS["llada"]()
        self.config = self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_without_states_is_run_whole() -> None:
    denoiser = Denoiser(Bare())
    with torch.no_grad():
        assert torch.equal(denoiser(step(IDS), IDS, None, WHERE), Bare()(IDS).logits[WHERE])
    assert denoiser.forwards[0].predicted is None


@pytest.mark.parametrize("where", [2, torch.tensor([0, 3]), torch.tensor([[0, 3], [2, 1]]), WHERE, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_to_keep(name: str, where: Any) -> None:
    """transformers' own convention, in all its forms."""
    model = ROWS[name]()
    with torch.no_grad():
        whole, some = model(IDS).logits, model(IDS, logits_to_keep=where).logits
    torch.testing.assert_close(some, kept(whole, where), rtol=1e-5, atol=1e-5)


def test_logits_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a chunk, what is read is the same, and no chunk is larger than allowed."""
    torch.manual_seed(0)
    states, head = torch.randn(7, 5), nn.Linear(5, VOCABULARY)
    sizes: list[int] = []

    def best(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        sizes.append(logits.numel() * 4)
        return logits.argmax(-1), logits.amax(-1)

    with torch.no_grad():
        whole = head(states)
        for limit in (1, 4 * VOCABULARY, 3 * 4 * VOCABULARY, 2**20):
            monkeypatch.setattr(prediction, "CHUNK_BYTES", limit)
            chosen, value = Prediction(states, head, VOCABULARY).read(best)
            assert torch.equal(chosen, whole.argmax(-1))
            torch.testing.assert_close(value, whole.amax(-1))
            assert max(sizes) <= max(limit, 4 * VOCABULARY)
            sizes.clear()
        (nothing, _) = Prediction(states[:0], head, VOCABULARY).read(best)
    assert nothing.shape == (0,)


def test_guidance_is_of_pairs() -> None:
    torch.manual_seed(0)
    states, head = torch.randn(6, 5), nn.Linear(5, VOCABULARY)
    with torch.no_grad():
        first, second = head(states).chunk(2)
        guided = Prediction(states, head, VOCABULARY).guided(lambda z, u: u + 3 * (z - u))
        torch.testing.assert_close(guided.logits(), second + 3 * (first - second))
        (read,) = guided.read(lambda logits, part: (logits,))
        torch.testing.assert_close(read, guided.logits())
