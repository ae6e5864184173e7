"""Pipelines to fine-tune are loaded without code and pickles, or the error says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipwise.errors import UserError
from skipwise.finetuning.families import family_of
from skipwise.finetuning.pipelines import load_pipeline
from tests.tiny_pipelines import PROMPT, pipeline, save


def test_a_saved_pipeline_is_loaded_as_it_was(tmp_path: Path):
    pipe = load_pipeline(str(save("flux", tmp_path)))
    assert type(pipe).__name__ == "FluxPipeline"
    expected = pipeline("flux")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        state = getattr(expected, part).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in getattr(pipe, part).state_dict().items())


def test_components_can_be_left_out(tmp_path: Path):
    pipe = load_pipeline(str(save("sd3", tmp_path)), leave_out=["transformer", "vae"], dtype="bfloat16")
    assert pipe.transformer is None
    assert pipe.vae is None
    assert pipe.text_encoder_3.dtype == torch.bfloat16
    text = family_of(pipe).encode_prompts(pipe, [PROMPT])
    assert text["pooled_projections"].shape == (1, 16)


def spoil(folder: Path, what: str) -> dict[str, Any]:
    """Make one thing wrong with a pipeline's folder, or return wrong settings."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    if "no model_index" in what:
        index.unlink()
    elif "StableDiffusionXLPipeline" in what:
        index.write_text(json.dumps(content | {"_class_name": "StableDiffusionXLPipeline"}))
    elif "never run" in what:
        index.write_text(json.dumps(content | {"transformer": ["my_code", "Model"]}))
    elif "pickle" in what:
        (weights,) = (folder / "transformer").glob("*.safetensors")
        weights.rename(weights.with_suffix(".bin"))
    elif "damaged" in what:
        (weights,) = (folder / "transformer").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
    elif "dtype" in what:
        return {"dtype": "float8"}
    elif "component" in what:
        return {"leave_out": ["unet"]}
    return {}


@pytest.mark.parametrize(
    "what",
    [
        "no model_index.json",
        "Unknown pipeline for fine-tuning 'StableDiffusionXLPipeline'",
        "code from 'my_code', which is never run",
        "only as pickle",
        "damaged",
        "Unknown dtype 'float8'",
        "Unknown component of .* 'unet'",
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, what: str):
    settings = spoil(save("pixart", tmp_path), what)
    with pytest.raises(UserError, match=what) as caught:
        load_pipeline(str(tmp_path), **settings)
    assert "\n" not in str(caught.value)


def test_unknown_names():
    with pytest.raises(UserError, match="There is no pipeline nowhere"):
        load_pipeline("nowhere")
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded") as caught:
        load_pipeline("nobody/nothing")  # the tests are offline
    assert "\n" not in str(caught.value)
