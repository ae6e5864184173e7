"""Decoding beside a plain transcription of the official semantics, and the accounts that it keeps."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from benchmarks import official_loops as official
from skipwise.blocks import find_contract
from skipwise.cost import price_blocks
from skipwise.examples import Size
from skipwise.plan import Phase, Plan
from skipwise.sampling import Denoiser, LLaDASettings, Step
from skipwise.sampling.canvas import transfer_quotas
from skipwise.sampling.llada import decode as llada_decode
from tests.deleted import deleted
from tests.tiny_models import ROWS

MASK, EOS, EOT = 3, 7, 8
MASK_OF_ZOO = 1


@pytest.fixture(scope="module")
def llada() -> nn.Module:
    return ROWS["llada"]()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


def decode(model: nn.Module, prompt: Tensor, settings: LLaDASettings, mask: Tensor | None = None) -> Tensor:
    return llada_decode(Denoiser(model), prompt, settings, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("steps", "block_length"), [(None, None), (6, 4), (4, 12), (24, 6)])
@pytest.mark.parametrize("more", [{}, {"cfg_scale": 1.5}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}])
def test_compat_is_the_official_semantics(
    dtype: torch.dtype,
    remasking: Any,
    temperature: float,
    steps: int | None,
    block_length: int | None,
    more: dict[str, Any],
) -> None:
    model = ROWS["llada"]().to(dtype)
    model.config.eos_token_id, model.config.eot_token_id = EOS, EOT
    prompt = torch.tensor([[0, 0, 9, 10, 11], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = LLaDASettings(
        gen_length=12,
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        remasking=remasking,
        compat="llada",
        seed=5,
        **more,
    )
    assert torch.equal(decode(model, prompt, settings, mask), official.llada(model, prompt, mask, settings))


def test_default_differs_from_compat_only_by_rounding(llada: nn.Module) -> None:
    """In float32 the two agree; in bfloat16 confidences tie, and the default decides in float32 instead."""
    prompt = torch.arange(4, 24).view(4, 5)
    settings = [LLaDASettings(gen_length=12, steps=6, block_length=6, compat=compat) for compat in (None, "llada")]
    plain, compat = (decode(llada, prompt, s) for s in settings)
    assert torch.equal(plain, compat)
    low = ROWS["llada"]().to(torch.bfloat16)
    plain, compat = (decode(low, prompt, s) for s in settings)
    assert not torch.equal(plain, compat)


def test_the_end_of_text_is_held_back(llada: nn.Module) -> None:
    """A head that wants nothing but the end of text: never chosen, or chosen last, also at a temperature."""
    model = copy.deepcopy(llada)
    model.config.eos_token_id = EOS
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor([EOS]), 20.0))
    prompt = torch.arange(4, 9)[None]
    plain = sw.generate(model, prompt, gen_length=6, stop_at_eos=False).sequences[0, 5:]
    assert (plain == EOS).all()
    never = sw.generate(model, prompt, gen_length=6, logits_eos_inf=True).sequences[0, 5:]
    assert not (never == EOS).any()
    seen: list[Tensor] = []
    model.lm_head.bias.data[EOS] = 4.5  # more than half of what is drawn
    settings = {"temperature": 1.0, "confidence_eos_eot_inf": True, "stop_at_eos": False}
    watch = {"on_step": lambda step: seen.append(step.sequences[:, 5:].clone())}
    out = sw.generate(model, prompt.expand(8, -1), gen_length=24, **settings, **watch)
    assert not (seen[12] == EOS).any(), "the end of text waits while anything else is drawn anywhere"
    assert (out.sequences[:, 5:] == EOS).any()


def test_a_threshold_commits_in_parallel(trained: tuple[nn.Module, Any]) -> None:
    """Every commit was above the threshold or the best of its step; a threshold of 1 is one token a step."""
    model, tokenizer = trained
    prompt = torch.tensor([tokenizer(text)["input_ids"] for text in ("s3141592=", "r3141592=")])
    single = sw.generate(model, prompt, gen_length=7)
    fast = sw.generate(model, prompt, gen_length=7, threshold=0.9)
    assert torch.equal(fast.sequences, single.sequences)
    assert 1 <= fast.stats.forwards < single.stats.forwards == 7
    seen: list[Tensor] = []
    untrained = ROWS["llada"]()
    untrained.config.eos_token_id = None
    out = sw.generate(
        untrained, prompt, gen_length=6, threshold=1.0, on_step=lambda step: seen.append(step.sequences.clone())
    )
    assert [(x == MASK).sum(1).tolist() for x in seen] == [[n, n] for n in range(6, 0, -1)]
    assert torch.equal(out.sequences, sw.generate(untrained, prompt, gen_length=6).sequences)


def test_a_threshold_commits_what_it_should(llada: nn.Module) -> None:
    prompt = torch.arange(4, 14).view(2, 5)
    states: list[Tensor] = []
    watch = {"on_step": lambda step: states.append(step.sequences.clone())}
    sw.generate(llada, prompt, gen_length=8, block_length=4, threshold=0.02, **watch)
    for before, after in itertools.pairwise(states):
        logits = llada(before).logits.detach()
        logits[..., MASK] = -torch.inf
        confidence = logits.softmax(-1).amax(-1)
        start = 5 if (before[:, 5:9] == MASK).any() else 9
        for row in range(2):
            masked = [p for p in range(start, start + 4) if before[row, p] == MASK]
            expected = {p for p in masked if confidence[row, p] >= 0.02}
            expected |= {max(masked, key=lambda p: float(confidence[row, p]))} if masked else set()
            assert {p for p in masked if after[row, p] != MASK} == expected


def test_infilling_keeps_what_is_given(trained: tuple[nn.Module, Any]) -> None:
    """Masks anywhere are filled, the rest stays; a prompt's masks belong to the first block of new tokens."""
    model, tokenizer = trained
    full = torch.tensor([tokenizer("s3141592=1123459")["input_ids"]])
    holes = full.clone()
    holes[0, [9, 12, 15]] = MASK_OF_ZOO
    filled = sw.generate(model, holes, gen_length=0)
    assert torch.equal(filled.sequences, full)
    assert filled.stats.forwards == 3
    half = full[:, :12].clone()
    half[0, 10] = MASK_OF_ZOO
    assert torch.equal(sw.generate(model, half, gen_length=4, block_length=2).sequences, full)
    with pytest.raises(sw.UserError, match="gen_length=0 and the prompt holds no mask"):
        sw.generate(model, full, gen_length=0)
    with pytest.raises(sw.UserError, match="block_length=2 needs new tokens"):
        sw.generate(model, holes, gen_length=0, block_length=2)


