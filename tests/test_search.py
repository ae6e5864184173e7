"""The search over schedules: equal on every engine, whole after a kill, and honest about the best of many."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from skipwise.blocks import find_contract
from skipwise.cli.search import command
from skipwise.errors import UserError
from skipwise.evaluation import Result
from skipwise.evaluation.measure import Measured
from skipwise.evaluation.tasks import ExactMatch
from skipwise.evaluation.text import TextTask
from skipwise.loading import load_skeleton
from skipwise.plan import Plan
from skipwise.scheduling.candidates import Space
from skipwise.scheduling.engine import Workers, open_engine, run
from skipwise.scheduling.halving import halve, round_ends
from skipwise.scheduling.search import search_schedules
from skipwise.scheduling.store import Store
from skipwise.scheduling.table import Search
from skipwise.scheduling.trials import Outcome, Trial, Work
from skipwise.scheduling.workers import ATTEMPTS, Answering, Failed, TrialError
from tests.known_task import Known, calls
from tests.tiny_models import ROWS

ZOO = "tiny-dllm"
ENGINES = ("inline", "processes", "ray")
RULES = {"segments": 8, "light_segments": 2, "examples": 64, "finalists": 3, "confirm": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a model of 4 blocks, for the task that does not look at its weights."""
    folder = tmp_path_factory.mktemp("model")
    network = ROWS["mdlm"]()
    (folder / "config.json").write_text(json.dumps(network.config.to_official()))
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def light(model) -> Plan:
    """That model without two of its blocks."""
    return Plan.static(find_contract(load_skeleton(model)).shape, {"blocks": [1, 2]})


@pytest.fixture(scope="module")
def zoo_light() -> Plan:
    """The zoo's model without four of its blocks."""
    return Plan.static(find_contract(load_skeleton(ZOO)).shape, {"model.layers": [4, 5, 12, 13]})


@pytest.fixture
def known_search(model, light) -> Callable[..., Search]:
    """A search with the task whose answer is known, which notes its calls in a folder."""

    def search(notes: Path, **others: Any) -> Search:
        notes.mkdir(exist_ok=True)
        return search_schedules(model, light, [Known(str(notes))], **RULES | others)

    return search


def table(found: Search) -> str:
    """All that must not depend on where trials ran, or on whether they ran at once."""
    return json.dumps([one.line() for one in found.found])


# --- trials


def test_ranges_add_up_to_the_whole(zoo_light):
    opened = Work(ZOO, (ExactMatch("sort", "calibration", 1, 0, 8),)).open()
    parts = [opened.run(Trial(zoo_light, begin, end)) for begin, end in ((0, 8), (8, 24))]
    together, whole = parts[0] + parts[1], opened.run(Trial(zoo_light, 0, 24))
    assert together.scores["sort"][0].outcomes == whole.scores["sort"][0].outcomes
    assert 0 < together.scores["sort"][0].value < 1
    assert together.block_flops == whole.block_flops > 0
    assert together.forwards == whole.forwards == {"": 3 * 7}
    back = Outcome.from_json(json.loads(json.dumps(together.to_json())))
    assert back.to_json() == together.to_json()


def test_threads_are_put_back_and_are_the_works_own(model, light, tmp_path):
    seen = []

    class Watching(Known):
        def run(self, denoiser, tokenizer):
            seen.append(torch.get_num_threads())
            return super().run(denoiser, tokenizer)

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        Work(model, (Watching(str(tmp_path)),)).open().run(Trial(light, 0, 4))
        assert seen == [1]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_key_is_the_trial_not_its_label(light):
    identity = {"model": "a"}
    key = Trial(light, 0, 8).key(identity)
    assert key == Trial(light, 0, 8, "another").key(identity)
    other = Plan.static(light.model, {"blocks": [1]})
    others = [Trial(light, 0, 9), Trial(light, 1, 8), Trial(None, 0, 8), Trial(other, 0, 8)]
    assert len({key, *(trial.key(identity) for trial in others), Trial(light, 0, 8).key({"model": "b"})}) == 6


def test_works_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="cannot be run by ranges"):
        Work(ZOO, (TextTask("moby-dick", "test", 2, 0),))
    with pytest.raises(UserError, match="different names"):
        Work(ZOO, (Known(str(tmp_path)), Known(str(tmp_path))))
    with pytest.raises(UserError, match="no denoising steps"):
        Work("tiny-ar", (Known(str(tmp_path)),)).open()


# --- halving


