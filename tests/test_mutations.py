"""Damaged files and odd settings: taken, or refused in one line; never a traceback, never for ever."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skipwise as sw
from skipwise.analysis import Comparison
from skipwise.analysis.record import Analysis
from skipwise.errors import UserError
from skipwise.evaluation.result import Result
from skipwise.finetuning.residuals import ResidualStore
from skipwise.plan import Plan
from tests.test_crashes import SHAPE, adapter, analysis, comparison, plan, store
from tests.test_residuals import SETTINGS
from tests.tiny_models import ROWS

MANY = [25, pytest.param(160, marks=pytest.mark.slow)]  # of each kind of file; four times as many settings
DEEP: Any = json.loads("[" * 40 + "]" * 40)
ODD = st.sampled_from(
    [None, True, [], {}, "", "x", 0, -1, 1e400, float("nan"), 2**70, 1.5, [[]], {"a": 1}, DEEP, "\ud800", "a/../b"]
)


def mutated(content: Any, draw: st.DataObject) -> Any:
    """The JSON value with something in it replaced, taken away or added."""
    if isinstance(content, dict) and content and draw.draw(st.integers(0, 3)):
        key = draw.draw(st.sampled_from(sorted(content)))
        how = draw.draw(st.sampled_from(["into", "into", "drop", "rename", "add"]))
        rest = {name: value for name, value in content.items() if name != key}
        if how == "into":
            return content | {key: mutated(content[key], draw)}
        return rest if how == "drop" else (rest | {f"{key}x": content[key]} if how == "rename" else content | {"x": 1})
    if isinstance(content, list) and content and draw.draw(st.integers(0, 3)):
        place = draw.draw(st.integers(0, len(content) - 1))
        return [*content[:place], mutated(content[place], draw), *content[place + 1 :]]
    return draw.draw(ODD)


def damage(path: Path, draw: st.DataObject) -> None:
    """Change a file of JSON, as JSON or as bytes."""
    before = path.read_bytes()
    how = draw.draw(st.sampled_from(["json", "json", "json", "cut", "byte", "deep"]))
    if how == "json":
        path.write_text(json.dumps(mutated(json.loads(before), draw)), encoding="utf-8", errors="surrogatepass")
    elif how == "deep":
        path.write_text("[" * 100_000)
    else:
        place = draw.draw(st.integers(0, len(before) - 1))
        path.write_bytes(before[:place] if how == "cut" else before[:place] + b"\xff" + before[place + 1 :])


def use_plan(folder: Path) -> object:
    found = Plan.load(folder / "plan.json")
    return found.describe(), found.stand_in_tensors(), found.adapter_folder(), found.check_model(SHAPE)


def use_analysis(folder: Path) -> object:
    return sw.make_plan(Analysis.load(folder), method="similarity", skip=1)


def result(folder: Path) -> None:
    score = {"metric": "exact match", "value": {"value": 1.0, "low": 1.0, "high": 1.0}}
    row = {"plan": None, "scores": {"sort": score}}
    (folder / "result.json").write_text(json.dumps({"format": "skipwise-result/1", "rows": [row]}))


def llada(folder: Path) -> None:
    ROWS["llada"]().save_pretrained(folder)


FILES: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], object]]] = {
    "a plan": (plan(1), "plan.json", use_plan),
    "an adapter": (lambda f: adapter(f / "a", 1), "a/adapter_config.json", lambda f: with_adapter(f / "a")),
    "an analysis": (analysis(0.5), "analysis.json", use_analysis),
    "a comparison": (comparison(0.5), "comparison.json", Comparison.load),
    "a result": (result, "result.json", lambda folder: Result.load(folder / "result.json")),
    "a store of records": (store(range(2)), "store.json", lambda folder: ResidualStore.open(folder, SETTINGS)),
    "a model's config": (llada, "config.json", lambda folder: sw.load(str(folder))),
}


def with_adapter(folder: Path) -> None:
    model = ROWS["llama"]()
    with sw.skip(model, Plan.static(sw.find_contract(model).shape, {}).with_adapter(folder)):
        pass


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind: str, many: int, tmp_path: Path) -> None:
    make, name, use = FILES[kind]
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)

    @settings(max_examples=many, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage(folder / name, draw)
        with torch.random.fork_rng():
            check(lambda: use(folder))

    run()


def check(act: Callable[[], object]) -> None:
    """It ends well, or in one line."""
    told = ""
    try:
        act()
    except UserError as error:
        told = str(error)
    assert "\n" not in told, told


VALUES = st.sampled_from(
    [None, True, 0, 1, 2, 3, 4, -1, 1.5, 0.5, float("nan"), float("inf"), -0.0, 1e-9, 1e9, "x", "4", [], {}, 2**70]
)
NAMES = {
    "llada": [
        "steps",
        "block_length",
        "temperature",
        "remasking",
        "threshold",
        "cfg_scale",
        "cache",
        "refresh",
        "focus",
    ],
    "dream": ["steps", "alg", "alg_temp", "temperature", "top_p", "top_k", "eps", "eos_penalty"],
    "mdlm": ["steps", "sampler", "noise_dtype"],
}


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("family", NAMES)
def test_odd_settings_are_taken_or_refused_in_one_line(family: str, many: int) -> None:
    model = ROWS["llada"]()
    ids = torch.tensor([[5, 6, 7]])

    @settings(max_examples=4 * many, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from([*NAMES[family], "gen_length", "seed", "compat"]), VALUES, max_size=3))
    def run(given: dict[str, Any]) -> None:
        check(lambda: sw.generate(model, ids, family=family, **{"gen_length": 4, "steps": 4, **given}))

    run()


def test_names_out_of_a_list_have_a_nearest() -> None:
    from skipwise.scheduling.front import FrontSettings

    with pytest.raises(UserError, match=r"Unknown stand_in 'lineer'\. Did you mean 'linear'"):
        FrontSettings(stand_in="lineer")  # type: ignore[arg-type]
