"""Decoding beside a plain transcription of the official semantics, and the accounts that it keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.cost import price_blocks
from skipwise.examples import Size
from skipwise.plan import Phase, Plan
from skipwise.sampling.llada import LLaDASettings, Step, decode, transfer_quotas
from tests.deleted import deleted
from tests.tiny_models import ROWS

MASK = 3


@pytest.fixture(scope="module")
def llada() -> nn.Module:
    return ROWS["llada"]()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


def official(model: nn.Module, prompt: Tensor, attention_mask: Tensor, settings: LLaDASettings) -> Tensor:
    """LLaDA's `generate`, written out line by line from its description."""
    generator = torch.Generator().manual_seed(settings.seed)
    b, p = prompt.shape
    g, k = settings.gen_length, settings.block_length or settings.gen_length
    nb = g // k
    t = (settings.steps or g) // nb
    x = torch.full((b, p + g), MASK)
    x[:, :p] = prompt
    mask = torch.cat([attention_mask, torch.ones(b, g, dtype=torch.long)], 1)
    for block in range(nb):
        m = (x[:, p + block * k : p + (block + 1) * k] == MASK).sum(1)
        n = torch.zeros(b, t, dtype=torch.long) + (m // t)[:, None]
        for i in range(b):
            n[i, : int(m[i] % t)] += 1
        for i in range(t):
            masked = x == MASK
            with torch.no_grad():
                z = model(input_ids=x, attention_mask=mask).logits
            if settings.temperature == 0:
                noisy = z
            else:
                u = torch.rand(z.shape, dtype=torch.float64, generator=generator)
                noisy = z.double().exp() / (-torch.log(u)) ** settings.temperature
            x0 = noisy.argmax(-1)
            if settings.remasking == "low_confidence":
                conf = torch.softmax(z, -1).gather(-1, x0[..., None]).squeeze(-1)
            else:
                conf = torch.rand((b, p + g), generator=generator)
            conf[:, p + (block + 1) * k :] = -torch.inf
            x0 = torch.where(masked, x0, x)
            conf = torch.where(masked, conf, torch.tensor(-torch.inf, dtype=conf.dtype))
            for row in range(b):
                index = torch.topk(conf[row], k=int(n[row, i])).indices
                x[row, index] = x0[row, index]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("steps", "block_length"), [(None, None), (6, 4), (4, 12), (24, 6)])
def test_compat_is_the_official_semantics(
    dtype: torch.dtype, remasking: Any, temperature: float, steps: int | None, block_length: int | None
) -> None:
    model = ROWS["llada"]().to(dtype)
    prompt = torch.tensor([[0, 0, 9, 10, 11], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = LLaDASettings(12, steps, block_length, temperature, remasking, compat="llada", seed=5)
    assert torch.equal(decode(model, prompt, MASK, settings, mask), official(model, prompt, mask, settings))


def test_default_differs_from_compat_only_by_rounding(llada: nn.Module) -> None:
    """In float32 the two agree; in bfloat16 confidences tie, and the default decides in float32 instead."""
    prompt = torch.arange(4, 24).view(4, 5)
    settings = [LLaDASettings(12, 6, 6, compat=compat) for compat in (None, "llada")]
    plain, compat = (decode(llada, prompt, MASK, s) for s in settings)
    assert torch.equal(plain, compat)
    low = ROWS["llada"]().to(torch.bfloat16)
    plain, compat = (decode(low, prompt, MASK, s) for s in settings)
    assert not torch.equal(plain, compat)


def test_quotas() -> None:
    assert transfer_quotas(torch.tensor([7, 4, 0]), 3).tolist() == [[3, 2, 2], [2, 1, 1], [0, 0, 0]]


def test_every_step_commits_its_quota_inside_its_block(llada: nn.Module) -> None:
    seen: list[Tensor] = []
    prompt = torch.arange(4, 14).view(2, 5)
    decode(llada, prompt, MASK, LLaDASettings(8, 4, 4), on_step=lambda step: seen.append(step.sequences.clone()))
    masked = [(x[:, 5:] == MASK) for x in seen]
    assert [m.sum(1).tolist() for m in masked] == [[8, 8], [6, 6], [4, 4], [2, 2]]
    assert masked[2][:, :4].sum() == 0, "the first block is finished before the second begins"


def test_left_padded_rows_equal_single_runs(trained: tuple[nn.Module, Any]) -> None:
    model, tokenizer = trained
    prompts = ["s3141592=", "7*3=", "c7+5*3-1="]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = sw.generate(model, batch["input_ids"], attention_mask=batch["attention_mask"], gen_length=7)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert torch.equal(sw.generate(model, ids, gen_length=7).sequences[0, -7:], together.sequences[row, -7:])


def test_the_trained_model_answers(trained: tuple[nn.Module, Any]) -> None:
    model, tokenizer = trained
    ids = torch.tensor([tokenizer("s3141592=")["input_ids"]])
    assert tokenizer.decode(sw.generate(model, ids, gen_length=7).sequences[0]) == "s3141592=1123459"


def test_temperature_is_seeded(llada: nn.Module) -> None:
    prompt = torch.arange(4, 14).view(2, 5)
    draws = [sw.generate(llada, prompt, gen_length=8, temperature=1.0, seed=seed).sequences for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gumbel_samples_follow_the_softmax() -> None:
    """At temperature 1 the chosen token is a draw from the model's distribution."""
    from skipwise.sampling.llada import _choose

    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 1, 3)
    drawn = _choose(logits, 1.0, torch.Generator().manual_seed(0)).flatten()
    frequencies = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(frequencies, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.012)


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
    assert generated.stats.whole_all_in_flops == 2 * 8 * prices.forward().flops
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
        ({"remasking": "high"}, "remasking='high' is unknown"),
        ({"compat": "dream"}, "compat='dream' is unknown"),
        ({"stepz": 4}, "stepz.*a diffusion model takes gen_length, steps"),
    ],
)
def test_settings_that_do_not_fit(llada: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sw.UserError, match=message):
        sw.generate(llada, torch.arange(4, 9)[None], **settings)


def test_prompts_that_do_not_fit(llada: nn.Module) -> None:
    with pytest.raises(sw.UserError, match="hold no prompts"):
        sw.generate(llada, torch.zeros(0, 5, dtype=torch.long))
    right = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(sw.UserError, match="padded on the right; pad on the left"):
        sw.generate(llada, torch.arange(4, 8)[None], attention_mask=right)
    with pytest.raises(sw.UserError, match="is not a masked diffusion model; leave out steps"):
        sw.generate(ROWS["llama"](), torch.arange(4, 8)[None], steps=4)
    with pytest.raises(sw.UserError, match="cannot generate text"):
        sw.generate(ROWS["modernbert"](), torch.arange(4, 8)[None])