def fake_outcome(quality: float, begin: int, end: int) -> Outcome:
    draws = np.array([np.random.default_rng(i).random() for i in range(begin, end)])
    return Outcome({"fake": [Measured("exact match", (draws < quality).astype(float), np.ones(end - begin))]})


def fake_candidates(qualities: list[float]) -> list[Any]:
    return [SimpleNamespace(segments=str(i), plan=quality) for i, quality in enumerate(qualities)]


def test_halving_draws_every_example_once_and_stops_the_hopeless():
    ran: list[Trial] = []

    def run_all(trials, ahead):
        ran.extend(trials)
        return [fake_outcome(1.0 if trial.plan is None else trial.plan, trial.begin, trial.end) for trial in trials]

    qualities = [0.95, 0.1, 0.9, 0.15, 0.85, 0.2, 0.05, 0.12, 0.8, 0.11, 0.13, 0.02]
    standings = halve(fake_candidates(qualities), 64, 2, run_all)
    ranges: dict[str, list[tuple[int, int]]] = {}
    for trial in ran:
        ranges.setdefault(trial.label, []).append((trial.begin, trial.end))
    for row in ranges.values():
        assert row[0][0] == 0
        assert all(first[1] == second[0] for first, second in pairwise(row))
    assert ranges["whole model"][-1][1] == 64  # the whole model runs on the same examples
    assert [one.candidate.segments for one in standings[:2]] == ["0", "2"]
    assert [one.dropped for one in standings[:2]] == [None, None]
    reasons = Counter(one.dropped for one in standings)
    assert reasons["hopeless"] >= 1
    assert reasons["worse half"] >= 1
    hopeless = next(one for one in standings if one.dropped == "hopeless")
    halves = {one.candidate.segments for one in standings if one.dropped == "worse half"}
    # it was in the better half of its round and left all the same
    assert hopeless.kept < standings[1].kept
    assert any(hopeless.kept >= one.kept for one in standings if one.candidate.segments in halves)
    assert sum(trial.end - trial.begin for trial in ran) < 64 * len(qualities) / 2


def test_rounds_double_and_end_with_all():
    assert round_ends(28, 64, 4) == [8, 16, 32, 64]
    assert round_ends(3, 64, 4) == [64]
    assert round_ends(247, 64, 4) == [8, 8, 8, 8, 16, 32, 64]  # never fewer than 8 to begin with
    assert round_ends(28, 4, 4) == [4, 4, 4, 4]


def test_ties_go_by_the_order_of_the_candidates():
    def run_all(trials, ahead):
        return [fake_outcome(0.9 if trial.plan is None else trial.plan, trial.begin, trial.end) for trial in trials]

    standings = halve(fake_candidates([0.5] * 6), 16, 2, run_all)
    assert [one.candidate.segments for one in standings[:2]] == ["0", "1"]


# --- the search


def test_search_finds_the_best_and_confirms_it_on_fresh_examples(known_search, tmp_path):
    told: list[tuple[int, int]] = []
    found = known_search(tmp_path, on_progress=lambda *at: told.append(at))
    assert len(found.found) == 28
    assert found.best.segments == "LHHHHHHL"  # the cheapest two parts of known_task.LOSSES
    assert [one.rank for one in found.found] == list(range(1, 29))
    assert [one.dropped for one in found.found[:3]] == [None] * 3
    made = calls(tmp_path)
    assert Counter(made).most_common(1)[0][1] == 1  # no plan saw an example range twice
    fresh = [call for call in made if call[1] >= 64]
    assert {call[1:] for call in fresh} == {(64, 96)}
    assert all(end <= 64 for _, begin, end in made if begin < 64)
    assert len(fresh) == 1 + 3  # the whole model and the finalists, one of which is the sandwich
    confirmed = found.best.confirmed
    assert confirmed is not None
    assert confirmed.scores["known"].examples == 32
    assert confirmed.mean_retention.low <= confirmed.mean_retention.value <= confirmed.mean_retention.high
    assert [row.method for row in found.result.rows][:2] == ["whole model", "search LHHHHHHL"]
    assert confirmed.saved_block_flops == pytest.approx(2 / 8 * 2 / 4)
    assert told[-1][0] == told[-1][1]
    assert all(done <= total for done, total in told)


