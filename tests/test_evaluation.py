"""Evaluation: exact answers, paired retention, honest intervals, and the real thing on the zoo."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.evaluation import Interval, Row, Score, difference, perplexity_ratio, task_names
from skipwise.evaluation.measure import Measured, interval, resamples, retention, retention_draws
from skipwise.evaluation.tasks import build_task, calibration_texts, default_tasks
from skipwise.evaluation.text import TextTask
from skipwise.evaluation.texts import documents, names
from skipwise.plan import Phase, Plan
from skipwise.sampling import Denoiser
from skipwise.zoo.tasks import TASKS, distinct_examples, examples, split_of
from tests.tiny_models import ROWS


@pytest.fixture(scope="module")
def dllm() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


class Letters:
    """A tokenizer of 64 characters."""

    bos_token_id = None
    mask_token_id = 3

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 64 for c in text]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return 64


def plan_for(model: nn.Module, numbers: list[int]) -> Plan:
    contract = find_contract(model)
    return Plan.static(contract.shape, {contract.main_stack: numbers})


def right(task: str, prompt: str, answer: str) -> bool:
    body = prompt[1:-1]
    if task == "addition":
        a, b = body.split("+")
        return answer == f"{int(a) + int(b):04d}"[::-1]
    if task == "sort":
        return answer == "".join(sorted(body))
    if task == "reverse":
        return answer == body[::-1]
    value, results = int(body[0]), ""
    for operation, operand in zip(body[1::2], body[2::2], strict=True):
        value = eval(f"{value}{operation}{operand}") % 10
        results += str(value)
    return answer == results


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_splits_are_disjoint(task: str) -> None:
    found: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "calibration", "test"):
        stream = examples(task, split, seed=0)  # type: ignore[arg-type]
        found[split] = [next(stream) for _ in range(300)]
    for split, pairs in found.items():
        assert all(right(task, *pair) for pair in pairs)
        assert all(len(prompt) == 9 and len(answer) == TASKS[task].answer_length for prompt, answer in pairs)
        assert {split_of(prompt) for prompt, _ in pairs} == {split}
    tested = distinct_examples(task, "test", 200)
    assert len({prompt for prompt, _ in tested}) == 200
    assert not {prompt for prompt, _ in tested} & {prompt for prompt, _ in found["train"]}


def test_whole_model_and_plans(dllm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = dllm
    nothing, first = plan_for(model, []), plan_for(model, [0])
    result = sw.evaluate(model, tokenizer, ["sort", "chain"], [nothing, first], examples=40)
    whole, same, broken = result.rows
    assert whole.plan is None
    assert {task: score.value.value for task, score in whole.scores.items()} == {"sort": 1.0, "chain": 1.0}
    assert same.scores["sort"].retention.model_dump() == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert same.saved_block_flops == 0
    assert (broken.k, broken.method) == (1, "by hand")
    assert broken.mean_retention.value < 0.5, "block 0 of this model cannot be spared"
    assert broken.saved_block_flops == pytest.approx(1 / 24)
    assert 0 < broken.saved_all_in_flops < broken.saved_block_flops
    assert broken.seconds > 0
    assert len(model.model.layers) == 24


def test_result_round_trip(dllm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    result = sw.evaluate(*dllm, ["chain"], [plan_for(dllm[0], [5])], examples=10, seed=4)
    path = result.save(tmp_path / "r.json")
    assert sw.Result.load(path) == result
    content = json.loads(path.read_text())
    assert content["seeds"] == {"examples": 4}
    assert (content["device"], content["dtype"]) == ("cpu", "float32")
    assert content["versions"]["torch"] == torch.__version__
    assert content["rows"][1]["plan"]["format"] == "skipwise-plan/1"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(sw.UserError, match="is not a readable skipwise-result/1 file"):
        sw.Result.load(tmp_path / "other.json")


def test_pairing_makes_the_interval_of_equal_scores_vanish() -> None:
    """The same examples are drawn for both sides: a model against itself keeps exactly everything."""
    generator = np.random.default_rng(0)
    scores = Measured("exact match", generator.integers(0, 2, 80).astype(float), np.ones(80))
    draws = retention_draws(scores, scores, resamples(80, seed=1))
    assert (draws.min(), draws.max()) == (1.0, 1.0)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        sample = Measured("exact match", (generator.random(100) < 0.7).astype(float), np.ones(100))
        found = interval(sample.value, sample.score(resamples(100, seed)))
        hits += found.low <= 0.7 <= found.high
    assert 50 <= hits <= 60


def test_perplexity_is_the_exponential_of_the_token_mean() -> None:
    measured = Measured("perplexity", np.array([2.0, 6.0]), np.array([1.0, 3.0]), perplexity=True)
    assert measured.value == pytest.approx(np.exp(2.0))


def test_nothing_kept_of_nothing() -> None:
    zero, one = (Measured("exact match", np.full(5, v), np.ones(5)) for v in (0.0, 1.0))
    assert retention_draws(one, zero, resamples(5, 0)).tolist() == [0.0] * 2000


def test_texts() -> None:
    calibration, test = documents("calibration"), documents("test")
    assert names() == ["moby-dick", "persuasion", "sotu"]
    for name in names():
        assert 15_000 < len(calibration[name]) < 25_000 < 30_000 < len(test[name]) < 45_000
        assert not set(calibration[name].split("\n\n")) & set(test[name].split("\n\n"))


@pytest.mark.parametrize(("name", "metric"), [("llama", "next-token accuracy"), ("llada", "masked-token accuracy")])
def test_text_scores_beside_a_plain_loop(name: str, metric: str) -> None:
    model = ROWS[name]()
    task = TextTask("persuasion", "test", windows=3, seed=0, tokens=32)
    accuracy, perplexity = task.run(Denoiser(model), Letters())
    assert (accuracy.metric, perplexity.metric) == (metric, "perplexity")
    assert accuracy.examples == 3
    if name == "llama":
        ids = torch.tensor([[ord(c) % 64 for c in documents("test")["persuasion"][:96]]]).view(3, 32)
        with torch.no_grad():
            log = model(ids).logits[:, :-1].log_softmax(-1)
        chosen = log.gather(-1, ids[:, 1:, None])[..., 0]
        assert perplexity.value == pytest.approx(float((-chosen.mean()).exp()), rel=1e-4)
        assert accuracy.value == pytest.approx(float((log.argmax(-1) == ids[:, 1:]).float().mean()))
    again = task.run(Denoiser(model), Letters())
    assert np.array_equal(again[0].numerators, accuracy.numerators), "the same tokens are masked every time"


def test_text_under_a_plan_reports_both_metrics() -> None:
    model = ROWS["llama"]()
    result = sw.evaluate(model, Letters(), ["persuasion"], [plan_for(model, [1])], examples=3)
    row = result.rows[1]
    assert set(row.scores) == {"persuasion", "persuasion (perplexity)"}
    assert row.scores["persuasion (perplexity)"].retention is None
    assert row.mean_retention is None or row.mean_retention == row.scores["persuasion"].retention


def test_an_encoder_is_scored_with_its_tokenizers_mask() -> None:
    accuracy, _ = TextTask("sotu", "test", 2, 0, 32).run(Denoiser(ROWS["bert"]()), Letters())
    assert 0 <= accuracy.value <= 1


def test_defaults(dllm: tuple[nn.Module, Any]) -> None:
    assert default_tasks(dllm[1]) == list(TASKS)
    assert default_tasks(Letters()) == names()
    assert task_names() == [*TASKS, *names()]
    assert len(calibration_texts(dllm[1], 40)) == 40
    assert {split_of(text[0]) for text in calibration_texts(dllm[1], 40)} == {"calibration"}
    assert len(calibration_texts(Letters(), 10)) == 10


def test_mistakes(dllm: tuple[nn.Module, Any]) -> None:
    with pytest.raises(sw.UserError, match=r"Unknown task 'adition'. Did you mean 'addition'\? Available: addition"):
        sw.evaluate(*dllm, ["adition"])
    with pytest.raises(sw.UserError, match="at least one example"):
        sw.evaluate(*dllm, ["sort"], examples=0)
    with pytest.raises(sw.UserError, match="This plan was made for a model with"):
        sw.evaluate(*dllm, ["sort"], [plan_for(ROWS["llama"](), [1])])
    with pytest.raises(sw.UserError, match="needs a tokenizer"):
        build_task("sotu", "test", 1, 0, 1).run(Denoiser(dllm[0]), None)


def test_paired_difference_beside_a_plain_bootstrap(dllm: tuple[nn.Module, Any]) -> None:
    """Two rows are compared example by example; the interval is that of resampled pairs."""
    plans = [plan_for(dllm[0], [11, 12, 13, 14, 17, 18]), plan_for(dllm[0], list(range(6, 14)))]
    result = sw.evaluate(*dllm, ["sort", "reverse"], plans, examples=60)
    a, b = result.rows[1:]
    found = difference(a, b)
    gains = [
        np.array([int(x) - int(y) for x, y in zip(a.scores[t].outcomes or "", b.scores[t].outcomes or "", strict=True)])
        for t in ("sort", "reverse")
    ]
    assert found.value == pytest.approx(np.mean([g.mean() for g in gains]))
    rng = np.random.default_rng(5)
    draws = [np.mean([rng.choice(g, len(g)).mean() for g in gains]) for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.02)
    assert found.value == pytest.approx(
        np.mean([a.scores[t].value.value - b.scores[t].value.value for t in ("sort", "reverse")])
    )
    text = sw.evaluate(*sw.load("tiny-dllm"), ["sort"], examples=5).rows[0]
    with pytest.raises(sw.UserError, match="sort has 60 and 5 examples"):
        difference(a, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-dllm", "tiny-ar", "tiny-ar2dllm"])
def test_zoo_models_solve_every_task(name: str) -> None:
    """At least 95% exact match on 1,000 held-out prompts of every task."""
    result = sw.evaluate(*sw.load(name), examples=1000)
    scores = {task: score.value.value for task, score in result.rows[0].scores.items()}
    assert scores.keys() == TASKS.keys()
    assert min(scores.values()) >= 0.95, scores


def test_perplexities_are_compared_in_pairs() -> None:
    """The ratio is that of the perplexities; what two rows share in every example does not widen its interval."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(100, 400, 64)  # how hard each sample is, for both

    def row(nll: np.ndarray) -> Row:
        measured = Measured("generative perplexity", nll, np.full(64, 100.0), perplexity=True)
        zero = Interval(value=measured.value, low=0, high=0)
        score = Score(metric=measured.metric, value=zero, examples=64, parts=measured.parts)
        return Row(
            plan=None, method="x", k=0, saved_block_flops=0, saved_all_in_flops=0, seconds=0, scores={"writing": score}
        )

    found = perplexity_ratio(row(hard + 10), row(hard), "writing")
    assert found.value == pytest.approx(np.exp(0.1), rel=1e-3)
    assert found.high - found.low < 0.01
    noisy = perplexity_ratio(row(hard[::-1] + 10), row(hard), "writing")
    assert noisy.high - noisy.low > 0.1
    with pytest.raises(sw.UserError, match="has no perplexity of reading"):
        perplexity_ratio(row(hard), row(hard), "reading")


