"""Laws of schedules: what runs at which step, whoever decodes; placements by name, by segments and by lengths."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.plan import ModelShape, Phase, Plan
from skipwise.planners.sandwich import PLACEMENTS, from_lengths, from_segments, schedule
from skipwise.sampling import Step
from tests.tiny_models import ROWS

SHAPE = ModelShape(architecture="Any", stacks={"blocks": 4}, hidden_size=8)
SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("llada", {"block_length": 4}),
    ("llada", {"temperature": 0.7}),
    ("llada", {"threshold": 0.2}),
    ("llada", {"cfg_scale": 0.5}),
    ("llada", {"compat": "llada"}),
    ("dream", {"alg": "entropy"}),
    ("dream", {"alg": "origin", "temperature": 1.0, "steps": 6}),
    ("dream", {"compat": "dream", "alg": "maskgit_plus"}),
    ("mdlm", {"sampler": "first_hitting"}),
    ("mdlm", {"sampler": "first_hitting", "steps": 6}),
    ("mdlm", {"sampler": "ddpm", "steps": 9}),
    ("mdlm", {"sampler": "ddpm_cache", "steps": 30}),
    ("mdlm", {"compat": "mdlm", "steps": 9}),
]
NAMES = [f"{family}-{'-'.join(map(str, settings.values()))}" for family, settings in SAMPLERS]


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A model, and one of the same kind with other weights."""
    heavy = ROWS[family]()
    light = copy.deepcopy(heavy)
    torch.manual_seed(7)
    for parameter in light.parameters():
        nn.init.normal_(parameter, std=0.5)
    return heavy, light


def write(model: nn.Module, settings: dict[str, Any], plan: Plan | None = None, rows: int = 2, **others: Any) -> Any:
    prompts = torch.tensor([[5, 6], [7, 8]])[:rows]
    options = {"gen_length": 8, "seed": 3, "stop_at_eos": False} | settings
    return sw.generate(model, prompts, plan=plan, **options, **others)


def plan_of(model: nn.Module, *phases: Phase) -> Plan:
    return Plan(model=find_contract(model).shape, phases=phases)


@pytest.mark.parametrize(("family", "settings"), SAMPLERS, ids=NAMES)
def test_all_heavy_is_no_plan_and_all_light_is_the_light_model(family: str, settings: dict[str, Any]) -> None:
    heavy, light = pair(family)
    alone, alone_light = write(heavy, settings), write(light, settings)
    assert not torch.equal(alone.sequences, alone_light.sequences)
    under = write(heavy, settings, plan_of(heavy, Phase()))
    assert torch.equal(under.sequences, alone.sequences)
    assert under.stats.forwards == alone.stats.forwards
    handed = write(heavy, settings, plan_of(heavy, Phase(model="light")), others={"light": light})
    assert torch.equal(handed.sequences, alone_light.sequences)
    assert handed.stats.forwards == alone_light.stats.forwards
    assert set(handed.stats.by_model) == {"light"}


@pytest.mark.parametrize(("family", "settings"), SAMPLERS, ids=NAMES)
def test_forwards_counted_are_forwards_made(family: str, settings: dict[str, Any]) -> None:
    heavy, light = pair(family)
    for model in (heavy, light):
        write(model, settings)  # prices and the contract are found by calls of their own, once
    made: dict[str | None, list[int]] = {None: [], "light": []}
    for name, model in ((None, heavy), ("light", light)):
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: made[name].append(len(kwargs["input_ids"])), with_kwargs=True
        )
    progress: list[tuple[float, int, int]] = []

    def note(step: Step) -> None:  # called before the forward
        progress.append((step.progress, len(made[None]), len(made["light"])))

    phases = (Phase(until=0.25, model="light"), Phase(until=0.75), Phase(model="light"))
    out = write(heavy, settings, plan_of(heavy, *phases), others={"light": light}, on_step=note)
    assert {name: (share.forwards, share.rows) for name, share in out.stats.by_model.items()} == {
        name: (len(rows), sum(rows)) for name, rows in made.items() if rows
    }
    assert out.stats.forwards == len(progress) == sum(map(len, made.values()))
    assert made[None], "the heavy model ran"
    assert made["light"], "the light one too"
    after = [*progress[1:], (1.0, len(made[None]), len(made["light"]))]
    for (at, heavy_before, light_before), (_, heavy_after, light_after) in zip(progress, after, strict=True):
        inside = 0.25 <= at < 0.75
        assert (heavy_after - heavy_before, light_after - light_before) == ((1, 0) if inside else (0, 1)), at


class _Stopped(Exception):  # noqa: N818
    pass