def test_the_sandwich_is_confirmed_beside_the_best(known_search, tmp_path):
    found = known_search(tmp_path, light_segments=3)
    assert found.result.rows[-1].method == "sandwich"
    assert [phase.until for phase in found.result.rows[-1].plan.phases] == [0.1875, 0.8125, 1.0]
    assert found.result.rows[-1].scores["known"].examples == 32


def test_files_of_a_search(known_search, tmp_path):
    found = known_search(tmp_path / "notes", folder=tmp_path / "search")
    folder = tmp_path / "search"
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["segments"] for row in rows] == [one.segments for one in found.found]
    assert rows[0]["confirmed known low"] <= rows[0]["confirmed known"]
    assert len((folder / "table.csv").read_text().splitlines()) == 29
    assert Result.load(folder / "result.json").rows[0].method == "whole model"
    assert Plan.load(folder / "plan.json").phases == found.best.plan.phases


def test_an_interrupted_search_goes_on_without_repeating_a_trial(known_search, tmp_path):
    reference = known_search(tmp_path / "reference")

    def interrupt(done: int, total: int) -> None:
        if done > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        known_search(tmp_path / "notes", folder=tmp_path / "search", on_progress=interrupt)
    finished = len((tmp_path / "search" / "trials.jsonl").read_bytes().splitlines())
    assert finished == len(calls(tmp_path / "notes")) > 5
    again = known_search(tmp_path / "notes", folder=tmp_path / "search")
    assert set(Counter(calls(tmp_path / "notes")).values()) == {1}
    assert table(again).replace(str(tmp_path / "notes"), "") == table(reference)
    made = len(calls(tmp_path / "notes"))
    known_search(tmp_path / "notes", folder=tmp_path / "search", confirm=16)
    # another number of examples to confirm on uses all trials of the search; the whole model and three finalists
    assert len(calls(tmp_path / "notes")) == made + 4


def test_two_processes_give_the_same_though_one_is_killed(known_search, tmp_path):
    reference = known_search(tmp_path / "reference")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "die").touch()
    found = known_search(notes, engine="processes", workers=2)
    assert table(found) == table(reference)
    assert found.result.rows[0].scores == reference.result.rows[0].scores
    times = Counter(calls(notes))
    assert sorted(times.values())[-2:] == [1, 2]  # one trial was lost, and run again
    assert not multiprocessing.active_children()


def test_an_exception_in_a_worker_is_raised_here(model, light, tmp_path):
    work = Work(model, (Known(str(tmp_path)),))
    with open_engine(work, "processes", 1) as engine:
        assert [outcome.forwards for _, outcome in engine.run([Trial(light, 0, 4)])] == [{"": 8}]
        with pytest.raises(TrialError, match=r"(?s)examples 10000 to 10001 failed.*there are no such examples"):
            list(engine.run([Trial(None, 10_000, 10_001)]))
        children = multiprocessing.active_children()
        assert len(children) == 1  # the same process all the time
    assert not children[0].is_alive()


# --- the engine's rules, on workers that do as they are told


class Scripted:
    """A pool whose workers answer with what the script says for a trial, one after the other; None is a death."""

    def __init__(self, script: dict[str, list[Any]]):
        self.script, self.given, self.started, self.stopped = script, {}, 0, 0

    def start(self):
        self.started += 1
        return self.started

    def give(self, worker, trial):
        self.given[worker] = trial

    def wait(self, workers):
        worker = max(workers)
        return worker, self.script[self.given.pop(worker).label].pop(0)

    def stop(self, worker):
        self.stopped += 1

    def close(self):
        pass


DONE = Outcome({}, {"": 1})


def test_a_dead_worker_loses_one_trial():
    pool = Scripted({"a": [DONE], "b": [None, DONE], "c": [DONE]})
    finished = list(Workers(pool, 2).run([Trial(None, 0, 1, label) for label in "abc"]))
    assert sorted(trial.label for trial, _ in finished) == ["a", "b", "c"]
    assert (pool.started, pool.stopped) == (3, 1)


def test_a_trial_that_kills_its_workers_is_given_up():
    pool = Scripted({"a": [None] * ATTEMPTS, "b": [DONE] * 9})
    with pytest.raises(UserError, match=r"died 3 times at a on examples 0 to 1; .* fewer workers"):
        list(Workers(pool, 1).run([Trial(None, 0, 1, "a"), Trial(None, 0, 1, "b")]))
    assert pool.script["b"] == [DONE] * 9


