"""Caches for block-wise decoding: where they are exact, what they run, and what they refuse."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.cost import Meter
from skipwise.errors import UserError
from skipwise.plan import Phase, Plan
from skipwise.sampling import Denoiser, LLaDASettings, agreement
from skipwise.sampling.cache import KINDS, Kind, Masks, Windows
from skipwise.sampling.denoiser import denoising
from skipwise.sampling.llada import decode as llada_decode
from skipwise.zoo.tasks import PROMPT_LENGTH, distinct_examples
from tests.tiny_models import ROWS

MASK, EOS = 3, 7
LENGTH, PROMPT = 18, 6
MODELS = ("llada", "dream", "mdlm")


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


def keep(windows: Windows, rows: Sequence[int], tokens: Tensor) -> None:
    """Go on with these rows, as the sampler does. tokens: theirs."""
    masked = tokens[: len(rows), : windows.block.stop] == MASK
    left = masked.sum(1).tolist()
    windows.keep(rows, Masks(masked, left, masked, left))


@torch.no_grad()
def run(model: nn.Module, windows: Windows, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of a window as the cache asks for it."""
    stored = windows.next(tokens.shape, None, model.shift)
    others = {"past_key_values": stored, "position_ids": stored.position_ids}
    return model.head(model.states(stored.part(tokens), mask, **others))


def ran(windows: Windows) -> list[list[int]]:
    """The positions of the last forward, row by row."""
    window = windows.stored.window
    return window.tolist() if isinstance(window, Tensor) else [list(range(LENGTH)[window])]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", [(), (1, 2)])
