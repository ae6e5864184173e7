"""`skipwise bench`: its JSON keeps to the documented schema, and its numbers are those of what ran."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.benchmarking import BenchResult, BenchSettings, bench, ceiling, memory, subject
from skipwise.benchmarking.modes import modes
from skipwise.benchmarking.result import Ceiling, Interval, Machine, Row, Workload
from skipwise.benchmarking.subject import prepare
from skipwise.benchmarking.timing import in_turns, ratio
from skipwise.blocks import find_contract
from skipwise.errors import UserError
from skipwise.plan import Plan

DOCS = Path(__file__).parent.parent / "docs" / "bench.md"
CPU = torch.device("cpu")
SHORT = {"prompt_length": 8, "gen_length": 8, "rounds": 1}
QUICK = ["--prompt-length", "8", "--gen-length", "8", "--rounds", "2"]


@pytest.fixture
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> Ceiling:
    """Measuring it takes seconds."""
    found = Ceiling(dtype="float32", matrix_flops=1e9, matrix_size=64, bandwidth=1e8, bandwidth_by="copy")
    monkeypatch.setattr("skipwise.benchmarking.run.measure_ceiling", lambda *_: found)
    return found


def half_plan(model: Any) -> Plan:
    contract = find_contract(model)
    stack = contract.main_stack
    return Plan.static(contract.shape, {stack: range(1, contract.stacks[stack].length, 2)})


def test_the_last_line_is_the_documented_object(skipwise: Any, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, out, _ = skipwise("bench", "tiny-dllm", *QUICK, "--json", file)
    assert code == 0
    line = out.splitlines()[-1]
    result = BenchResult.model_validate_json(line)
    assert file.read_text().strip() == line
    assert [row.mode for row in result.rows][:2] == ["exact", "threshold"]
    assert result.workload.weights == "trained"
    assert result.workload.gen_length == 8
    assert result.ceiling.matrix_flops > 1e8
    assert all(0 < row.share_of_matrix_rate < 2 for row in result.rows)
    assert "tokens/s" in out
    with pytest.raises(ValueError, match="extra"):
        BenchResult.model_validate({**json.loads(line), "more": 1})


@pytest.mark.parametrize("model", [BenchResult, Machine, Ceiling, Workload, Row, Interval])
def test_every_field_is_described_where_it_is_documented(model: Any) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, about in model.model_json_schema()["properties"].items():
        assert f"| `{name}` |" in text
        assert about["description"] in text


def test_rows_are_of_what_generate_does(known_ceiling: Ceiling) -> None:
    """Exact first; FLOPs, forwards and tokens under a plan are `generate`'s own; shares follow from the ceiling."""
    chosen = prepare("tiny-dllm")
    plan = half_plan(chosen.model)
    result = bench(chosen, plan, BenchSettings(**SHORT, batch=2, block_length=4))
    rows = {row.mode: row for row in result.rows}
    single = ["threshold", "prefix", "dual", "delayed", "interval", "focus", "dual, threshold"]
    assert list(rows) == ["exact", *single, "plan", *(f"{name} + plan" for name in single)]
    assert [row.mode for row in result.rows if row.exact] == ["exact"]
    flops = [rows[name].block_flops for name in ("delayed", "dual", "prefix", "exact")]
    assert flops == sorted(set(flops))
    inputs = subject.prompts(chosen, 2, 8)
    settings = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
    exact = sw.generate(chosen.model, inputs, **settings)
    planned = sw.generate(chosen.model, inputs, plan=plan, **settings)
    row = rows["plan"]
    assert (row.forwards, row.block_flops) == (planned.stats.forwards, planned.stats.block_flops)
    assert row.block_flops * 2 == rows["exact"].block_flops
    assert row.agreement == float((planned.sequences == exact.sequences)[:, 8:].double().mean())
    assert row.forwards_per_token == planned.stats.forwards / 8
    assert row.tokens_per_second == pytest.approx(16 / row.seconds)
    assert row.share_of_matrix_rate == pytest.approx(
        (row.all_in_flops - planned.stats.spared_flops) / row.seconds / 1e9
    )
    weights = 4 * sum(p.numel() for p in chosen.model.parameters())
    table = 4 * chosen.model.model.embed_tokens.weight.numel()
    whole = rows["exact"]
    assert whole.share_of_bandwidth == pytest.approx(whole.forwards * (weights - table) / whole.seconds / 1e8)
    assert whole.seconds_to_exact.value == 1
    assert rows["plan"].share_of_bandwidth * row.seconds < 0.6 * whole.share_of_bandwidth * whole.seconds