def test_a_mistake_is_not_tried_again():
    pool = Scripted({"a": [Failed("no such model", True)], "b": [DONE]})
    with pytest.raises(UserError, match=r"^no such model$"):
        list(Workers(pool, 2).run([Trial(None, 0, 1, "a"), Trial(None, 0, 1, "b")]))
    failed = Answering(Work("no-such-model", (Known("."),)))(Trial(None, 0, 1))
    assert isinstance(failed, Failed)
    assert failed.is_users
    assert "no-such-model" in failed.message


def test_engines_that_cannot_be(tmp_path):
    work = Work(ZOO, (Known(str(tmp_path)),))
    with pytest.raises(UserError, match=r"Unknown engine 'rya'. Did you mean 'ray'\?"):
        list(run(work, [], "rya"))
    with pytest.raises(UserError, match="workers=0"):
        list(run(work, [], "processes", 0))


# --- the folder


def test_a_torn_last_line_is_cut_off(light, tmp_path):
    work = Work(ZOO, (Known(str(tmp_path)),))
    trials = [Trial(light, 0, 8), Trial(light, 8, 16)]
    with Store(tmp_path / "s", work) as store:
        for trial in trials:
            store.add(trial, fake_outcome(0.5, trial.begin, trial.end))
    path = tmp_path / "s" / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with Store(tmp_path / "s", work) as store:
        assert store.get(trials[0]).to_json() == fake_outcome(0.5, 0, 8).to_json()
        assert store.get(trials[1]) is None
        store.add(trials[1], fake_outcome(0.5, 8, 16))
    assert path.read_bytes() == whole
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(UserError, match=r"Line 1 of .*trials\.jsonl is damaged"):
        Store(tmp_path / "s", work)


def test_a_folder_of_another_search_is_refused(tmp_path):
    def work(model: str = ZOO, **settings: Any) -> Work:
        return Work(model, (ExactMatch("sort", "calibration", 1, settings.pop("seed", 0), 8),), **settings)

    with Store(tmp_path, work()):
        pass
    with Store(tmp_path, work()):
        pass
    with pytest.raises(UserError, match=r"tasks\.sort\.seed = 0, this one has 1; they cannot be mixed"):
        Store(tmp_path, work(seed=1))
    with pytest.raises(UserError, match=r"dtype = null, this one has \"bfloat16\""):
        Store(tmp_path, work(dtype="bfloat16"))
    with pytest.raises(UserError, match="with model = "):
        Store(tmp_path, work("tiny-ar2dllm"))
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(UserError, match="is not a skipwise-search/1 file"):
        Store(tmp_path, work())


def test_two_searches_cannot_hold_one_folder(tmp_path):
    work = Work(ZOO, (Known(str(tmp_path)),))
    with Store(tmp_path / "s", work), pytest.raises(UserError, match="Another search is running"):
        Store(tmp_path / "s", work)
    Store(tmp_path / "s", work).__exit__(None, None, None)


# --- what is searched


def test_candidates_by_number_and_by_budget(model, light):
    space = Space.of(model, light, 16)
    assert [one.segments for one in space.with_light(3, 1)] == ["LHH", "HLH", "HHL"]
    assert len(space.with_light(8, 2)) == 28
    some = space.saving(4, 0.375, "block")  # all light saves 2 of 4 blocks
    assert {one.segments.count("L") for one in some} == {3, 4}
    assert len(some) == 5
    with pytest.raises(UserError, match=r"saves 75\.0% of the block FLOPs: the nearest is LLLL, which saves 50\.0%"):
        space.saving(4, 0.75, "block")


def test_rules_that_cannot_be(known_search, tmp_path):
    for rules, message in (
        ({"light_segments": 9}, "9 of 8 segments cannot be light"),
        ({"light_segments": 0}, "0 of 8 segments cannot be light"),
        ({"segments": 0}, "segments=0"),
        ({"segments": 40, "light_segments": 20}, "schedules of 40 segments"),
        ({"budget": 0.1}, "either the number of light segments, or a budget"),
        ({"light_segments": None}, "either the number of light segments, or a budget"),
        ({"light_segments": None, "budget": 1.5}, "budget=1.5"),
        ({"count": "head"}, "Unknown count of FLOPs 'head'"),
        ({"confirm": 0}, "confirm=0"),
        ({"screen": 0.0}, "screen=0"),
    ):
        with pytest.raises(UserError, match=message):
            known_search(tmp_path, **rules)
    assert not (tmp_path / "calls").exists()


