"""docs/models.md is what the survey of classes found, and the survey finds what is right and what is wrong."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from skipwise.blocks import find_contract
from skipwise.cli import main
from skipwise.examples import Size, example_inputs
from tests.survey import checks
from tests.survey.__main__ import PAGE, RESULTS
from tests.survey.classes import IMAGES, OWN, build, classes
from tests.survey.oracle import bypassed, output, removed
from tests.survey.page import ASKED, page, verdict

LANGUAGE_RIGHT = 0.95  # of transformers' classes that can be built tiny; the others are refused with their reason
KINDS = {
    "MistralForCausalLM": "autoregressive",
    "LlavaForConditionalGeneration": "autoregressive",
    "T5ForConditionalGeneration": "autoregressive",
    "ModernBertForMaskedLM": "encoder",
    "LLaDAModelLM": "masked diffusion",
    "LongCatImageTransformer2DModel": "image or video diffusion",
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_classes_is_right(name: str) -> None:
    row = checks.tried(name)
    assert row["kind"] == KINDS[name]
    assert row["skip"] == row["export"] == "right"
    assert {row["generate"], row["analyse"]} <= {"right", "n/a"}


def test_the_page_is_made_of_the_results(results: dict[str, Any]) -> None:
    assert page(results) == PAGE.read_text(encoding="utf-8")


def test_what_the_page_promises(results: dict[str, Any]) -> None:
    """At least 300 classes; none wrong; what else is said in docs/log.md and the README of how many are right."""
    counts = {name: Counter(map(verdict, rows.values())) for name, rows in results["classes"].items()}
    total = sum(counts.values(), Counter())
    assert total.total() - total["untried"] >= 300
    assert total["wrong"] == 0
    images = counts.pop(IMAGES)
    assert images["right"] >= 0.75 * (images.total() - images["untried"])
    language = sum(counts.values(), Counter())
    assert language["right"] >= LANGUAGE_RIGHT * (language.total() - language["untried"])


def test_kinds_of_all_classes(results: dict[str, Any]) -> None:
    for group, rows in results["classes"].items():
        for name, row in rows.items():
            if "kind" in row:
                assert (row["kind"] == "image or video diffusion") == (group == IMAGES), name
                assert (row["kind"] == "masked diffusion") == (group == OWN), name
                if name.endswith("ForCausalLM"):
                    assert row["kind"] == "autoregressive", name
                if name.endswith("ForMaskedLM"):
                    assert row["kind"] == "encoder", name
    vision = results["classes"]["transformers: vision-language models"]
    assert vision["DiffusionGemmaForBlockDiffusion"]["kind"] == "block diffusion"


def test_every_installed_class_is_asked_about(results: dict[str, Any]) -> None:
    assert {group: sorted(rows) for group, rows in results["classes"].items()} == classes()


def test_the_oracles_see_a_wrong_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another block skipped than was asked for, the class is wrong."""
    model = build("MistralForCausalLM")
    inputs, contract = example_inputs(model, Size(batch=2)), find_contract(model)
    assert checks.check_skip(model, contract, inputs) == "right"
    plan = checks.static
    monkeypatch.setattr(checks, "static", lambda contract, stack, numbers: plan(contract, stack, {2}))
    assert checks.check_skip(model, contract, inputs).startswith("WRONG: model.layers without [0]")


def test_both_oracles_agree() -> None:
    model = build("LongCatImageTransformer2DModel")
    inputs = example_inputs(model)
    with bypassed(model, "transformer_blocks", {1}):
        handed_on = output(model, inputs)
    assert torch.equal(handed_on, output(removed(model, "transformer_blocks", {1}), inputs))
    assert not torch.equal(handed_on, output(model, inputs))


def test_a_class_is_as_good_as_its_worst_answer() -> None:
    row = dict.fromkeys(ASKED, "right")
    assert verdict(row) == verdict(row | {"analyse": "n/a"}) == "right"
    assert verdict(row | {"export": "refused: its blocks mind their number"}) == "refused"
    assert verdict(row | {"export": "refused: for a reason", "skip": "WRONG: other tokens"}) == "wrong"
    assert verdict({"untried": "ImportError"}) == "untried"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DiffusionGemmaForBlockDiffusion", "one forward at 1,024 tokens"),
        ("LlavaForConditionalGeneration", "one forward at 1,024 tokens"),
        ("LongCatImageTransformer2DModel", "one forward at a 128 x 128 latent image and 512 text tokens"),
    ],
)
def test_inspect_speaks_of_pictures_where_there_are_some(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build(name)
    save = model.save_config if hasattr(model, "save_config") else model.config.save_pretrained
    if not hasattr(model, "save_config"):
        model.config.architectures = [name]
    save(tmp_path)
    monkeypatch.setattr("sys.argv", ["skipwise", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert said in " ".join(capsys.readouterr().out.split())
