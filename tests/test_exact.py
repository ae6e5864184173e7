"""Exact speed: the samplers make the tokens of the plain loops with less work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.models.bidirectional import kept
from skipwise.plan import Phase, Plan
from skipwise.sampling import FAMILIES, Denoiser, Step, prediction
from skipwise.sampling.denoiser import denoising
from skipwise.sampling.prediction import Prediction
from tests.plain_samplers import PLAIN
from tests.tiny_models import ROWS, VOCABULARY

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


LLADA = [
    {},
    {"block_length": 4},
    {"block_length": 2, "steps": 4},
    {"steps": 24},
    {"temperature": 0.8, "block_length": 4, "steps": 4},
    {"remasking": "random", "steps": 4},
    {"threshold": 0.05},
    {"threshold": 0.04, "block_length": 4, "temperature": 0.5},
    {"cfg_scale": 0.7, "block_length": 4},
    {"cfg_scale": 0.7, "temperature": 0.6, "threshold": 0.1},
]
DREAM = [
    {"alg": alg, "temperature": temperature, "steps": steps, **more}
    for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")
    for temperature, steps, more in (
        (0.0, None, {}),
        (0.7, 5, {"top_p": 0.9, "top_k": 20}),
        (0.0, 19, {"alg_temp": 0.4}),
    )
]
MDLM = [
    {},
    {"steps": 7},
    {"steps": 12, "noise_dtype": "float32"},
    {"sampler": "ddpm", "steps": 9},
    {"sampler": "ddpm_cache", "steps": 40},
]
SETTINGS = [(name, s) for name, every in (("llada", LLADA), ("dream", DREAM), ("mdlm", MDLM)) for s in every]
PROMPTS = torch.tensor([[0, 0, 9, 10, 3], [4, 5, 6, 7, 8], [0, 0, 0, 0, 12], [13, 3, 14, 3, 15]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])


def phased(model: nn.Module, named: bool) -> Plan:
    (stack,) = find_contract(model).stacks
    middle = Phase(until=0.6, model="other") if named else Phase(until=0.6)
    phases = (Phase(until=0.3, skip={stack: (1,)}), middle, Phase(until=1.0, skip={stack: (0, 2)}))
    return Plan(model=find_contract(model).shape, phases=phases)


def both(name: str, s: dict[str, Any], model: nn.Module, plan: Plan | None = None, eos: int | None = None) -> Tensor:
    """What the sampler makes, after it was compared with its plain twin."""
    others = {"other": ROWS[name]()} if plan and any(phase.model for phase in plan.phases) else {}
    settings = {"gen_length": 8, "seed": 3, "eos_token_id": eos, **s}
    with denoising(model, plan, others) as denoiser:
        expected = PLAIN[name](denoiser, PROMPTS, PADDED, **settings)
    family = FAMILIES[name]
    with denoising(model, plan, others) as denoiser:
        found = family.decode(denoiser, PROMPTS, family.settings(**settings), PADDED)
    assert torch.equal(found, expected)
    return found


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_tokens_are_those_of_the_plain_loop(name: str, settings: dict[str, Any]) -> None:
    """Padded rows with and without masks in the prompt: whole, under a static plan, one of phases, and of models."""
    model = ROWS[name]()
    (stack,) = find_contract(model).stacks
    static = Plan.static(find_contract(model).shape, {stack: [1]})
    results = [both(name, settings, model, plan) for plan in (None, static, phased(model, False), phased(model, True))]
    assert not torch.equal(results[0], results[1]), "the plan is felt"


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_rows_that_have_ended_leave(name: str, settings: dict[str, Any]) -> None:
    """The tokens of the others are what they would be, also under phases; and fewer rows are run."""
    model = ROWS[name]()
    free = both(name, settings, model)
    counts = torch.bincount(free[:, 5:].flatten(), minlength=VOCABULARY)
    for eos in counts.argsort(descending=True)[:3].tolist():  # as if these ended texts
        both(name, settings, model, None, eos)
        both(name, settings, model, phased(model, False), eos)
