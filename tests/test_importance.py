"""Step importance beside a plain loop and beside exact enumeration; its file, its figure, its command, its errors."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.calibration import Sample, Text
from skipwise.evaluation.masking import every_mask
from skipwise.models import mask_token
from skipwise.plan import Phase, Plan
from skipwise.report.importance import plot_importance
from skipwise.sampling.mdlm import sigma_of
from skipwise.scheduling import Importance, measure_importance
from skipwise.scheduling.importance import CURVES
from skipwise.scheduling.readings import mask_chance, stratified_readings
from tests.tiny_models import ROWS

TEXTS: list[Text] = ["a first text", "and a second", "of another length", ("a question ", "an answer"), ("6*7=", "42")]


class Letters:
    """A tokenizer of one letter a token, which never gives the mask token of a tiny model."""

    def __init__(self, letters: int = 50):
        self.letters = letters

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) % self.letters for c in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(self.letters)}


def pair(row: str = "mdlm", conditioned: bool = False) -> tuple[nn.Module, nn.Module]:
    """A tiny random model and a worse copy of it."""
    heavy, light = ROWS[row](), ROWS[row]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in light.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    for model in (heavy, light):
        model.config.time_conditioning = conditioned  # type: ignore[union-attr]
    return heavy, light


@pytest.fixture(scope="module")
def measured() -> Importance:
    return measure_importance(*pair(), Letters(), TEXTS, bins=6, names=("big", "small"))


def in_phases(model: nn.Module, *phases: Phase) -> Plan:
    return Plan(model=find_contract(model).shape, phases=phases)


def skipping(model: nn.Module, *blocks: int) -> dict[str, tuple[int, ...]]:
    return {find_contract(model).main_stack: blocks}


# --- what is measured


def distribution(model: nn.Module, ids: list[int], masked: list[bool], level: float, position: int) -> list[float]:
    """Log-probabilities at one position of one text, of every token but the mask token."""
    mask = mask_token(model)
    noised = torch.tensor([[mask if hidden else token for token, hidden in zip(ids, masked, strict=True)]])
    told = model.config.time_conditioning  # type: ignore[union-attr]
    others = {"sigma": sigma_of(torch.tensor([level]))} if told else {}
    with torch.no_grad():
        scores = model(input_ids=noised, **others).logits[0, position].double()
    return scores[torch.arange(len(scores)) != mask].log_softmax(0).tolist()


def plain(models: tuple[nn.Module, nn.Module], ids: list[int], masked: list[bool], level: float) -> list[float]:
    """heavy loss, light loss, KL, reverse KL: means over the masked positions, one by one."""
    mask, sums = mask_token(models[0]), [0.0] * 4
    for position in (p for p, hidden in enumerate(masked) if hidden):
        ours, theirs = (torch.tensor(distribution(m, ids, masked, level, position)) for m in models)
        truth = ids[position] - (ids[position] > mask)
        kls = ((a.exp() * (a - b)).sum().item() for a, b in ((ours, theirs), (theirs, ours)))
        for i, value in enumerate((-ours[truth].item(), -theirs[truth].item(), *kls)):
            sums[i] += value
    return [value / sum(masked) for value in sums]


@pytest.mark.parametrize("row", ["mdlm", "mdlm, told the noise level", "llada", "dream"])
def test_it_is_the_plain_loop(row: str) -> None:
    """Of any family, also one that is told the noise level; texts of unequal length, with and without a prompt."""
    models = pair(row.partition(",")[0], conditioned="told" in row)
    found = measure_importance(*models, Letters(), TEXTS, bins=2, seed=3, batch_size=3)
    samples = [Sample(tuple(Letters()("".join(t))["input_ids"]), 0 if isinstance(t, str) else len(t[0])) for t in TEXTS]
    values = torch.zeros(2, len(TEXTS), 4)
    chances = torch.zeros(2, len(TEXTS), 1)
    for reading in stratified_readings(samples, 2, 3):
        row_of = plain(models, list(reading.sample.ids), reading.masked.tolist(), reading.level)
        values[reading.bin, reading.text] = torch.tensor(row_of)
        chances[reading.bin, reading.text] = 0.999 * reading.level
    for view, weighted in (("token", values), ("step", values * chances)):
        means = weighted.mean(1)
        for i, curve in enumerate(("heavy_loss", "light_loss", "kl", "reverse_kl")):
            assert found.values(curve, view) == pytest.approx(means[:, i].tolist(), abs=1e-5)
        assert found.values("loss_gap", view) == pytest.approx((means[:, 1] - means[:, 0]).tolist(), abs=1e-5)
    assert (found.values("kl") > 0.01).all()


def exact(models: tuple[nn.Module, nn.Module], ids: list[int], level: float) -> torch.Tensor:
    """(4,): the mean over positions, each masked for certain and the others independently, all masks enumerated."""
    chance, n, total = mask_chance(level), len(ids), torch.zeros(4)
    for number in range(1, 2**n):
        masked = [bool(number >> i & 1) for i in range(n)]
        k = sum(masked)
        # of a set of k, each of its k positions may be the one that is certain
        weight = k / n * chance ** (k - 1) * (1 - chance) ** (n - k)
        total += weight * torch.tensor(plain(models, ids, masked, level))
    return total


def test_it_is_unbiased_and_its_area_is_the_likelihood_bound() -> None:
    """Against every mask of a text of four tokens, in each bin and over all of them."""
    models = pair()
    ids = Letters()("text")["input_ids"]
    found = measure_importance(*models, Letters(), ["text"] * 1500, bins=3, batch_size=500)
    for number in range(3):
        points = [(number + (i + 0.5) / 4) / 3 for i in range(4)]  # the midpoint rule, of a polynomial in t
        expected = torch.stack([exact(models, ids, t) for t in points]).mean(0).tolist()
        for curve, value in zip(("heavy_loss", "light_loss", "kl", "reverse_kl"), expected, strict=True):
            point = getattr(found.token, curve)[number]
            assert abs(point.value - value) < (point.high - point.low) + 1e-4  # four standard errors
            assert point.high - point.low < 0.06
    for model, curve in zip(models, ("heavy_loss", "light_loss"), strict=True):
        bound = 0.0
        for noised in every_mask(4):
            masked = [i in noised.masked for i in range(4)]
            bound += noised.weight * plain((model, model), ids, masked, 0.5)[0] * len(noised.scored)
        assert found.total(curve=curve) == pytest.approx(bound / 4, abs=0.02)


def test_levels_are_stratified_and_only_what_is_free_is_masked() -> None:
    samples = [Sample(tuple(range(length)), prompt) for length in (8, 30) for prompt in (0, 5) for _ in range(10)]
    readings = stratified_readings(samples, 5, 0)
    assert Counter(reading.bin for reading in readings) == dict.fromkeys(range(5), 40)
    assert Counter(reading.text for reading in readings) == dict.fromkeys(range(40), 5)
    assert all(reading.bin / 5 <= reading.level <= (reading.bin + 1) / 5 for reading in readings)
    for number in range(5):  # evenly spread inside a bin: one level in each of 40 parts
        parts = sorted(int(reading.level * 200) for reading in readings if reading.bin == number)
        assert parts == list(range(40 * number, 40 * number + 40))
    assert all(reading.masked.any() for reading in readings)
    assert not any(reading.masked[: reading.sample.prompt].any() for reading in readings)
    shares = [[float(r.masked[r.sample.prompt :].float().mean()) for r in readings if r.bin == b] for b in range(5)]
    free = [len(sample.ids) - sample.prompt for sample in samples]
    for number, share in enumerate(shares):
        chance = mask_chance((number + 0.5) / 5)
        expected = sum(chance + (1 - chance) / n for n in free) / len(free)
        assert sum(share) / len(share) == pytest.approx(expected, abs=0.07)
    masks = [torch.cat([r.masked for r in stratified_readings(samples, 5, seed)]) for seed in (0, 1)]
    assert not torch.equal(*masks)


def test_batches_do_not_matter(measured: Importance) -> None:
    alone = measure_importance(*pair(), Letters(), TEXTS, bins=6, batch_size=1)
    for curve in CURVES:
        assert alone.values(curve) == pytest.approx(measured.values(curve), abs=1e-5)
    assert (measured.texts, measured.calibration["texts"]) == (len(TEXTS), len(TEXTS))
    assert measured.settings["max_tokens"] == 512


def test_a_text_is_cut_to_what_both_models_take() -> None:
    heavy, light = pair()
    light.config.model_length = 4  # type: ignore[union-attr]
    found = measure_importance(heavy, light, Letters(), ["a first text"], bins=1)
    assert (found.settings["max_tokens"], found.calibration["tokens"]) == (4, 4)


# --- what must be equal


def test_a_model_beside_itself() -> None:
    heavy, _ = pair()
    itself = measure_importance(heavy, heavy, Letters(), TEXTS, bins=3)
    assert not itself.values("kl").any()
    assert not itself.values("reverse_kl").any()
    assert not itself.values("loss_gap").any()
    assert itself.token.heavy_loss == itself.token.light_loss
    assert (itself.total(), itself.share(0, 0.5), itself.cost("LL")) == (0, 0, 0)


def test_plans() -> None:
    """All heavy: nothing. Blocks skipped early: nothing late. A model named early: as it is there, nothing late."""
    heavy, light = pair()
    before = heavy(input_ids=torch.arange(5)[None]).logits
    measure: Callable[[Plan], Importance] = lambda plan: measure_importance(  # noqa: E731
        heavy, None, Letters(), TEXTS, plan=plan, others={"light": light}, bins=4
    )
    whole = measure(in_phases(heavy, Phase(until=0.5), Phase()))
    assert not whole.values("kl").any()
    static = measure(in_phases(heavy, Phase(skip=skipping(heavy, 1, 2))))
    early = measure(in_phases(heavy, Phase(until=0.5, skip=skipping(heavy, 1, 2)), Phase()))
    assert (early.values("kl") > 0).tolist() == [False, False, True, True]
    assert early.values("kl")[2:] == pytest.approx(static.values("kl")[2:], abs=1e-6)
    assert static.values("kl").min() > 0.01
    assert early.share(0, 0.5) == 1
    assert static.plan is not None
    assert early.describe() == "MDLM and MDLM under a plan (until 0.5 skip blocks: 1, 2 | until 1 run all blocks)"
    handed = measure(in_phases(heavy, Phase(until=0.5), Phase(model="light")))
    beside = measure_importance(heavy, light, Letters(), TEXTS, bins=4)
    assert handed.values("kl")[:2] == pytest.approx(beside.values("kl")[:2], abs=1e-6)
    assert not handed.values("kl")[2:].any()
    between = measure(in_phases(heavy, Phase(until=0.375, skip=skipping(heavy, 1, 2)), Phase()))
    assert 0 < between.values("kl")[2] < static.values("kl")[2]  # a border inside a bin
    assert torch.equal(heavy(input_ids=torch.arange(5)[None]).logits, before)


# --- what is made of it


def test_the_cost_of_a_schedule_is_the_sum_of_its_light_segments(measured: Importance) -> None:
    kl = measured.values("kl").tolist()  # from clean text to all noise
    assert measured.cost("LHHHHH") == pytest.approx(kl[5] / 6)
    assert measured.cost("HHHHHL") == pytest.approx(kl[0] / 6)
    assert measured.cost("LH") == pytest.approx(sum(kl[3:]) / 6)
    assert measured.cost("LHHL") == pytest.approx(measured.cost("LHHH") + measured.cost("HHHL"))
    assert measured.cost("LHHH") == pytest.approx((kl[5] + kl[4] / 2) / 6)  # a segment that ends inside a bin
    assert measured.cost("LLLL") == pytest.approx(measured.total()) == pytest.approx(sum(kl) / 6)
    assert measured.cost("HHH") == 0
    gap = measured.values("loss_gap")
    assert measured.cost("LL", curve="loss_gap") == pytest.approx(gap.mean())
    assert measured.total(0.5, 1, view="step") < measured.total(0.5, 1)
    thirds = [measured.share(i / 3, (i + 1) / 3) for i in range(3)]
    assert sum(thirds) == pytest.approx(1)
    assert [third.value for third in measured.thirds] == pytest.approx(thirds)
    assert all(third.low <= third.value <= third.high for third in measured.thirds)
    for curve in CURVES:
        whole = measured.totals[curve]
        assert whole.value == pytest.approx(measured.total(curve=curve))
        assert whole.low < whole.value < whole.high


def test_bands() -> None:
    """They hold the mean, and eight times the texts make them a third as wide."""
    models = pair()
    texts = [f"{a} text that {b} has read" for a in ("this", "that", "one", "no") for b in "abcdefghijklmnop"]
    few, many = (measure_importance(*models, Letters(), texts[::step], bins=3, batch_size=64) for step in (8, 1))
    for found in (few, many):
        points = [point for view in (found.token, found.step) for curve in CURVES for point in getattr(view, curve)]
        assert all(point.low < point.value < point.high for point in points)
    widths = [sum(point.high - point.low for point in found.token.kl) for found in (few, many)]
    assert 0.15 < widths[1] / widths[0] < 0.6


def test_equal_seeds_give_equal_files(measured: Importance, tmp_path: Path) -> None:
    path = measured.save(tmp_path / "deep" / "importance.json")
    again = Importance.load(path)
    assert again == measured
    repeated = measure_importance(*pair(), Letters(), TEXTS, bins=6, names=("big", "small"))
    assert repeated.save(tmp_path / "again.json").read_text() == path.read_text()
    other = measure_importance(*pair(), Letters(), TEXTS, bins=6, seed=1)
    assert other.values("kl").tolist() != measured.values("kl").tolist()
    heavy, _ = pair()
    under = measure_importance(
        heavy, None, Letters(), TEXTS, plan=in_phases(heavy, Phase(skip=skipping(heavy, 1))), bins=2
    )
    assert Importance.load(under.save(tmp_path / "plan.json")) == under


def test_figure(measured: Importance, tmp_path: Path) -> None:
    first, second = (plot_importance(measured, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    text = first.decode()
    assert text.startswith("<?xml")
    assert "KL(heavy || light)" in text
    assert "big and small; 5 texts" in text
    assert plot_importance(measured, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(sw.UserError, match=r"Unknown suffix of a figure 'pgn'. Did you mean 'png'"):
        plot_importance(measured, tmp_path / "d.pgn")


# --- mistakes


def _models(heavy: str = "mdlm", light: str | None = None, **config: Any) -> dict[str, Any]:
    models = {"heavy": ROWS[heavy](), "light": ROWS[light or heavy]()}
    for key, value in config.items():
        setattr(models["light"].config, key, value)
    return models


REQUESTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing beside": (lambda: {"light": None}, "give a light model, or a plan of the heavy one"),
    "both": (lambda: _models() | {"plan": in_phases(ROWS["mdlm"](), Phase())}, "not both"),
    "heavy of no use": (lambda: _models("llama"), "so it has no noise levels"),
    "light of no use": (lambda: _models("mdlm", "llama"), "is a LlamaForCausalLM, which cannot denoise"),
    "vocabulary": (lambda: _models(vocab_size=99), "has a vocabulary of 99"),
    "mask token": (lambda: _models(mask_token_id=7), "has the mask token 7"),
    "tokenizers": (lambda: {"light_tokenizer": Letters(40)}, "has another tokenizer"),
    "no tokenizer": (lambda: {"tokenizer": None}, "MDLM came without a tokenizer"),
    "foreign plan": (lambda: {"light": None, "plan": in_phases(ROWS["llada"](), Phase())}, "made for a model with"),
    "no text": (lambda: {"texts": []}, "There are no texts to read"),
    "texts of one token": (lambda: {"texts": ["a", ""]}, "There are no texts to read"),
    "bins": (lambda: {"bins": 0}, "bins=0"),
    "batch size": (lambda: {"batch_size": 0}, "batch_size=0"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_that_cannot_be_met(request_: str) -> None:
    make, message = REQUESTS[request_]
    heavy, light = pair()
    arguments = {"heavy": heavy, "light": light, "tokenizer": Letters(), "texts": TEXTS} | make()
    with pytest.raises(sw.UserError, match=re.escape(message)) as caught:
        measure_importance(**arguments)
    assert "\n" not in str(caught.value)


def test_texts_and_predictions_that_cannot_be_compared() -> None:
    heavy, light = pair()
    for model in (heavy, light):
        model.config.mask_token_id = Letters()("t")["input_ids"][0]  # type: ignore[union-attr]
    with pytest.raises(sw.UserError, match="A text holds the mask token"):
        measure_importance(heavy, light, Letters(), TEXTS)
    heavy, light = pair()
    with torch.no_grad():
        next(light.parameters()).fill_(float("nan"))
    with pytest.raises(sw.UserError, match="are not finite"):
        measure_importance(heavy, light, Letters(), TEXTS, bins=1)


def test_questions_that_have_no_answer(measured: Importance) -> None:
    for segments in ("", "LHX", "lh"):
        with pytest.raises(sw.UserError, match="is no schedule; write H"):
            measured.cost(segments)
    for begin, end in ((0.5, 0.2), (-0.1, 1), (0, 1.1)):
        with pytest.raises(sw.UserError, match="is no interval"):
            measured.total(begin, end)
    with pytest.raises(sw.UserError, match="Did you mean 'loss_gap'"):
        measured.total(curve="lossgap")  # type: ignore[arg-type]
    with pytest.raises(sw.UserError, match="Did you mean 'token'"):
        measured.total(view="tokens")  # type: ignore[arg-type]


def test_files_that_are_none(measured: Importance, tmp_path: Path) -> None:
    path = measured.save(tmp_path / "importance.json")
    whole = path.read_text()
    content = json.loads(whole)
    short = {**content["token"], "kl": content["token"]["kl"][1:]}
    damaged = {
        "half": whole[: len(whole) // 2],
        "another format": json.dumps({**content, "format": "skipwise-result/1"}),
        "a key too many": json.dumps({**content, "more": 1}),
        "a number that is none": json.dumps({**content, "texts": "many"}),
        "unequal curves": json.dumps({**content, "token": short}),
    }
    for text in damaged.values():
        path.write_text(text)
        with pytest.raises(sw.UserError, match="is not a readable skipwise-importance/1 file") as caught:
            Importance.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(sw.UserError, match="skipwise schedule importance"):
        Importance.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(sw.UserError, match="Cannot write"):
        measured.save(tmp_path / "file" / "importance.json")


# --- the command line


def test_command(skipwise: Any, tmp_path: Path) -> None:
    model, _ = sw.load("tiny-dllm")
    path = in_phases(model, Phase(until=0.5, skip=skipping(model, 3, 4, 5)), Phase()).save(tmp_path / "plan.json")
    asked = ["schedule", "importance", "tiny-dllm", "--plan", path, "--count", 8, "--bins", 4]
    code, out, err = skipwise(*asked, "-o", tmp_path / "out")
    assert (code, err.strip()) == (0, "")
    found = Importance.load(tmp_path / "out" / "importance.json")
    assert (found.heavy, found.light, found.texts, found.bins) == ("tiny-dllm", "tiny-dllm", 8, 4)
    assert (found.values("kl") > 0).tolist() == [False, False, True, True]
    assert "1.000 to 0.750" in out
    shares = f"{100 * found.thirds[0].value:.1f}%"
    assert f"early third {shares}" in " ".join(out.split())
    assert "late third 0.0%" in " ".join(out.split())
    assert f"the loss rises by {found.totals['loss_gap'].value:.4f}" in " ".join(out.split())
    assert (tmp_path / "out" / "importance.svg").read_bytes() == plot_importance(
        found, tmp_path / "again.svg"
    ).read_bytes()
    (tmp_path / "texts.txt").write_text("s3141592=\nr3141592=\n")
    both = ["--light", "tiny-dllm", "--texts", tmp_path / "texts.txt", "--max-tokens", 4, "--bins", 1]
    code, out, _ = skipwise("schedule", "importance", "tiny-dllm", *both, "-o", tmp_path / "itself")
    assert code == 0
    itself = Importance.load(tmp_path / "itself" / "importance.json")
    assert (itself.texts, itself.calibration["tokens"], itself.total()) == (2, 8, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --light"),
        (["--light", "tiny-dllm", "--plan", "plan.json"], "Give either --light"),
        (["--plan", "none.json"], "There is no plan at none.json"),
        (["--light", "tiny-ar"], "tiny-ar is a LlamaForCausalLM, which cannot denoise"),
        (["--light", "tiny-dlm"], "Did you mean 'tiny-dllm'"),
        (["--light", "tiny-dllm", "--texts", "empty.txt"], "There are no texts"),
        (["--light", "tiny-dllm", "-o", "file/out"], "Cannot write in"),
    ],
)
def test_command_mistakes(
    skipwise: Any,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty.txt", "file"):
        (tmp_path / name).write_text("")
    code, _, err = skipwise("schedule", "importance", "tiny-dllm", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("importance.*"))
