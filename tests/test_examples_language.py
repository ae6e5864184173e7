"""Example inputs of language models: text alone, and more only where that does not run."""

from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.cost import price_blocks
from skipwise.examples import Size, example_inputs
from skipwise.twins import meta_twin
from tests.survey.checks import Letters
from tests.survey.classes import build
from tests.survey.oracle import output

SIZE = Size(tokens=9, text=6, batch=2)
# besides `use_cache`, as the processors of these classes give it: shapes by name
GIVEN: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {"input_ids": (2, 9)},
    "BlipForConditionalGeneration": {"input_ids": (2, 9), "pixel_values": (2, 3, 32, 32)},
    "Blip2ForConditionalGeneration": {"input_ids": (2, 13), "pixel_values": (2, 3, 32, 32)},
    "IdeficsForVisionText2Text": {
        "input_ids": (2, 9),
        "pixel_values": (2, 1, 3, 32, 32),
        "image_attention_mask": (2, 9, 1),
    },
    "MusicgenForCausalLM": {"input_ids": (8, 9)},
    "Pix2StructForConditionalGeneration": {
        "decoder_input_ids": (2, 9),
        "flattened_patches": (2, 6, 66),
        "attention_mask": (2, 6),
    },
    "UdopForConditionalGeneration": {"input_ids": (2, 6), "decoder_input_ids": (2, 9), "bbox": (2, 6, 4)},
    "VoxtralRealtimeForConditionalGeneration": {"input_ids": (2, 9), "input_features": (2, 128, 72)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_models_are_given(name: str) -> None:
    model = build(name)
    for one in (model, meta_twin(model)):
        given = example_inputs(one, SIZE)
        shapes = {key: tuple(value.shape) for key, value in given.items() if isinstance(value, torch.Tensor)}
        shapes.pop("position_ids", None)
        assert shapes == GIVEN[name]
    assert output(model, example_inputs(model, SIZE)).isfinite().all()


@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "MusicgenForCausalLM"])
def test_text_alone_is_refused_in_one_line_where_it_does_not_run(name: str) -> None:
    model = build(name)
    needed = {"BlipForConditionalGeneration": "pixel_values", "MusicgenForCausalLM": "a row for each of its codebooks"}
    with pytest.raises(sw.UserError, match=f"cannot be asked to continue text alone: .* {needed[name]}") as refusal:
        sw.generate(model, torch.ones(1, 4, dtype=torch.long))
    assert "\n" not in str(refusal.value)
    with pytest.raises(sw.UserError, match=f"cannot be analysed over text alone: .* {needed[name]}"):
        sw.analyze(model, Letters(), ["abcdefgh"])


def test_what_is_needed_and_not_known_is_refused() -> None:
    class Needy(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, temperature: torch.Tensor) -> None: ...

    with pytest.raises(sw.UserError, match="its forward cannot do without temperature"):
        example_inputs(Needy(1, 1))


def test_lists_that_share_the_places_of_a_cache_lose_the_same_blocks() -> None:
    """PI0's action expert reads, layer by layer, what the layers that read the text have left."""
    contract = find_contract(build("PI0ForConditionalGeneration"))
    assert contract.stacks["model.vlm.language_model.layers"].coupled == ("model.dit.layers",)
    assert contract.refused["model.dit.layers"].startswith("its blocks share a cache with model.vlm.language_model")


def test_blocks_that_run_with_pictures_alone() -> None:
    """Mllama's fourth layer looks at pictures: it is planned with them, and costs nothing where there is text alone."""
    model = build("MllamaForConditionalGeneration")
    contract = find_contract(model)
    assert contract.stacks.keys() == {"model.language_model.layers"}
    assert "picks states by the numbers" in contract.refused["model.vision_model.transformer.layers"]
    flops = [price.flops for price in price_blocks(model, Size(tokens=9)).blocks["model.language_model.layers"]]
    assert flops[0] == flops[1] == flops[2] > flops[3] == 0
    with pytest.raises(sw.UserError, match="cannot be analysed over text alone"):
        sw.analyze(model, Letters(), ["abcdefgh"])