def test_a_model_that_goes_token_by_token(known_ceiling: Ceiling, skipwise: Any) -> None:
    """Modes of diffusion are left out, and the prompt's forward is not in the tokens a second."""
    chosen = prepare("tiny-ar")
    result = bench(chosen, half_plan(chosen.model), BenchSettings(**SHORT))
    assert [row.mode for row in result.rows] == ["exact", "plan"]
    assert result.workload.family == "autoregressive"
    for row in result.rows:
        assert row.forwards == 8
        assert row.tokens_per_second > 8 / row.seconds * 7 / 8
    code, _, err = skipwise("bench", "tiny-ar", "--block-length", 4)
    assert code == 2
    assert err.count("\n") == 1
    assert "block_length=4" in err


def test_compiled_is_timed_when_asked() -> None:
    """It is exact decoding; under a plan it is not; a model that goes token by token has no such mode."""
    chosen = prepare("tiny-dllm").model
    found = modes(chosen, "llada", half_plan(chosen), compile=True)
    assert [mode.name for mode in found if mode.exact] == ["exact", "compiled"]
    assert [mode.settings for mode in found if mode.name.startswith("compiled")] == [{"compile": True}] * 2
    assert not any(mode.settings for mode in modes(prepare("tiny-ar").model, "autoregressive", None, compile=True))


@pytest.mark.parametrize("name", ["tiny-text", "tiny-ar2dllm"])
def test_other_families(name: str, known_ceiling: Ceiling) -> None:
    """Any masked diffusion model is decoded block by block, and by its own sampler when asked."""
    chosen = prepare(name)
    result = bench(chosen, None, BenchSettings(**SHORT))
    assert result.workload.block_length == 8
    own = bench(chosen, None, BenchSettings(**SHORT, family=chosen.model.family))
    assert [row.mode for row in own.rows] == ["exact"]
    assert own.workload.block_length is None


def test_random_weights_need_a_config_alone(known_ceiling: Ceiling, tmp_path: Path) -> None:
    source = Path(sw.__file__).parent / "zoo" / "weights" / "tiny-text" / "config.json"
    shutil.copy(source, tmp_path)
    chosen = prepare(str(tmp_path), random=True, dtype="bfloat16")
    assert chosen.dtype == torch.bfloat16
    result = bench(chosen, None, BenchSettings(**SHORT))
    assert (result.workload.weights, result.workload.architecture) == ("random", "MDLM")
    ids = subject.prompts(chosen, 4, 50)
    assert not (ids == chosen.model.config.mask_token_id).any()


def test_a_model_that_does_not_fit_is_refused(skipwise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipwise.benchmarking.subject.available_bytes", lambda device: 10 * 2**30)
    code, _, err = skipwise("bench", "llada-8b", "--random-weights", "--device", "cpu", "--dtype", "bfloat16")
    assert code == 2
    assert err.count("\n") == 1
    assert "14.93 GiB" in err
    assert "10 GiB" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tiny-dllm", "--gen-length", "65"], "64"),
        (["tiny-dllm", "--family", "lada"], "'llada'"),
        (["llada-8b"], "--random-weights"),
        (["sana-1.6b", "--random-weights"], "SanaTransformer2DModel"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], named: str, skipwise: Any) -> None:
    code, _, err = skipwise("bench", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert named in err


def test_turns_alternate_and_warmup_is_left_out() -> None:
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == list("baabba")
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_ratio_is_of_pairs() -> None:
    """A slow round slows both: the ratio is that of each round, not of the medians."""
    few = ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])
    assert (few.value, few.low, few.high, few.pairs) == (2.0, 2.0, 3.0, 3)
    many = ratio([2.0] * 10, [1.0] * 10)
    assert (many.low, many.value, many.high) == (2.0, 2.0, 2.0)


def test_peak_memory_sees_what_is_gone_again() -> None:
    with memory.measuring_peak(CPU) as peak:
        torch.ones(2**24).sum()  # 64 MiB
    assert peak.bytes is None or 60 * 2**20 < peak.bytes < 100 * 2**20
    free = memory.available_bytes(CPU)
    assert free is None or free > 2**27


def test_rates_are_of_the_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 1 second a call, the rates are FLOPs and bytes of one call."""
    monkeypatch.setattr(ceiling, "_best", lambda call, device, seconds: (call(), 1.0)[1])
    assert ceiling.matrix_rate(CPU, torch.float32, 16, 0) == 2 * 16**3
    assert ceiling.bandwidths(CPU, 4096, 0) == {"copy": 8192, "read": 4096}


def test_lengths_fit_the_model() -> None:
    model = prepare("tiny-dllm").model
    assert subject.lengths(model, None, None) == (32, 32)
    assert subject.lengths(model, None, 60) == (4, 60)
    with pytest.raises(UserError, match="64"):
        subject.lengths(model, 60, 5)
