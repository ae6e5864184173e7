"""Dream's and MDLM's decoding beside plain transcriptions of the official semantics, and their laws."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from benchmarks import official_loops as official
from skipwise.blocks import find_contract
from skipwise.plan import Phase, Plan
from skipwise.sampling import Denoiser, DreamSettings, MDLMSettings
from skipwise.sampling.dream import decode as dream_decode
from skipwise.sampling.mdlm import decode as mdlm_decode
from tests.plain_samplers import plain_dream
from tests.tiny_models import ROWS

MASK = 3


@pytest.fixture(scope="module")
def dream() -> nn.Module:
    return ROWS["dream"]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [0.0, 0.3])
@pytest.mark.parametrize(
    "drawn",
    [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.5, "top_k": 5, "top_p": 0.9}],
)
@pytest.mark.parametrize("steps", [None, 5, 24])
@pytest.mark.parametrize("eos_penalty", [0.0, 3.0])
def test_dream_compat(
    dtype: torch.dtype, alg: Any, alg_temp: float, drawn: dict[str, Any], steps: int | None, eos_penalty: float
) -> None:
    drawn = drawn | {"eos_penalty": eos_penalty}
    model = ROWS["dream"]().to(dtype)
    prompt = torch.tensor([[0, 0, 9, 10, 11], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = DreamSettings(gen_length=12, steps=steps, alg=alg, alg_temp=alg_temp, seed=4, compat="dream", **drawn)
    with torch.random.fork_rng():
        expected = official.dream(model, prompt, mask, settings)
    assert torch.equal(dream_decode(Denoiser(model), prompt, settings, mask), expected)


ODD = [
    {"alg_temp": alg_temp, "temperature": temperature, **more}
    for alg_temp in (0.0, 1e-3, 1e-2, 0.5)
    for temperature in (0.0, 1e-6, 0.3)
    for more in ({}, {"top_p": 0.5}, {"top_k": 1})
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_odd_settings_are_as_in_the_official_loop(dtype: torch.dtype, alg: Any) -> None:
    """Rows of unequal numbers of masks, so that one quota for all draws beside them; draws that are next to none."""
    model = ROWS["dream"]().to(dtype)
    prompt = torch.tensor([[4, MASK, 9, MASK, MASK], [4, 5, 6, 7, 8]])
    for number, odd in enumerate(ODD):
        settings = DreamSettings(gen_length=4, steps=3, alg=alg, seed=number, compat="dream", **odd)
        with torch.random.fork_rng():
            try:
                expected = official.dream(model, prompt, torch.ones_like(prompt), settings)
            except RuntimeError:  # of multinomial: float16 cannot hold confidence / alg_temp
                with pytest.raises(sw.UserError, match=r"too small for torch\.float16"):
                    dream_decode(Denoiser(model), prompt, settings)
                continue
        assert torch.equal(dream_decode(Denoiser(model), prompt, settings), expected), odd


class _Sure(nn.Module):
    """A model that is as sure of every word at every place: all confidences tie."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, self.model = model.config, model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 64)
        return SimpleNamespace(logits=logits.index_fill(-1, torch.tensor([7]), 50.0))


@pytest.mark.parametrize("settings", [{}, {"alg": "maskgit_plus"}, {"alg": "entropy", "top_p": 0.5}])
def test_rows_are_independent_where_confidence_ties(dream: nn.Module, settings: dict[str, Any]) -> None:
    """Half of the masks of a row of ties: the first ones, alone and padded."""
    prompts = [[5, 6], [5, 6, 8, 9, 10, 11, 12], [5]]
    given = {"alg": "maskgit_plus", **settings}
    hook: list[Tensor] = []
    alone = []
    for prompt in prompts:
        chosen = DreamSettings(
            gen_length=8, steps=2, tokens_hook=lambda i, x, _: (hook.append(x.clone()), x)[1], **given
        )
        dream_decode(Denoiser(_Sure(dream)), torch.tensor([prompt]), chosen)
        alone.append((hook[1][0, len(prompt) :] == MASK).tolist())
        hook.clear()
    assert all(masked == [False] * 4 + [True] * 4 for masked in alone)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    dream_decode(Denoiser(_Sure(dream)), ids, chosen, mask)
    assert (hook[1][:, width:] == MASK).tolist() == alone


