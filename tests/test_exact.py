"""Exact speed: the samplers make the tokens of the plain loops with less work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.models import head_of
from skipwise.models.bidirectional import kept
from skipwise.plan import Phase, Plan
from skipwise.sampling import FAMILIES, Denoiser, Step, noise, prediction
from skipwise.sampling.cache import KINDS
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
    assert [forward.predicted for forward in denoiser.forwards] == [5, 5, 0, 10]


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
        states = model(IDS, logits_to_keep=where, states=True)
    torch.testing.assert_close(some, kept(whole, where), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_of(model)(states), some, rtol=1e-5, atol=1e-5)


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
DREAM += [{"alg": "entropy", "eos_penalty": 3.0}, {"temperature": 0.7, "steps": 5, "eos_penalty": 2.0}]
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
    """The tokens of the others are what they would be, also under phases, where a threshold keeps all rows."""
    model = ROWS[name]()
    free = both(name, settings, model)
    for eos in common(free)[:2]:  # as if these ended texts
        both(name, settings, model, None, eos)
        both(name, settings, model, phased(model, False), eos)


def common(sequences: Tensor) -> list[int]:
    """New tokens, the most frequent first."""
    return torch.bincount(sequences[:, 5:].flatten(), minlength=VOCABULARY).argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llada", {"block_length": 2}),
        ("llada", {"threshold": 0.05}),
        ("dream", {"alg": "entropy"}),
        ("mdlm", {}),
        ("mdlm", {"sampler": "ddpm", "steps": 30}),
    ],
)
def test_what_ended_is_not_run(name: str, settings: dict[str, Any]) -> None:
    """Fewer sequences go through the model, the accounts say so, and a callback still sees all of them."""
    model = ROWS[name]()
    model.config.eos_token_id = int(both(name, settings, model)[1, 5])
    seen: list[Tensor] = []
    run = {"attention_mask": PADDED, "gen_length": 8, "seed": 3, **settings}
    ended, free = (sw.generate(model, PROMPTS, stop_at_eos=stop, on_step=watch(seen), **run) for stop in (True, False))
    assert ended.stats.by_model[None].rows < free.stats.by_model[None].rows
    assert ended.stats.all_in_flops < free.stats.all_in_flops
    assert {tuple(x.shape) for x in seen} == {(4, 13)}
    for row, plain in zip(ended.sequences.tolist(), free.sequences.tolist(), strict=True):
        end = [*plain[5:], model.config.eos_token_id].index(model.config.eos_token_id) + 5
        assert row[:end] == plain[:end]
        assert set(row[end:]) <= {model.config.eos_token_id}


def watch(seen: list[Tensor]) -> Callable[[Step], None]:
    return lambda step: seen.append(step.sequences.clone())


@pytest.mark.parametrize("scale", [0.0, 2000.0])
@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, s) for name, s in SETTINGS if name != "mdlm" and not s.get("temperature")],
)
def test_ties_are_decided_as_in_the_plain_loop(name: str, settings: dict[str, Any], scale: float) -> None:
    """Confidences that are all equal, and confidences that are nearly all 1."""
    model = ROWS[name]()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
        logits = model(input_ids=PROMPTS).logits.softmax(-1).amax(-1)
    assert len(logits.unique()) < logits.numel() / 2
    both(name, settings, model)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_no_tensor_holds_the_logits_of_all_positions(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing as wide as the vocabulary is longer than a chunk; and chunks change no token."""
    positions = 3
    monkeypatch.setattr(prediction, "CHUNK_BYTES", positions * 4 * VOCABULARY)
    monkeypatch.setattr(noise, "GROUP", positions * VOCABULARY)
    model = ROWS[name]()
    both(name, settings, model)
    family = FAMILIES[name]
    with Widest() as widest:
        family.decode(Denoiser(model), PROMPTS, family.settings(gen_length=8, **settings), PADDED)
    assert VOCABULARY <= widest.seen <= 2 * positions * VOCABULARY  # a feed puts what is left before the next


class Widest(TorchDispatchMode):
    """The most elements of a tensor whose last dimension is the vocabulary."""

    seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.ndim and function is not torch.ops.aten.t.default:  # weights
                self.seen = max(self.seen, tensor.numel() if tensor.shape[-1] == VOCABULARY else 0)
        return result


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device: reading a tensor's values, or asking how many are True."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        indexed = args[1] if name in ("__getitem__", "__setitem__") else None
        bools = [i for i in tree_leaves(indexed) if isinstance(i, Tensor) and i.dtype == torch.bool]
        self.count += bool(bools) or name in WAITING
        return function(*args, **(kwargs or {}))


WAITING = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "nonzero",
    "equal",
    "masked_select",
)


def waits(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """(how often the host waited, forwards)"""
    denoiser, family = Denoiser(ROWS[name]()), FAMILIES[name]
    with Waits() as counted:
        family.decode(denoiser, PROMPTS, family.settings(gen_length=16, **settings), PADDED)
    return counted.count, len(denoiser.forwards)


@pytest.mark.parametrize(
    ("name", "settings", "a_step"),
    [
        ("llada", {}, 0),
        ("llada", {"cfg_scale": 1.0}, 0),
        *(("llada", {"cache": kind}, 0) for kind in KINDS),
        ("llada", {"cache": "delayed", "focus": 3}, 0),
        ("llada", {"remasking": "random"}, 0),
        ("llada", {"temperature": 1.0}, 1),  # where the candidates are, for their noise
        *(("dream", {"alg": alg}, 0) for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")),
        ("dream", {"alg": "entropy", "alg_temp": 0.5}, 0),
        ("mdlm", {}, 0),
        ("mdlm", {"sampler": "ddpm"}, 2),  # what is left, and where, for the noise
    ],
)
def test_the_host_does_not_wait_in_a_step(name: str, settings: dict[str, Any], a_step: int) -> None:
    """More steps, no more waiting, where quotas and unmask times are known beforehand."""
    (few, short), (many, long) = (waits(name, {**settings, "steps": steps}) for steps in (2, 14))
    assert long > short
    assert many - few <= a_step * (long - short + 1)


def test_a_threshold_waits_once_a_step() -> None:
    many, forwards = waits("llada", {"threshold": 1.0})
    fewer, less = waits("llada", {"threshold": 0.03})
    assert forwards > less
    assert many - fewer == forwards - less


def test_the_keys_mask_is_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gets the canvas' own mask (rows, 1, 1, length) of bool; where nothing is padded, none at all."""
    masks: list[Tensor | None] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for name in FAMILIES:
        model, family = ROWS[name](), FAMILIES[name]
        for present in (PADDED, torch.ones_like(PADDED)):
            masks.clear()
            family.decode(Denoiser(model), PROMPTS, family.settings(gen_length=4), present)
            shapes = {None if m is None else (m.dtype, tuple(m.shape)[1:]) for m in masks}
            assert shapes == ({None} if present.all() else {(torch.bool, (1, 1, 9))})