def test_retention_of_a_perplexity_is_the_other_way_round() -> None:
    ones = np.ones(4)
    whole = Measured("generative perplexity", np.log(2.0) * ones, ones, perplexity=True)
    worse = Measured("generative perplexity", np.log(4.0) * ones, ones, perplexity=True)
    assert retention(worse, whole) == pytest.approx(0.5)
    assert retention_draws(worse, whole, resamples(4, 0)) == pytest.approx(0.5)
    right, wrong = Measured("exact match", ones, ones), Measured("exact match", ones / 2, ones)
    assert retention(wrong, right) == pytest.approx(0.5)


def test_phases_are_followed_by_tasks(dllm) -> None:  # type: ignore[no-untyped-def]
    """A plan that skips everything at the end spares the start; FLOPs are those of the forwards that were made."""
    model, tokenizer = dllm
    shape = find_contract(model).shape
    stack = find_contract(model).main_stack
    phases = (Phase(until=0.5, skip={stack: tuple(range(8, 20))}), Phase())
    late = (Phase(until=0.5), Phase(skip={stack: tuple(range(8, 20))}))
    plans = [Plan(model=shape, phases=p) for p in (phases, late)]
    result = sw.evaluate(model, tokenizer, ["reverse", "chain"], plans, examples=20)
    first, second = result.rows[1:]
    assert first.scores["reverse"].value != second.scores["reverse"].value
    # reverse: 4 of 7 steps begin before the middle; chain: 2 of 3
    reverse, chain = (sw.evaluate(model, tokenizer, [task], plans, examples=20) for task in ("reverse", "chain"))
    assert reverse.rows[1].saved_block_flops == pytest.approx(0.5 * 4 / 7)
    assert reverse.rows[2].saved_block_flops == pytest.approx(0.5 * 3 / 7)
    assert chain.rows[1].saved_block_flops == pytest.approx(0.5 * 2 / 3)