def test_dream_hooks(dream: nn.Module) -> None:
    """Hooks are called where the official ones are, with the step, the tokens and the logits, and may change them."""
    seen: list[Any] = []

    def on_logits(step: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([5]), 30.0)

    def on_tokens(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        seen.append((step, logits is None))
        x[:, 1] = 9
        return x

    prompt = torch.arange(4, 9)[None]
    for compat in (None, "dream"):
        seen.clear()
        settings = DreamSettings(
            gen_length=4, steps=6, alg="entropy", compat=compat, logits_hook=on_logits, tokens_hook=on_tokens
        )
        out = dream_decode(Denoiser(dream), prompt, settings)
        assert out[0].tolist() == [4, 9, 6, 7, 8, 5, 5, 5, 5]
        assert seen == [(None, True), *((i, False) for i in range(6))]
        assert torch.equal(out, official.dream(dream, prompt, torch.ones_like(prompt), settings))


def test_dream_ends_late_under_a_penalty(dream: nn.Module) -> None:
    """The token that pads is not chosen at first, though it is the likeliest, and is nearly free at the end."""
    pad = dream.config.pad_token_id

    def likely(step: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([pad]), 8.0)

    given = {"gen_length": 8, "alg": "entropy", "stop_at_eos": False, "logits_hook": likely}
    free = sw.generate(dream, torch.tensor([[4, 5]]), **given).sequences[0, 2:]
    assert (free == pad).all()
    late: list[Tensor] = []
    held = sw.generate(
        dream, torch.tensor([[4, 5]]), eos_penalty=3.0, on_step=lambda s: late.append(s.sequences.clone()), **given
    )
    assert not (late[1] == pad).any()
    assert (held.sequences == pad).any()


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("more", [{}, {"alg_temp": 0.3}, {"temperature": 0.8, "alg_temp": 1e-30}])
def test_dream_commits_ends_last(alg: str, more: dict[str, float]) -> None:
    """As the plain loop does: while another position is masked, no end of a text or of a turn is committed."""
    model = ROWS["dream"]()
    given = {"gen_length": 12, "alg": alg, "seed": 5, **more}
    prompt = torch.tensor([[4, 5, 6], [7, 8, 9]])
    plain = sw.generate(model, prompt, stop_at_eos=False, **given).sequences[:, 3:]
    common = torch.bincount(plain.flatten()).argsort(descending=True).tolist()
    model.config.eos_token_id, model.config.eot_token_id = common[0], common[1]
    settings = {**given, "confidence_eos_eot_inf": True}
    found = dream_decode(Denoiser(model), prompt, DreamSettings(**settings))
    assert torch.equal(found, plain_dream(Denoiser(model), prompt, None, **settings))
    assert not (found == MASK).any()

    def sure_of_ends(step: int, x: Tensor, logits: Tensor) -> Tensor:
        logits = logits.index_fill(-1, torch.tensor(common[:2]), -30.0)
        logits[:, ::2, common[0]] = 30.0
        return logits

    seen: list[Tensor] = []
    watched = {"on_step": lambda s: seen.append(s.sequences.clone()), "logits_hook": sure_of_ends}
    last = sw.generate(model, prompt[:1], stop_at_eos=False, **settings, **watched).sequences[0, 3:]
    assert (last[1::2] == common[0]).all()
    half = seen[6][0, 3:]
    assert (half[1::2] == MASK).all()
    assert (half[::2] != MASK).all()


def test_dream_settings_about_ends_that_cannot_be(dream: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.tensor([[4, 5]])
    for settings, message in (
        ({"confidence_eos_eot_inf": True}, "orders commits by confidence, which alg='origin' does not"),
        ({"confidence_eos_eot_inf": True, "alg": "entropy", "compat": "dream"}, "which compat='dream' does not"),
        ({"eos_penalty": -1.0}, "eos_penalty=-1.0 is negative"),
    ):
        with pytest.raises(sw.UserError, match=message):
            sw.generate(dream, prompt, gen_length=4, **settings)
    for name in ("pad_token_id", "eos_token_id"):
        monkeypatch.setattr(dream.config, name, None)
    with pytest.raises(sw.UserError, match=r"set config\.pad_token_id"):
        sw.generate(dream, prompt, gen_length=4, eos_penalty=1.0)


def test_dream_rows_have_their_own_quotas(dream: nn.Module) -> None:
    """Infilling with unequal numbers of masks: every row is filled, evenly; and its own steps are what is run."""
    x = torch.arange(4, 24).view(2, 10).clone()
    x[0, 2], x[1, 1:7] = MASK, MASK
    counts: list[list[int]] = []
    out = sw.generate(
        dream,
        x,
        gen_length=0,
        steps=3,
        alg="entropy",
        on_step=lambda s: counts.append((s.sequences == MASK).sum(1).tolist()),
    )
    assert counts == [[1, 6], [0, 4], [0, 2]]
    assert not (out.sequences == MASK).any()
    assert sw.generate(dream, x, gen_length=0, steps=50, alg="entropy").stats.forwards == 6


def test_dream_origin_lifts_masks_uniformly(dream: nn.Module) -> None:
    """Under "origin" a mask is lifted at each of n steps with probability 1/n (chi-square over 3,000 masks)."""
    steps, counts = 6, []
    sw.generate(
        dream,
        torch.full((100, 1), 4),
        gen_length=30,
        steps=steps,
        on_step=lambda s: counts.append(int((s.sequences == MASK).sum())),
        stop_at_eos=False,
    )
    lifted = [a - b for a, b in itertools.pairwise([*counts, 0])]
    expected = 3000 / steps
    assert sum((n - expected) ** 2 / expected for n in lifted) < 20.5  # 0.1% of chi-square with 5 degrees


# MDLM


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache"])
@pytest.mark.parametrize("steps", [3, 40])
def test_mdlm_compat(sampler: Any, steps: int, conditioned: bool) -> None:
    model = ROWS["mdlm"]()
    model.config.time_conditioning = conditioned
    mask = model.config.mask_token_id
    for seed in range(5):
        settings = MDLMSettings(gen_length=12, steps=steps, sampler=sampler, seed=seed, compat="mdlm")
        with torch.random.fork_rng():
            expected = official.mdlm(model, torch.zeros(2, 0, dtype=torch.long), None, settings)
        found = mdlm_decode(Denoiser(model), torch.zeros(2, 0, dtype=torch.long), settings)
        assert torch.equal(found, expected)
        assert not (found == mask).any()


class Table(nn.Module):
    """A denoiser over two tokens and a mask (2), of 2 positions, whose p(x0) depends on what is known already."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=2, time_conditioning=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = torch.zeros(*input_ids.shape, 3)
        other = input_ids.flip(1)
        logits[..., 1] = torch.tensor([0.8, -1.5, 0.4])[other] + torch.tensor([0.3, -0.2])
        logits[..., 2] = 5.0  # the mask is never to be drawn
        return SimpleNamespace(logits=logits)


def exact_law(steps: int | None) -> Tensor:
    """(4,): probability of (0,0), (0,1), (1,0), (1,1), by enumeration of all ways to lift two masks."""
    model = Table()

    def p(x: list[int]) -> Tensor:
        logits = model(torch.tensor([x])).logits[0]
        logits[:, 2] = -torch.inf
        return logits.softmax(-1)

    # the two lifting steps are independent and uniform: together with probability 1/steps, else either order
    together = 1 / steps if steps else 0.0
    law = torch.zeros(2, 2)
    both = p([2, 2])
    for a, b in itertools.product((0, 1), (0, 1)):
        first = both[0, a] * p([a, 2])[1, b]
        second = both[1, b] * p([2, b])[0, a]
        law[a, b] = together * both[0, a] * both[1, b] + (1 - together) / 2 * (first + second)
    return law.flatten()


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("first_hitting", None), ("first_hitting", 2), ("first_hitting", 7), ("ddpm", 2), ("ddpm", 7), ("ddpm_cache", 7)],
)
def test_mdlm_samplers_have_the_enumerated_law(sampler: Any, steps: int | None) -> None:
    """20,000 samples against the exact law: chi-square below the 0.1% point."""
    law = exact_law(steps)
    settings = MDLMSettings(gen_length=2, steps=steps, sampler=sampler, seed=1)
    drawn = mdlm_decode(Denoiser(Table()), torch.zeros(20000, 0, dtype=torch.long), settings)
    counts = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4)
    expected = 20000 * law
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom


def test_cached_p_of_a_single_sequence_has_the_law() -> None:
    """ddpm_cache with one sequence at a time, so that its cache is really used: 3,000 samples against the law."""
    law, counts, forwards = exact_law(6), torch.zeros(4), 0
    for seed in range(3000):
        denoiser = Denoiser(Table())
        settings = MDLMSettings(gen_length=2, steps=6, sampler="ddpm_cache", seed=seed)
        x = mdlm_decode(denoiser, torch.zeros(1, 0, dtype=torch.long), settings)[0]
        counts[int(x[0] * 2 + x[1])] += 1
        forwards += len(denoiser.forwards)
    expected = 3000 * law
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3
    assert forwards < 3000 * 4, "the cache is used"


def test_first_hitting_runs_the_model_at_events_only() -> None:
    """One forward a token in continuous time; rows of a batch share forwards; a step's tokens share one."""
    model = ROWS["mdlm"]()
    empty = torch.zeros(4, 0, dtype=torch.long)
    assert sw_forwards(model, empty, MDLMSettings(gen_length=9)) == 9
    steps = sw_forwards(model, empty, MDLMSettings(gen_length=9, steps=4))
    assert steps <= 4
    sparse = sw_forwards(model, empty[:1], MDLMSettings(gen_length=9, steps=1000))
    assert sparse <= 9
    every_step = sw_forwards(model, empty[:1], MDLMSettings(gen_length=9, steps=100, sampler="ddpm"))
    assert 60 < every_step <= 100, "until the last mask is lifted"


def sw_forwards(model: nn.Module, prompts: Tensor, settings: MDLMSettings) -> int:
    denoiser = Denoiser(model)
    mdlm_decode(denoiser, prompts, settings)
    return len(denoiser.forwards)


@pytest.mark.parametrize("sampler", ["first_hitting", "ddpm", "ddpm_cache"])
def test_mdlm_phases(sampler: Any) -> None:
    """Every row runs each part of its trajectory with the blocks of that phase; a cached p(x0) does not survive it."""
    model = ROWS["mdlm"]()
    plan = Plan(model=find_contract(model).shape, phases=(Phase(until=0.5, skip={"blocks": (0,)}), Phase(until=1.0)))
    seen: list[tuple[float, int]] = []
    out = sw.generate(
        model,
        torch.full((3, 1), 4),
        gen_length=20,
        sampler=sampler,
        steps=30,
        plan=plan,
        stop_at_eos=False,
        on_step=lambda step: seen.append((step.progress, len(model.blocks))),
    )
    whole = len(ROWS["mdlm"]().blocks)
    assert {(p < 0.5, n) for p, n in seen} == {(True, whole - 1), (False, whole)}
    assert [p for p, _ in seen] == sorted(p for p, _ in seen)
    assert out.stats.all_in_flops < out.stats.whole_all_in_flops


def test_a_cached_prediction_is_dropped_when_the_phase_changes() -> None:
    model = ROWS["mdlm"]()
    phases = (Phase(until=0.5, skip={"blocks": (0,)}), Phase(until=1.0))
    plan = Plan(model=find_contract(model).shape, phases=phases)
    empty = torch.zeros(1, 0, dtype=torch.long)
    settings = MDLMSettings(gen_length=1, steps=400, sampler="ddpm_cache", seed=0)
    counts = []
    for skipping_plan in (None, plan):
        seeds_late = []
        for seed in range(12):
            chosen = MDLMSettings(**{**settings.__dict__, "seed": seed})
            if skipping_plan is None:
                denoiser = Denoiser(model)
                mdlm_decode(denoiser, empty, chosen)
            else:
                with sw.skip(model, skipping_plan) as skipping:
                    denoiser = Denoiser(model, skipping)
                    mdlm_decode(denoiser, empty, chosen)
            seeds_late.append(len(denoiser.forwards))
        counts.append(seeds_late)
    assert set(counts[0]) == {1}, "one mask, one prediction, kept until the mask is lifted"
    assert set(counts[1]) == {1, 2}, "and made anew when the second phase finds the mask still there"


def test_prefix_is_kept_by_mdlm() -> None:
    model = ROWS["mdlm"]()
    prefix = torch.arange(4, 12).view(2, 4)
    out = sw.generate(model, prefix, gen_length=5, steps=10, sampler="ddpm").sequences
    assert torch.equal(out[:, :4], prefix)
    assert not (out == model.config.mask_token_id).any()
