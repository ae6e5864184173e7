"""Likelihoods against enumeration, against plain transcriptions of the official draws; batched rows == single rows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.evaluation.likelihood import LikelihoodSettings, loglikelihoods
from skipwise.evaluation.masking import dream_masks, every_mask, stratified_masks
from skipwise.plan import Plan
from tests.tiny_models import ROWS

MASK = 3
PREFIX = [9, 10, 11, 12, 13]
DIFFUSION = ["llada", "dream", "mdlm"]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: ROWS[name]() for name in [*DIFFUSION, "llama", "gpt2"]}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[Tensor]]:
    """The input ids of every forward."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def mask_of(model: nn.Module) -> int:
    return int(model.config.mask_token_id)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """(length, vocabulary) of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    if type(model).__name__ == "MDLM":
        logits[:, mask_of(model)] = -torch.inf
    return logits.log_softmax(-1)


def score_masked(model: nn.Module, prefix: Sequence[int], target: Sequence[int], masked: Sequence[int]) -> float:
    """Sum of the log-probabilities of the masked target tokens, of one noised sequence."""
    noised = [mask_of(model) if i in masked else token for i, token in enumerate(target)]
    found = log_probabilities(model, [*prefix, *noised])
    return sum(float(found[len(prefix) + i, target[i]]) for i in masked)


def bound(model: nn.Module, prefix: Sequence[int], target: Sequence[int]) -> float:
    """The bound by its definition: mean over sizes of the mean over masks of that size of (n / x) * log-probability."""
    n = len(target)
    means = [
        sum(score_masked(model, prefix, target, m) for m in combinations(range(n), x)) / math.comb(n, x) * n / x
        for x in range(1, n + 1)
    ]
    return sum(means) / n


@pytest.mark.parametrize("name", DIFFUSION)
def test_short_targets_are_the_bound_itself(models: dict[str, nn.Module], name: str) -> None:
    target = [20, 21, 22, 23]
    ((value, greedy),) = loglikelihoods(models[name], [(PREFIX, target)], LikelihoodSettings(mc_num=15))
    assert value == pytest.approx(bound(models[name], PREFIX, target), abs=1e-4)
    assert greedy is False


def test_estimates_are_unbiased(models: dict[str, nn.Module]) -> None:
    """Few masks, many seeds: the mean is the bound, within four standard errors that are much below its spread."""
    model, target = models["llada"], [20, 21, 22, 23, 24]
    draws = []
    for seed in range(400):
        ((value, _),) = loglikelihoods(model, [(PREFIX, target)], LikelihoodSettings(mc_num=3, batch_size=3, seed=seed))
        draws.append(value)
    values = torch.tensor(draws)
    error = float(values.std() / math.sqrt(len(draws)))
    assert 0 < error < 0.02 * abs(float(values.mean()))
    assert float(values.mean()) == pytest.approx(bound(model, PREFIX, target), abs=4 * error)


def test_masks_have_the_probabilities_of_the_bound() -> None:
    every = list(every_mask(4))
    assert len({noised.masked for noised in every}) == 15
    # n / x times the probability, so that x / n * weight adds up to 1
    assert sum(n.weight * len(n.masked) / 4 for n in every) == pytest.approx(1)
    drawn = list(stratified_masks(5, 10, torch.Generator().manual_seed(1)))
    assert sorted(len(noised.masked) for noised in drawn) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(noised.weight == pytest.approx(5 / len(noised.masked) / 10) for noised in drawn)
    first = [len(next(stratified_masks(5, 2, torch.Generator().manual_seed(seed))).masked) for seed in range(500)]
    assert all(60 < first.count(size) < 140 for size in range(1, 6))


@pytest.mark.parametrize("name", DIFFUSION)
def test_one_token_options_are_one_forward(models: dict[str, nn.Module], name: str) -> None:
    model, options = models[name], [20, 21, 22, 23]
    with counted(model) as seen:
        found = loglikelihoods(model, [(PREFIX, [option]) for option in options])
    assert [tuple(ids.shape) for ids in seen] == [(1, 6)]
    expected = log_probabilities(model, [*PREFIX, mask_of(model)])[-1]
    assert [value for value, _ in found] == pytest.approx([float(expected[option]) for option in options], abs=1e-5)


REQUESTS = [(PREFIX, [20, 21, 22, 23]), (PREFIX[:2], [30]), (PREFIX * 2, [40] * 9), (PREFIX, [24, 25])]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("name", [*DIFFUSION, "llama", "gpt2"])
def test_batched_is_single(models: dict[str, nn.Module], name: str, cfg_scale: float) -> None:
    """Rows of unequal length in one batch, in any order, give what each gives alone."""
    model = models[name]
    settings = LikelihoodSettings(mc_num=6, batch_size=5, cfg_scale=cfg_scale)
    together = loglikelihoods(model, REQUESTS, settings)
    one = LikelihoodSettings(mc_num=6, batch_size=1, cfg_scale=cfg_scale)
    alone = [loglikelihoods(model, [request], one)[0] for request in REQUESTS]
    backwards = loglikelihoods(model, REQUESTS[::-1], settings)[::-1]
    assert [v for v, _ in together] == pytest.approx([v for v, _ in alone], abs=1e-4)
    assert [v for v, _ in together] == pytest.approx([v for v, _ in backwards], abs=1e-4)


def test_guidance_is_against_the_masked_prefix(models: dict[str, nn.Module]) -> None:
    model, expected = models["llada"], 0.0
    for i, rest in enumerate(([MASK, MASK], [20, MASK])):
        with torch.no_grad():
            given = model(input_ids=torch.tensor([[*PREFIX, *rest]])).logits[0, 5 + i]
            free = model(input_ids=torch.tensor([[*[MASK] * 5, *rest]])).logits[0, 5 + i]
        expected += float((free + 1.7 * (given - free)).log_softmax(-1)[20 + i])
    ((value, _),) = loglikelihoods(model, [(PREFIX, [20, 21])], LikelihoodSettings(cfg_scale=0.7, chain=True))
    assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autoregressive_is_exact(models: dict[str, nn.Module], name: str) -> None:
    model, target = models[name], [20, 21, 22]
    found = log_probabilities(model, [*PREFIX, *target])
    expected = sum(float(found[len(PREFIX) - 1 + i, token]) for i, token in enumerate(target))
    best = int(found[len(PREFIX) - 1].argmax())
    with counted(model) as seen:
        results = loglikelihoods(model, [(PREFIX, target), (PREFIX, [best]), (PREFIX, [best ^ 1])])
    assert results[0][0] == pytest.approx(expected, abs=1e-4)
    assert [greedy for _, greedy in results[1:]] == [True, False]
    assert sum(len(ids) for ids in seen) == 2  # the one-token options share theirs


def test_the_chain_is_left_to_right(models: dict[str, nn.Module]) -> None:
    model, target = models["dream"], [20, 21, 22]
    expected = 0.0
    for i, token in enumerate(target):
        found = log_probabilities(model, [*PREFIX, *target[:i], *[MASK] * (3 - i)])
        expected += float(found[len(PREFIX) + i, token])
    ((value, _),) = loglikelihoods(model, [(PREFIX, target)], LikelihoodSettings(chain=True))
    assert value == pytest.approx(expected, abs=1e-4)


def greedy_decode(model: nn.Module, prefix: Sequence[int], length: int) -> list[int]:
    """Commit the single most confident token a forward."""
    ids = torch.tensor([*prefix, *[MASK] * length])
    while (hidden := (ids == MASK).nonzero()[:, 0]).numel():
        confidence, chosen = log_probabilities(model, ids.tolist())[hidden].max(-1)
        ids[hidden[confidence.argmax()]] = chosen[confidence.argmax()]
    return ids[len(prefix) :].tolist()


def test_greedy(models: dict[str, nn.Module]) -> None:
    model = models["llada"]
    right = greedy_decode(model, PREFIX, 4)
    short = greedy_decode(model, PREFIX[:2], 2)
    wrong = [*right[:-1], right[-1] ^ 1]
    requests = [(PREFIX, right), (PREFIX, wrong), (PREFIX[:2], short)]
    found = loglikelihoods(model, requests, LikelihoodSettings(greedy=True))
    assert [greedy for _, greedy in found] == [True, False, True]


def official_llada(model: nn.Module, requests: Sequence[tuple[list[int], list[int]]], mc_num: int, b: int) -> Any:
    """LLaDA's evaluation from its description (semantics D4), on torch's global stream: values and noised inputs."""
    values: list[float] = []
    inputs: list[tuple[int, ...]] = []
    for prefix, target in requests:
        seq = torch.tensor([prefix + target]).repeat(b, 1)
        lt, losses = len(target), []
        for _ in range(mc_num // b):
            k = torch.randint(1, lt + 1, ())
            x = torch.round(torch.linspace(float(k), k + (b - 1) * (lt / b), steps=b)).long()
            x = ((x - 1) % lt) + 1
            is_mask = torch.arange(lt).repeat(b, 1) < x.unsqueeze(1)
            for i in range(b):
                is_mask[i] = is_mask[i][torch.randperm(lt)]
            is_mask = torch.cat([torch.zeros(b, len(prefix), dtype=torch.bool), is_mask], 1)
            noisy = torch.where(is_mask, MASK, seq)
            inputs += map(tuple, noisy.tolist())
            with torch.no_grad():
                logits = model(input_ids=noisy).logits
            p = (x / lt).unsqueeze(1).repeat(1, seq.shape[1])
            losses.append((F.cross_entropy(logits[is_mask], seq[is_mask], reduction="none") / p[is_mask]).sum() / b)
        values.append(-float(sum(losses) / len(losses)))
    return values, inputs


def test_compat_llada_is_the_official_draw(models: dict[str, nn.Module]) -> None:
    """Mask for mask: the inputs that are run are those of the transcription, without repetitions."""
    model, requests = models["llada"], [(PREFIX, [20, 21, 22, 23, 24, 25, 26]), (PREFIX[::-1], [30] * 7)]
    settings = LikelihoodSettings(mc_num=12, batch_size=4, seed=17, compat="llada")
    torch.manual_seed(17)
    values, theirs = official_llada(model, requests, 12, 4)
    with counted(model) as seen:
        found = loglikelihoods(model, requests, settings)
    assert [tuple(row) for batch in seen for row in batch.tolist()] == list(dict.fromkeys(theirs))
    assert [value for value, _ in found] == pytest.approx(values, abs=1e-4)


def official_dream(model: nn.Module, requests: Sequence[tuple[list[int], list[int]]], mc_num: int, b: int) -> Any:
    """Dream's evaluation from its description (semantics D4): values on torch's global stream."""
    values = []
    for prefix, target in requests:
        seq = torch.tensor([[*prefix, *target, model.config.eos_token_id]]).repeat(b, 1)
        total = 0.0
        for _ in range(max(mc_num // b, 1)):
            t = (torch.rand(1) + torch.arange(b).float() / b) % 1
            p = ((1 - 1e-3) * t + 1e-3)[:, None].repeat(1, seq.shape[1])
            masked = torch.rand((b, seq.shape[1])) < p
            masked[:, 0] = masked[:, -1] = False
            masked[:, : len(prefix)] = False
            with torch.no_grad():
                logits = model(input_ids=torch.where(masked, MASK, seq)).logits
            total += float((F.cross_entropy(logits[masked], seq[masked], reduction="none") / p[masked]).sum() / b)
        values.append(-total / max(mc_num // b, 1))
    return values


@pytest.mark.parametrize("mc_num", [12, 2])
def test_compat_dream_is_the_official_estimate(models: dict[str, nn.Module], mc_num: int) -> None:
    model, requests = models["dream"], [(PREFIX, [20, 21, 22, 23, 24]), (PREFIX, [30, 31])]
    torch.manual_seed(5)
    values = official_dream(model, requests, mc_num, 4)
    settings = LikelihoodSettings(mc_num=mc_num, batch_size=4, seed=5, compat="dream")
    assert [value for value, _ in loglikelihoods(model, requests, settings)] == pytest.approx(values, abs=1e-3)


def test_dream_never_masks_the_first_token_of_all() -> None:
    drawn = list(dream_masks(0, 3, 64, 8, torch.Generator().manual_seed(0)))
    assert {i for noised in drawn for i in noised.masked} == {1, 2}


def test_under_a_plan(models: dict[str, nn.Module]) -> None:
    """What `skip` gives is the likelihood of the smaller model."""
    model = models["llada"]
    plan = Plan.static(find_contract(model).shape, {"model.layers": [1, 2]})
    whole = loglikelihoods(model, REQUESTS)
    with sw.skip(model, plan):
        ((value, _),) = loglikelihoods(model, [(PREFIX, [20, 21])])
        assert value == pytest.approx(bound(model, PREFIX, [20, 21]), abs=1e-4)
        assert value != pytest.approx(bound(ROWS["llada"](), PREFIX, [20, 21]), abs=1e-2)
    assert loglikelihoods(model, REQUESTS) == whole


def test_results_come_as_they_are_done(models: dict[str, nn.Module]) -> None:
    """Every request once, also one with nothing to predict."""
    requests = [*REQUESTS, (PREFIX, [])]
    told: dict[int, tuple[float, bool]] = {}
    found = loglikelihoods(models["llada"], requests, on_result=lambda number, result: told.update({number: result}))
    assert [told[number] for number in range(5)] == found
    assert found[-1] == (0.0, False)


def test_logits_are_kept_where_something_is_read(models: dict[str, nn.Module]) -> None:
    widths: list[int] = []
    handle = models["llada"].lm_head.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    loglikelihoods(models["llada"], [(PREFIX * 8, [20]), (PREFIX * 8, [21, 22])])
    handle.remove()
    assert widths == [2]


@pytest.mark.parametrize(
    ("name", "request_", "settings", "words"),
    [
        ("bert", (PREFIX, [1]), {}, "has no likelihood"),
        ("llama", ([], [1]), {}, "give every request a prefix"),
        ("dream", ([], [1]), {}, "give every request a prefix"),
        ("llada", (PREFIX, [1]), {"mc_num": 0}, "mc_num=0"),
        ("llada", (PREFIX, [1]), {"compat": "lada"}, "Unknown compat 'lada'. Did you mean 'llada'"),
        ("llada", (PREFIX, [1]), {"compat": "llada", "mc_num": 10, "batch_size": 4}, "multiple of batch_size"),
        ("llada", (PREFIX, [1]), {"compat": "dream", "chain": True}, "leave out compat"),
    ],
)
def test_mistakes_are_named(name: str, request_: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(sw.UserError, match=words) as caught:
        loglikelihoods(ROWS[name](), [request_], LikelihoodSettings(**settings))
    assert "\n" not in str(caught.value)


def test_no_prefix_is_fine_where_the_first_token_is_predicted(models: dict[str, nn.Module]) -> None:
    ((value, _),) = loglikelihoods(models["llada"], [([], [20, 21])])
    assert value == pytest.approx(bound(models["llada"], [], [20, 21]), abs=1e-4)