def test_a_window_right_after_a_refresh_gives_the_logits_of_the_whole(
    model: nn.Module, kind: Kind, padding: bool, skipped: tuple[int, ...]
) -> None:
    tokens, mask = half_written(padding)
    with sw.skip(model, plan_for(model, skipped)):
        windows = Windows(kind, PROMPT)
        windows.begin(slice(10, 14))
        keep(windows, range(3), tokens)
        whole = run(model, windows, tokens, mask)
        keep(windows, range(3), tokens)
        part = run(model, windows, tokens, mask)
        (window,) = {tuple(row) for row in ran(windows)}
    first = 10 - model.shift
    every = {"prefix": range(first, LENGTH), "delayed": (9, 10, 11) if model.shift else (10, 12)}
    assert window == tuple(every.get(kind, range(first, 14)))
    kept = whole[:, window][:, model.shift :]
    torch.testing.assert_close(part[:, model.shift :], kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(part[:, model.shift :].argmax(-1), kept.argmax(-1))


@pytest.mark.parametrize("kind", ["dual", "delayed"])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_another_kernel_gives_the_same(name: str, kind: Kind) -> None:
    model = ROWS[name]()
    tokens, mask = half_written(padding=True)
    found = []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        windows = Windows(kind, PROMPT)
        windows.begin(slice(10, 14))
        for _ in range(2):
            keep(windows, range(3), tokens)
            logits = run(model, windows, tokens, mask)
        found.append(logits[:, model.shift :])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dual", "delayed"])
@pytest.mark.parametrize("copies", [1, 2])
def test_rows_that_are_dropped_leave_the_others_as_they_were(model: nn.Module, kind: Kind, copies: int) -> None:
    tokens, mask = (tensor.repeat(copies, 1) for tensor in half_written(padding=True))
    windows = Windows(kind, PROMPT)
    windows.begin(slice(10, 14))
    keep(windows, range(3), tokens)
    run(model, windows, tokens, mask)
    tokens[:, 10] = 9
    for _ in range(2):  # "delayed" runs what was committed once more
        keep(windows, range(3), tokens)
        whole = run(model, windows, tokens, mask)
    rows = [copy * 3 + row for copy in range(copies) for row in (0, 2)]
    keep(windows, (0, 2), tokens[rows])
    torch.testing.assert_close(run(model, windows, tokens[rows], mask[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    keep(windows, range(3), tokens)  # what came back is not stored
    assert windows.next(tokens.shape, None).window == slice(0, LENGTH)


def decode(model: nn.Module, padding: bool = True, plan: Plan | None = None, **settings: Any) -> tuple[Tensor, list]:
    """Sequences, and what each forward was."""
    tokens, mask = prompts(padding=padding)
    chosen = LLaDASettings(**{"gen_length": 12, "block_length": 4} | settings)
    with denoising(model, plan, settings.pop("others", None)) as denoiser:
        return llada_decode(denoiser, tokens, chosen, mask), denoiser.forwards


EVERY = {kind: {"prompt_refresh" if kind == "interval" else "refresh": 1} for kind in KINDS}
BY_BLOCK = [kind for kind in KINDS if kind != "interval"]
WAYS = ({}, {"threshold": 0.15}, {"steps": 6}, {"temperature": 1.0}, {"cfg_scale": 0.5}, {"block_length": 12})


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_at_every_step_is_exact(model: nn.Module, kind: Kind, way: dict[str, Any]) -> None:
    for skipped, padding in itertools.product(((), (0, 2)), (False, True)):
        plan = plan_for(model, skipped)
        exact, _ = decode(model, padding, plan, **way)
        cached, _ = decode(model, padding, plan, cache=kind, **EVERY[kind], **way)
        assert torch.equal(cached, exact)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_one_block_decodes_exactly(model: nn.Module, kind: Kind, way: dict[str, Any]) -> None:
    # keys and values of its only block depend on a position's own token, and no token outside of a window changes
    plan = plan_for(model, (0, 1, 3))
    for padding in (False, True):
        exact, whole = decode(model, padding, plan, **way)
        cached, forwards = decode(model, padding, plan, cache=kind, **way)
        assert torch.equal(cached, exact)
        assert sum(f.tokens for f in forwards) < sum(f.tokens for f in whole)


@pytest.mark.parametrize("kind", BY_BLOCK)
@pytest.mark.parametrize("way", [{"block_length": 1}, {"steps": 3}], ids=str)
def test_blocks_of_one_step_are_exact(model: nn.Module, kind: Kind, way: dict[str, Any]) -> None:
    exact, _ = decode(model, **way)
    cached, forwards = decode(model, cache=kind, **way)
    assert torch.equal(cached, exact)
    assert all(f.tokens == f.keys for f in forwards)


@pytest.mark.parametrize("kind", BY_BLOCK)
@pytest.mark.parametrize("way", [{}, {"threshold": 0.15}, {"refresh": 2}], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(model: nn.Module, kind: Kind, way: dict[str, Any]) -> None:
    together, _ = decode(model, cache=kind, **way)
    tokens, _ = prompts()
    chosen = LLaDASettings(gen_length=12, block_length=4, cache=kind, **way)
    for row in range(len(tokens)):
        with denoising(model) as denoiser:
            alone = llada_decode(denoiser, tokens[row : row + 1, row:], chosen)
        assert torch.equal(alone[0], together[row, row:])


@pytest.mark.parametrize("kind", BY_BLOCK)
def test_rows_that_end_leave_and_change_nothing(model: nn.Module, kind: Kind) -> None:
    free, forwards = decode(model, cache=kind)
    end = int(free[0, PROMPT + 1])  # what the first row says early; others say it later or never
    together, fewer = decode(model, cache=kind, eos_token_id=end)
    assert {forward.rows for forward in fewer} > {3} or len(fewer) < len(forwards)
    for row, (said, text) in enumerate(zip(together[:, PROMPT:].tolist(), free[:, PROMPT:].tolist(), strict=True)):
        stop = text.index(end) + 1 if end in text else len(text)
        assert said[:stop] == text[:stop], row


def test_what_each_kind_runs(model: nn.Module) -> None:
    back = model.shift
    prefix = [LENGTH, *[12 + back] * 3, LENGTH, *[8 + back] * 3, LENGTH, *[4 + back] * 3]
    assert tokens_run(decode(model, cache="prefix")) == prefix
    assert tokens_run(decode(model, cache="dual")) == [LENGTH, *[4 + back] * 3] * 3
    assert tokens_run(decode(model, cache="dual", refresh=2)) == [LENGTH, 4 + back] * 6
    assert tokens_run(decode(model, cache="delayed")) == [LENGTH, 4 + back, 3 + back, 2 + back] * 3
    # the last commits of a block are run with the next one, or with what follows the prompt
    window, response = 4 + back, 12 + back
    expected = [window, window, response, 4 + window, window, response, window, LENGTH, window, window, response]
    assert tokens_run(decode(model, cache="interval", refresh=3, prompt_refresh=8)) == [LENGTH, *expected]


def steps_of(model: nn.Module, tokens: Tensor, **settings: Any) -> list[tuple[Tensor, list[list[int]]]]:
    """The sequences that each step of the cache "delayed" began with, and the positions of each row that it ran."""
    found: list[tuple[Tensor, list[list[int]]]] = []
    windows = Windows("delayed", PROMPT, settings.get("refresh"))

    def watch(module: Any, args: Any, given: dict[str, Any]) -> None:
        found[-1][1].extend(ran(windows))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch, denoising(model) as denoiser:
        denoiser.on_step = lambda step: found.append((step.sequences.clone(), []))
        patch.setattr(LLaDASettings, "windows", lambda *_: windows)
        llada_decode(denoiser, tokens, LLaDASettings(gen_length=12, block_length=6, cache="delayed", **settings))
    handle.remove()
    return found


DELAYED = ({}, {"steps": 6}, {"threshold": 0.2}, {"cfg_scale": 0.5}, {"refresh": 3})


@pytest.mark.parametrize("way", DELAYED, ids=str)
def test_delayed_runs_masks_and_what_was_just_committed(model: nn.Module, way: dict[str, Any]) -> None:
    """Row by row, what was masked when the step before began; of the shifted model what is before each mask, the first
    mask and what was just committed.
    """
    steps, everything = steps_of(model, prompts(1, padding=False)[0], **way), list(range(LENGTH))
    assert len(steps) > 4
    assert [i for i, (_, rows) in enumerate(steps) if everything in rows] == fulls_of(model, steps, way)
    for (before, _), (now, rows) in itertools.pairwise(steps):
        was, masks = masks_of(model, before), masks_of(model, now)
        if model.shift:
            was = (was - masks) | {p - 1 for p in masks} | {min(masks)}
        assert rows == [everything] or all(set(row) == was for row in rows)


def masks_of(model: nn.Module, sequences: Tensor) -> set[int]:
    """The masks of the first row in its current block of six."""
    masks = (sequences[0] == model.config.mask_token_id).nonzero()[:, 0].tolist()
    return {p for p in masks if p < (12 if masks[0] < 12 else LENGTH)}


def fulls_of(model: nn.Module, steps: list[tuple[Tensor, Any]], way: dict[str, Any]) -> list[int]:
    """Steps that begin a block, and with `refresh` every so many of a block."""
    ages, begun = [], 0
    for i, (sequences, _) in enumerate(steps):
        begun = i if len(masks_of(model, sequences)) == 6 else begun
        ages.append(i - begun)
    return [i for i, age in enumerate(ages) if age % way.get("refresh", LENGTH) == 0]


def test_delayed_stores_the_keys_of_tokens(model: nn.Module) -> None:
    """What is committed is run when its neighbours know it: a forward of everything finds the same keys, while those of
    masks that became tokens and were not run since would differ.
    """
    tokens, _ = half_written(padding=False)
    with sw.skip(model, plan_for(model, (0, 1, 3))):  # one block: keys depend on a position's own token
        windows = Windows("delayed", PROMPT)
        windows.begin(slice(10, 14))
        keep(windows, range(3), tokens)
        run(model, windows, tokens, None)
        stale = [part.clone() for part in windows.stored._layers[0]]
        tokens[:, 10] = torch.tensor([8, 9, 10])
        keep(windows, range(3), tokens)
        run(model, windows, tokens, None)
        found = windows.stored._layers[0]
        windows.stored = None
        run(model, windows, tokens, None)
        for kept, old, fresh in zip(found, stale, windows.stored._layers[0], strict=True):
            torch.testing.assert_close(kept, fresh, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(old[:, :, 10], fresh[:, :, 10], atol=1e-3)


def tokens_run(decoded: tuple[Tensor, list]) -> list[int]:
    return [forward.tokens for forward in decoded[1]]


def test_a_change_of_phase_refreshes(model: nn.Module) -> None:
    window = 4 + model.shift
    # 12 steps, the phases change after the 6th, in the middle of the second block
    changing = decode(model, plan=plan_for(model, (1, 2), (0,)), cache="dual")
    assert tokens_run(changing) == [LENGTH, *[window] * 3, LENGTH, window, LENGTH, window, LENGTH, *[window] * 3]
    same = decode(model, plan=plan_for(model, (1, 2), (1, 2)), cache="dual")
    assert tokens_run(same) == [LENGTH, *[window] * 3] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_a_plan_hands_steps_to_keep_their_own_features(kind: Kind) -> None:
    model, light = ROWS["llada"](), ROWS["llada"]()
    light.model.layers = light.model.layers[:1]
    light.config.num_hidden_layers = 1
    plan = plan_for(model, (), ())
    plan = plan.model_copy(update={"phases": (plan.phases[0], Phase(until=1.0, model="light"))})
    tokens, mask = prompts()
    with denoising(model, plan, {"light": light}) as denoiser:
        settings = LLaDASettings(gen_length=12, block_length=6, cache=kind)
        assert not (llada_decode(denoiser, tokens, settings, mask) == MASK).any()
    names = [(forward.running.model, forward.tokens == forward.keys) for forward in denoiser.forwards]
    assert names == [(None, True), *[(None, False)] * 5, ("light", True), *[("light", False)] * 5]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_in_a_prompt_are_filled(model: nn.Module, kind: Kind) -> None:
    tokens, mask = prompts()
    tokens[:, 3:5] = model.config.mask_token_id
    tokens[2, 2] = tokens[0, 0] = model.config.mask_token_id  # with nothing before, or padding
    settings: dict[str, Any] = {"attention_mask": mask, "family": "llada", "stop_at_eos": False, "gen_length": 0}
    plan = plan_for(model, (0, 1, 3))
    filled = sw.generate(model, tokens, plan=plan, cache=kind, **settings).sequences
    assert torch.equal(filled, sw.generate(model, tokens, plan=plan, **settings).sequences)
    assert not (filled == model.config.mask_token_id).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_happened(name: str, kind: Kind) -> None:
    model = ROWS[name]()
    tokens, mask = prompts()
    given: dict[str, Any] = {"family": "llada", "gen_length": 12, "block_length": 4, "stop_at_eos": False}
    given |= {"attention_mask": mask, "plan": plan_for(model, (1,), (2,)), "cache": kind}
    sw.generate(model, tokens, **given)  # prices are worked out once and remembered
    with Meter() as meter:
        stats = sw.generate(model, tokens, **given).stats
    assert sum(price.flops for price in meter.prices.values()) == pytest.approx(
        stats.all_in_flops - stats.spared_flops, rel=1e-3
    )
    without = sw.generate(model, tokens, **given | {"cache": None}).stats
    assert stats.forwards == without.forwards
    assert stats.block_flops < stats.all_in_flops < without.all_in_flops


@pytest.mark.parametrize("padding", [False, True])
def test_attention_is_fused(model: nn.Module, padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, attn_mask: Tensor | None = None, **others: Any) -> Tensor:
        seen.append((None if attn_mask is None else attn_mask.dtype, query.shape[2], key.shape[2]))
        assert not others.get("is_causal")
        return attention(query, key, *args, attn_mask=attn_mask, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    _, forwards = decode(model, padding, cache="dual")
    assert {mask for mask, *_ in seen} == {torch.bool if padding else None}
    assert [(queries, keys) for _, queries, keys in seen[:: len(seen) // len(forwards)]] == [
        (forward.tokens, LENGTH) for forward in forwards
    ]


def test_a_trained_model_says_nearly_the_same() -> None:
    model, tokenizer = sw.load("tiny-dllm")
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in distinct_examples("reverse", "test", 24)])
    exact, *cached = (sw.generate(model, ids, gen_length=7, cache=kind).sequences for kind in (None, *KINDS))
    assert all(0.8 < agreement(sequences, exact, PROMPT_LENGTH) <= 1 for sequences in cached)


def test_agreement_compares_texts_up_to_their_ends() -> None:
    exact = torch.tensor([[1, 1, 5, 6, EOS, EOS, EOS], [1, 1, 5, 6, 8, 9, 5]])
    approximate = torch.tensor([[1, 1, 5, 8, 6, EOS, EOS], [0, 0, 5, 6, 8, 9, EOS]])
    assert agreement(exact, exact, 2, EOS) == 1
    assert agreement(approximate, exact, 2, EOS) == agreement(exact, approximate, 2, EOS) == (1 + 4) / (4 + 5)
    assert agreement(approximate, exact, 2) == (3 + 4) / 10
    for other, start, what in ((exact[:1], 2, "one batch"), (exact, 7, "leaves none")):
        with pytest.raises(UserError, match=what):
            agreement(approximate, other, start)


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"cache": "duel"}, "Did you mean 'dual'"),
    ({"cache": "dual", "compat": "llada"}, "the official code, which has no cache"),
    ({"refresh": 4}, "refreshes a cache; choose one of prefix, dual, delayed, interval"),
    ({"cache": "dual", "prompt_refresh": 4}, "is of cache='interval'"),
    ({"cache": "dual", "refresh": 0}, "every 1 or more steps"),
    ({"cache": "interval", "prompt_refresh": -1}, "every 1 or more steps"),
)


@pytest.mark.parametrize(("given", "what"), WRONG, ids=str)
def test_settings_that_do_not_go_together_are_refused_on_one_line(given: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        LLaDASettings(**given)
    assert "\n" not in str(error.value)


def test_a_model_that_takes_no_stored_keys_is_refused() -> None:
    class Plain(nn.Module):
        is_masked_diffusion = True
        config = ROWS["llada"]().config

    with pytest.raises(UserError, match=r"Plain cannot decode with cache='dual'.*native models"):
        llada_decode(Denoiser(Plain()), prompts()[0], LLaDASettings(gen_length=4, cache="dual"))


def test_compiling_a_step_is_refused_with_a_cache() -> None:
    tokens, _ = prompts()
    with pytest.raises(UserError, match=r"compile=True needs forwards of one length.*cache='dual'"):
        sw.generate(ROWS["llada"](), tokens, gen_length=4, cache="dual", compile=True)
