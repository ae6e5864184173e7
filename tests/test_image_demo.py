"""`skipwise demo --image`, on a pipeline of tiny-dit's kind that has learnt nothing."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from skipwise.errors import UserError
from skipwise.finetuning.train import TrainingSettings
from skipwise.image_demo import WAYS, run_image_demo
from skipwise.zoo.recipes import PICTURE_RECIPES
from skipwise.zoo.text_to_image import TextToImage, build_autoencoder, save_pipeline


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    recipe = replace(next(iter(PICTURE_RECIPES.values())), double_blocks=2, single_blocks=4, heads=2, text_blocks=1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    return str(save_pipeline(TextToImage(recipe), build_autoencoder(recipe), "tiny", 0, folder, recipe))


def mean_colours(pictures):
    return torch.from_numpy(np.stack([picture.mean((0, 1)) for picture in pictures])).float()


@pytest.mark.slow
def test_every_way_is_drawn_scored_and_priced(untrained, tmp_path):
    training = TrainingSettings(steps=2, draws=2, checkpoint_every=2)
    outcomes, page = run_image_demo(tmp_path, WAYS, (0, 1), training, untrained, mean_colours)
    assert [outcome.name for outcome in outcomes] == ["as it was", *(way.name for way in WAYS)]
    whole, exact, skipped, last = (sum(outcome.peak.values()) for outcome in outcomes[1:])
    assert max(skipped, last) < exact < whole
    for outcome in outcomes:
        assert outcome.similarity.low <= outcome.similarity.value <= outcome.similarity.high
        assert np.array(outcome.pictures).shape == (2, 4, 64, 64, 3)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["outcomes"] == [outcome.to_json() for outcome in outcomes]
    text = page.read_text()
    assert len(re.findall("data:image/png", text)) == 5 + 5 * 2 * 4
    assert not re.search(r"src=\"(?!data:)", text)


def test_mistakes(skipwise, untrained, tmp_path):
    code, _, error = skipwise("demo", "--image", "--examples", "3")
    assert code == 2
    assert "leave out --examples" in error
    with pytest.raises(UserError):
        run_image_demo(tmp_path, WAYS, (0,), TrainingSettings(steps=1), "tiny-dllm", mean_colours)