class Foretold:
    """An importance that takes light in the middle for the best, which it is not."""

    def __init__(self, light: Plan):
        self.models = (light.model, light.model)

    def cost(self, segments: str) -> float:
        return sum(abs(i - 3.5) for i, who in enumerate(segments) if who == "L")


def test_importance_screens(known_search, light, tmp_path):
    found = known_search(tmp_path, importance=Foretold(light), screen=0.25)
    assert Counter(one.dropped == "screened" for one in found.found) == {True: 21, False: 7}
    worst = max(one.importance for one in found.found if one.dropped != "screened")
    assert all(one.importance >= worst for one in found.found if one.dropped == "screened")
    assert found.result.rows[-1].method == "sandwich"  # confirmed all the same
    other = find_contract(load_skeleton("tiny-ar")).shape
    with pytest.raises(UserError, match="measured with a light model"):
        known_search(tmp_path, importance=SimpleNamespace(models=(light.model, other)))


# --- the command line


def cli() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_command_prints_the_table(zoo_light, tmp_path):
    path = str(zoo_light.save(tmp_path / "light.json"))
    told = f"{ZOO} --light {path} --segments 3 --light-segments 1 --samples 8 --confirm 8 --finalists 1 --task chain"
    result = CliRunner().invoke(cli(), [*told.split(), "--engine", "inline", "-o", str(tmp_path / "s")])
    assert result.exit_code == 0, result.output
    best = json.loads((tmp_path / "s" / "table.json").read_text())["rows"][0]
    assert best["segments"] in result.stdout
    assert "worse half, 1" in result.stdout
    assert "whole model" in result.stdout
    assert "sandwich" in result.stdout


def test_command_wants_a_task_or_a_judge(zoo_light, tmp_path):
    path = str(zoo_light.save(tmp_path / "light.json"))
    for told, message in (([], "either --task"), (["--task", "srot"], "Did you mean 'sort'")):
        result = CliRunner().invoke(cli(), [ZOO, "--light", path, *told, "-o", str(tmp_path / "s")])
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)


# --- slow: real kills, real Ray


@pytest.mark.slow
def test_a_cluster_that_is_not_there(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:1 \(.*\); .* leave the address out"):
        list(run(Work(ZOO, (Known(str(tmp_path)),)), [], "ray", address="127.0.0.1:1"))


@pytest.mark.slow
def test_ray_gives_the_same_though_a_worker_is_killed(known_search, zoo_light, tmp_path):
    pytest.importorskip("ray")
    reference = known_search(tmp_path / "reference")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "die").touch()
    found = known_search(notes, engine="ray", workers=2)
    assert table(found) == table(reference)
    assert sorted(Counter(calls(notes)).values())[-2:] == [1, 2]
    real = [ExactMatch("chain", "calibration", 1, 0, 16)]
    rules = RULES | {"segments": 4, "light_segments": 1, "examples": 16, "confirm": 16}
    tables = {engine: table(search_schedules(ZOO, zoo_light, real, engine=engine, **rules)) for engine in ENGINES}
    assert len(set(tables.values())) == 1, tables


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_search_goes_on(how, zoo_light, tmp_path):
    path = str(zoo_light.save(tmp_path / "light.json"))
    rules = "--segments 4 --samples 128 --confirm 128 --finalists 2 --task sort --batch-size 4 --workers 2"
    told = [ZOO, "--light", path, *rules.split(), "-o"]
    # what is started in the background of a shell ignores Ctrl-C, and so do its children
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import typer; from skipwise.cli.search import command; typer.run(command)"

    def start(folder: Path) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-c", code, *told, str(folder)], **quiet)

    assert start(tmp_path / "reference").wait(900) == 0
    trials = tmp_path / "killed" / "trials.jsonl"
    victim = start(tmp_path / "killed")
    _wait_for(lambda: trials.exists() and trials.read_bytes().count(b"\n") >= random.randint(1, 4), 400)
    time.sleep(random.random())
    workers = _children(victim.pid)
    os.killpg(victim.pid, how) if how == signal.SIGINT else os.kill(victim.pid, how)
    assert victim.wait(60) != 0
    assert len(workers) >= 2
    _wait_for(lambda: not any(map(_alive, workers)), 60)
    before = trials.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert start(tmp_path / "killed").wait(900) == 0
    after = trials.read_bytes()
    assert after.startswith(whole)
    keys = Counter(json.loads(line)["key"] for line in after.splitlines())
    assert set(keys.values()) == {1}
    assert len(keys) > whole.count(b"\n")
    for name in ("table.json", "table.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)