@pytest.mark.parametrize("block_length", [2, 8])
def test_decoding_stops_at_a_committed_end(llada: nn.Module, block_length: int) -> None:
    """What stands before the first end of text is what the run without a stop has; what follows is the end of text."""
    model = copy.deepcopy(llada)
    prompt = torch.arange(4, 24).view(4, 5)
    whole = sw.generate(model, prompt, gen_length=8, block_length=block_length, stop_at_eos=False)
    model.config.eos_token_id = int(whole.sequences[0, 6])  # as if this token ended a text
    stopped = sw.generate(model, prompt, gen_length=8, block_length=block_length)
    for row, free in zip(stopped.sequences[:, 5:], whole.sequences[:, 5:], strict=True):
        ends = (free == model.config.eos_token_id).nonzero()
        end = int(ends[0]) if len(ends) else 8
        assert torch.equal(row[:end], free[:end])
        assert (row[end:] == model.config.eos_token_id).all()
    alone = sw.generate(model, prompt[:1], gen_length=8, block_length=block_length)
    assert torch.equal(alone.sequences[0], stopped.sequences[0])
    if block_length == 2:
        assert alone.stats.forwards <= 2 < whole.stats.forwards, "later blocks are not decoded"


def test_steps_that_commit_nothing_are_not_run(llada: nn.Module) -> None:
    prompt = torch.arange(4, 9)[None]
    plain = sw.generate(llada, prompt, gen_length=4, steps=12)
    compat = sw.generate(llada, prompt, gen_length=4, steps=12, compat="llada")
    assert (plain.stats.forwards, compat.stats.forwards) == (4, 12)
    assert torch.equal(plain.sequences, compat.sequences)