def halfway(model: nn.Module, settings: dict[str, Any], steps: int) -> Tensor:
    """The sequences after this many steps of the model alone."""
    seen: list[Tensor] = []

    def note(step: Step) -> None:
        seen.append(step.sequences.clone())
        if len(seen) > steps:
            raise _Stopped

    with pytest.raises(_Stopped):
        write(model, settings, rows=1, on_step=note)
    return seen[steps]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llada", {}),
        ("llada", {"temperature": 0.7}),
        ("dream", {"alg": "entropy"}),
        ("mdlm", {"steps": 8}),
    ],
)
@pytest.mark.parametrize("k", [1, 4, 7])
def test_a_plan_switched_at_step_k_is_two_halves_by_hand(family: str, settings: dict[str, Any], k: int) -> None:
    heavy, light = pair(family)
    plan = plan_of(heavy, Phase(until=k / 8, model="light"), Phase())
    switched = write(heavy, settings, plan, rows=1, others={"light": light})
    first = [p for p in _progress(light, settings) if p < k / 8]
    half = halfway(light, settings, len(first))
    rest = {**settings, "gen_length": 0, "seed": 3, "stop_at_eos": False}
    if family != "mdlm":
        rest["steps"] = 8 - k
    by_hand = sw.generate(heavy, half, **rest).sequences
    assert torch.equal(switched.sequences, by_hand)
    assert not torch.equal(switched.sequences, write(heavy, settings, rows=1).sequences)


def _progress(model: nn.Module, settings: dict[str, Any]) -> list[float]:
    seen: list[float] = []
    write(model, settings, rows=1, on_step=lambda step: seen.append(step.progress))
    return seen


def test_a_named_model_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipwise.sampling import others

    model, tokenizer = sw.load("tiny-dllm")
    loads: list[str] = []
    load = others.load
    monkeypatch.setattr(others, "load", lambda name, **how: (loads.append(name), load(name, **how))[1])
    plan = plan_of(model, Phase(until=0.5, model="tiny-ar2dllm"), Phase())
    ids = tokenizer(["s3141592="], return_tensors="pt")["input_ids"]
    first = sw.generate(model, ids, plan=plan, gen_length=7)
    second = sw.generate(model, ids, plan=plan, gen_length=7)
    assert loads == ["tiny-ar2dllm"]
    assert torch.equal(first.sequences, second.sequences)
    assert {name: share.forwards for name, share in first.stats.by_model.items()} == {"tiny-ar2dllm": 4, None: 3}


def test_models_that_cannot_take_over_are_refused() -> None:
    heavy, _ = pair("mdlm")
    plan = plan_of(heavy, Phase(model="light"))
    with pytest.raises(sw.UserError, match="Unknown model 'light'"):
        write(heavy, {}, plan)
    for other, said in (
        (ROWS["llama"](), "light is a LlamaForCausalLM, which cannot denoise"),
        (ROWS["llada"](), "light has"),
    ):
        with pytest.raises(sw.UserError, match=said):
            write(heavy, {}, plan, others={"light": other})
    with pytest.raises(sw.UserError, match=r"'light', which `skip` cannot run; `skipwise.generate` can"):
        sw.skip(heavy, plan).__enter__()
    with pytest.raises(sw.UserError, match="A phase runs light and skips blocks too"):
        Plan.parse({"model": SHAPE, "phases": [{"model": "light", "skip": {"blocks": [1]}}]})


def test_another_tokenizer_is_refused() -> None:
    from skipwise.sampling.others import check_tokens

    heavy, light = pair("llada")
    _, tokenizer = sw.load("tiny-dllm")
    other = copy.deepcopy(tokenizer)
    check_tokens(heavy, light, "light", tokenizer, other)
    other.add_tokens(["x"])
    with pytest.raises(sw.UserError, match="light has another tokenizer"):
        check_tokens(heavy, light, "light", tokenizer, other)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_placements_keep_their_share(placement: str, share: float) -> None:
    plan = schedule(SHAPE, "light", placement, share)
    begins = (0.0, *(phase.until for phase in plan.phases))
    light = sum(phase.until - begin for phase, begin in zip(plan.phases, begins, strict=False) if phase.model)
    assert light == pytest.approx(share)
    assert len(plan.phases) == 1 or all(a.model != b.model for a, b in zip(plan.phases, plan.phases[1:], strict=False))


@pytest.mark.parametrize(
    ("placement", "where"),
    [
        ("first", [(0.0, 0.25)]),
        ("last", [(0.75, 1.0)]),
        ("middle", [(0.375, 0.625)]),
        ("sandwich", [(0.0, 0.125), (0.875, 1.0)]),
        ("spread", [(n / 8, n / 8 + 1 / 32) for n in range(8)]),
    ],
)
def test_where_placements_are_light(placement: str, where: list[tuple[float, float]]) -> None:
    plan = schedule(SHAPE, "light", placement, 0.25)
    for number in range(64):
        at = (number + 0.5) / 64
        assert (plan.phase_at(at).model == "light") == any(begin <= at < end for begin, end in where), at


def test_segments_and_lengths() -> None:
    plan = from_segments(SHAPE, "LHHL", "light", expected=4)
    assert [(phase.until, phase.model) for phase in plan.phases] == [(0.25, "light"), (0.75, None), (1.0, "light")]
    papers = from_lengths(SHAPE, "L125-H750-L125", "light")
    assert papers.phases == schedule(SHAPE, "light", "sandwich", 0.25).phases
    assert papers.made_by.settings == {"schedule": "L125-H750-L125"}