def test_guidance_is_counted_as_twice_the_rows(llada: nn.Module) -> None:
    prompt = torch.arange(4, 9)[None]
    plain, guided = (sw.generate(llada, prompt, gen_length=4, cfg_scale=scale).stats for scale in (0.0, 1.0))
    assert guided.forwards == plain.forwards
    assert guided.all_in_flops == 2 * plain.all_in_flops


def test_quotas() -> None:
    assert transfer_quotas(torch.tensor([7, 4, 0]), 3).tolist() == [[3, 2, 2], [2, 1, 1], [0, 0, 0]]


def test_every_step_commits_its_quota_inside_its_block(llada: nn.Module) -> None:
    seen: list[Tensor] = []
    prompt = torch.arange(4, 14).view(2, 5)
    denoiser = Denoiser(llada, on_step=lambda step: seen.append(step.sequences.clone()))
    llada_decode(denoiser, prompt, LLaDASettings(gen_length=8, steps=4, block_length=4))
    masked = [(x[:, 5:] == MASK) for x in seen]
    assert [m.sum(1).tolist() for m in masked] == [[8, 8], [6, 6], [4, 4], [2, 2]]
    assert masked[2][:, :4].sum() == 0, "the first block is finished before the second begins"


@pytest.mark.parametrize(
    "settings",
    [
        {"family": "llada"},
        {"family": "llada", "temperature": 1.0},
        {"family": "llada", "remasking": "random", "steps": 3},
        {"family": "llada", "threshold": 0.05},
        {"family": "llada", "cfg_scale": 0.5},
        {"family": "dream"},
        {"family": "dream", "alg": "entropy", "temperature": 1.0, "top_p": 0.9, "top_k": 20, "alg_temp": 0.5},
        {"family": "dream", "alg": "topk_margin", "temperature": 0.5},
        {"family": "mdlm"},
        {"family": "mdlm", "steps": 20},
        {"family": "mdlm", "sampler": "ddpm", "steps": 20},
        {"family": "mdlm", "sampler": "ddpm_cache", "steps": 20},
    ],
)
@pytest.mark.parametrize("name", ["llada", "dream", "mdlm"])
def test_left_padded_rows_equal_single_runs(name: str, settings: dict[str, Any]) -> None:
    """Row r under seed s is the single run under seed s + r: greedy or with noise, in every family on every model."""
    model = ROWS[name]()
    model.config.eos_token_id = None
    prompts = [[9, 10, 11], [4, 5, 6, 7, 8], [12]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    together = sw.generate(model, ids, attention_mask=mask, gen_length=6, seed=3, **settings).sequences
    for row, prompt in enumerate(prompts):
        alone = sw.generate(model, torch.tensor([prompt]), gen_length=6, seed=3 + row, **settings).sequences
        assert torch.equal(alone[0, -6:], together[row, -6:])
        assert model.config.mask_token_id not in alone[0].tolist()


def test_the_trained_model_answers(trained: tuple[nn.Module, Any]) -> None:
    model, tokenizer = trained
    ids = torch.tensor([tokenizer("s3141592=")["input_ids"]])
    assert tokenizer.decode(sw.generate(model, ids, gen_length=7).sequences[0]) == "s3141592=1123459"


def test_temperature_is_seeded(llada: nn.Module) -> None:
    prompt = torch.arange(4, 14).view(2, 5)
    draws = [sw.generate(llada, prompt, gen_length=8, temperature=1.0, seed=seed).sequences for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gumbel_samples_follow_the_softmax(llada: nn.Module) -> None:
    """At temperature 1 the chosen token is a draw from the model's distribution."""
    model = copy.deepcopy(llada)
    torch.nn.init.zeros_(model.lm_head.weight)
    logits = torch.full((model.config.vocab_size,), -torch.inf)
    logits[5:8] = torch.tensor([0.0, 1.0, 2.0])
    model.lm_head.bias = nn.Parameter(logits)
    drawn = sw.generate(model, torch.full((400, 1), 4), gen_length=25, steps=1, temperature=1.0).sequences[:, 1:]
    frequencies = torch.bincount(drawn.flatten() - 5, minlength=3) / drawn.numel()
    assert torch.allclose(frequencies, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.015)


def static(model: nn.Module, numbers: list[int]) -> Plan:
    return Plan.static(find_contract(model).shape, {"model.layers": numbers})


def test_generate_under_a_plan_is_the_deleted_model(llada: nn.Module) -> None:
    prompt = torch.arange(4, 14).view(2, 5)
    generated = sw.generate(llada, prompt, plan=static(llada, [1]), gen_length=8)
    short = deleted(llada, "model.layers", {1})
    assert torch.equal(generated.sequences, sw.generate(short, prompt, gen_length=8).sequences)
    prices = price_blocks(llada, Size(tokens=13))
    assert generated.stats.forwards == 8
    assert generated.stats.block_flops == 2 * 8 * prices.of_blocks({"model.layers": (1,)}).flops
    unused = 2 * (8 * 13 - sum(range(1, 9)))  # positions that no logits were made for: all but the masks
    assert generated.stats.whole_all_in_flops == 2 * 8 * prices.forward().flops - unused * prices.head.flops // 13
    assert generated.stats.seconds > 0


def test_phases_follow_the_trajectory(llada: nn.Module) -> None:
    phases = (Phase(until=0.5, skip={"model.layers": (1, 2)}), Phase(until=1.0))
    plan = Plan(model=find_contract(llada).shape, phases=phases)
    lengths: list[int] = []

    def watch(step: Step) -> None:
        lengths.append(len(llada.model.layers))

    stats = sw.generate(llada, torch.arange(4, 9)[None], plan=plan, gen_length=8, steps=4, on_step=watch).stats
    assert lengths == [2, 2, 4, 4]
    prices = price_blocks(llada, Size(tokens=13))
    assert stats.block_flops == 2 * prices.of_blocks().flops + 2 * prices.of_blocks({"model.layers": (1, 2)}).flops


def test_a_surrounding_plan_is_counted(llada: nn.Module) -> None:
    prompt = torch.arange(4, 9)[None]
    with sw.skip(llada, static(llada, [0])):
        inside = sw.generate(llada, prompt, gen_length=4)
    expected = sw.generate(llada, prompt, gen_length=4, plan=static(llada, [0]))
    assert torch.equal(inside.sequences, expected.sequences)
    assert inside.stats.block_flops == expected.stats.block_flops < inside.stats.whole_all_in_flops


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_autoregressive(name: str) -> None:
    model = ROWS[name]()
    prompt = torch.arange(4, 14).view(2, 5)
    generated = sw.generate(model, prompt, plan=static(model, [0]), gen_length=6, stop_at_eos=False)
    short = deleted(model, "model.layers", {0})
    expected = short.generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0
    )
    assert torch.equal(generated.sequences, expected)
    assert generated.stats.forwards == 6
    assert generated.stats.block_flops < generated.stats.all_in_flops < generated.stats.whole_all_in_flops


def test_autoregressive_flops_are_those_of_a_cached_run() -> None:
    """Checked against torch's counter over a real run with a cache."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = ROWS["gpt2"]()
    prompt = torch.arange(4, 14).view(1, 10)
    price_blocks(model, Size(tokens=16))  # known beforehand, so that the counter sees the run alone
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stats = sw.generate(model, prompt, gen_length=6, stop_at_eos=False).stats
    assert stats.all_in_flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_stopping_criteria_end_an_autoregressive_text() -> None:
    from transformers import EosTokenCriteria, StoppingCriteriaList

    model, tokenizer = sw.load("tiny-ar")
    prompt = torch.tensor([tokenizer("s3141592=")["input_ids"]])
    criteria = StoppingCriteriaList([EosTokenCriteria(tokenizer.convert_tokens_to_ids("3"))])
    stopped = sw.generate(model, prompt, gen_length=7, stopping_criteria=criteria)
    assert tokenizer.decode(stopped.sequences[0]) == "s3141592=1123"
    assert stopped.stats.forwards == 4
    with pytest.raises(sw.UserError, match=r"temperature=-1\.0 is negative"):
        sw.generate(model, prompt, gen_length=7, temperature=-1.0)


def test_sampling_autoregressively_is_seeded() -> None:
    model = ROWS["llama"]()
    prompt = torch.arange(4, 9)[None]
    state = torch.get_rng_state()
    draws = [sw.generate(model, prompt, gen_length=8, temperature=1.0, seed=s).sequences for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 8, "block_length": 3}, "gen_length=8 is not a multiple of block_length=3"),
        ({"gen_length": 8, "block_length": 2, "steps": 6}, "steps=6 is not a multiple of the 4 blocks; try steps=8"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"remasking": "high"}, "Unknown remasking 'high'"),
        ({"remasking": "low_confidense"}, "Did you mean 'low_confidence'"),
        ({"compat": "dream"}, "compat='dream' is unknown; use 'llada'"),
        ({"stepz": 4}, "Unknown setting of the llada sampler 'stepz'. Did you mean 'steps'"),
        ({"family": "dream", "cfg_scale": 1.0}, "Unknown setting of the dream sampler 'cfg_scale'"),
        ({"family": "mdlm", "threshold": 0.9}, "Unknown setting of the mdlm sampler 'threshold'"),
        ({"family": "drem"}, "Unknown decoding family 'drem'. Did you mean 'dream'"),
        ({"family": "dream", "alg": "entropie"}, "Unknown alg 'entropie'. Did you mean 'entropy'"),
        ({"family": "dream", "top_p": 0.0}, "top_p=0.0 is no probability"),
        ({"family": "dream", "top_k": 0}, "top_k=0; at least one token"),
        ({"family": "mdlm", "sampler": "ddim"}, "Unknown sampler 'ddim'. Did you mean 'ddpm'"),
        ({"threshold": 1.5}, "threshold=1.5 is no probability"),
        ({"threshold": 0.9, "steps": 4}, "leave out steps=4"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 is negative"),
        ({"steps": 0}, "steps=0; at least one"),
        ({"gen_length": -1}, "gen_length=-1 is negative"),
    ],
)
def test_settings_that_do_not_fit(llada: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sw.UserError, match=message):
        sw.generate(llada, torch.arange(4, 9)[None], **settings)


def test_a_model_without_a_mask_token(llada: nn.Module) -> None:
    model = copy.deepcopy(llada)
    model.config.mask_token_id = None
    with pytest.raises(sw.UserError, match="has no mask_token_id in its config; set"):
        sw.generate(model, torch.arange(4, 9)[None])


def test_prompts_that_do_not_fit(llada: nn.Module) -> None:
    with pytest.raises(sw.UserError, match="hold no prompts"):
        sw.generate(llada, torch.zeros(0, 5, dtype=torch.long))
    right = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(sw.UserError, match="padded on the right; pad on the left"):
        sw.generate(llada, torch.arange(4, 8)[None], attention_mask=right)
    with pytest.raises(sw.UserError, match="is not a masked diffusion model; leave out steps"):
        sw.generate(ROWS["llama"](), torch.arange(4, 8)[None], steps=4)
    with pytest.raises(sw.UserError, match="is not a masked diffusion model; leave out cfg_scale, family"):
        sw.generate(ROWS["llama"](), torch.arange(4, 8)[None], cfg_scale=1.0, family="llada")
    with pytest.raises(sw.UserError, match="cannot generate text"):
        sw.generate(ROWS["modernbert"](), torch.arange(4, 8)[None])