def test_a_static_plan_can_be_what_is_light() -> None:
    model = ROWS["llada"]()
    shape, stack = find_contract(model).shape, find_contract(model).main_stack
    static = Plan.static(shape, {stack: [1, 2]})
    plan = from_segments(shape, "LHL", static)
    assert [phase.skip for phase in plan.phases] == [{stack: (1, 2)}, {}, {stack: (1, 2)}]
    width = shape.hidden_size
    stand_ins = {f"phase0/{stack}/{block}/bias": torch.full((width,), float(block)) for block in (1, 2)}
    with_stand_ins = from_segments(shape, "LHL", static.with_stand_ins("constant", stand_ins))
    assert [phase.stand_in for phase in with_stand_ins.phases] == ["constant", None, "constant"]
    tensors = with_stand_ins.stand_in_tensors()
    assert set(tensors) == {f"phase{phase}/{stack}/{block}/bias" for phase in (0, 2) for block in (1, 2)}
    assert torch.equal(tensors[f"phase2/{stack}/2/bias"], torch.full((width,), 2.0))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: schedule(SHAPE, "light", "sandwitch"), "Unknown placement 'sandwitch'. Did you mean 'sandwich'"),
        (lambda: schedule(SHAPE, "light", share=1.5), "share=1.5 is no part of a trajectory"),
        (lambda: from_segments(SHAPE, "LXH", "light"), "'LXH' is no schedule"),
        (lambda: from_segments(SHAPE, "LHL", "light", expected=8), "LHL has 3 segments, not 8"),
        (lambda: from_lengths(SHAPE, "L125-750", "light"), "'L125-750' is no schedule"),
        (lambda: from_lengths(SHAPE, "L0", "light"), "'L0' is no schedule"),
        (
            lambda: schedule(SHAPE, Plan(model=SHAPE, phases=(Phase(until=0.5, skip={"blocks": (1,)}), Phase()))),
            "is a static plan without an adapter",
        ),
        (lambda: schedule(ModelShape(architecture="B", stacks={}, hidden_size=1), Plan(model=SHAPE)), "was made for"),
    ],
)
def test_what_is_no_schedule_is_refused(call: Any, said: str) -> None:
    with pytest.raises(sw.UserError, match=said):
        call()


def test_the_command_writes_plans(skipwise, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, static = tmp_path / "plan.json", tmp_path / "static.json"
    command = ["schedule", "plan", "tiny-dllm", "-o", out]
    code, said, _ = skipwise(*command, "--light", "tiny-ar2dllm", "--share", 0.5)
    assert code == 0
    assert "until 0.25 run tiny-ar2dllm | until 0.75 run all blocks | until 1 run tiny-ar2dllm" in said
    assert Plan.load(out).phases == schedule(Plan.load(out).model, "tiny-ar2dllm", "sandwich", 0.5).phases
    model, _ = sw.load("tiny-dllm")
    Plan.static(find_contract(model).shape, {"model.layers": range(12)}).save(static)
    light = [*command, "--light", static]

    def saves(*more: object) -> str:
        return " ".join(skipwise(*light, *more)[1].split())

    assert "saves 10.0% of block FLOPs" in saves("--placement", "first", "--budget", 0.1)
    assert Plan.load(out).phases[0].until == pytest.approx(0.2)
    assert "saves 25.0% of block FLOPs" in saves("--segments", "LHHL")
    assert "saves 12.5% of block FLOPs" in saves("--schedule", "L125-H750-L125")


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--budget", 1], "cannot be met: all steps light save 0.0000"),
        (["--segments", "LH", "--placement", "first"], "exclude one another"),
        (["--segments", "LH", "--share", 0.1], "says already which steps are light"),
        (["--share", 0.1, "--budget", 0.1], "exclude one another"),
        (["--placement", "sandwhich"], "Did you mean 'sandwich'"),
        (["--light", "tiny-ar"], "tiny-ar is a LlamaForCausalLM, which cannot denoise"),
        (["--light", "nothing.json"], "There is no plan at nothing.json"),
    ],
)
def test_mistakes_are_one_line(skipwise, tmp_path: Path, more: list[Any], complaint: str) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "plan.json"
    code, _, said = skipwise("schedule", "plan", "tiny-dllm", "-o", out, "--light", "tiny-ar2dllm", *more)
    assert code == 2
    assert complaint in said
    assert not out.exists()


def test_generate_needs_nothing_but_the_plan(skipwise, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "plan.json"
    skipwise("schedule", "plan", "tiny-dllm", "--light", "tiny-ar2dllm", "--segments", "LHHL", "-o", out)
    said = skipwise("generate", "tiny-dllm", "s3141592=", "--gen-length", 8, "--plan", out)[1]
    assert "8 forwards (4 of tiny-ar2dllm, 4 of the model itself)" in said
