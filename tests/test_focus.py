"""The focus of a delayed cache: a step looks at the masks that looked most certain when they were last looked at."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.cost import Meter
from skipwise.sampling import Denoiser, LLaDASettings
from skipwise.sampling.llada import decode
from skipwise.sampling.prediction import Prediction
from tests.tiny_models import ROWS

PROMPTS = torch.tensor([[9, 10, 11, 12, 13], [4, 5, 6, 7, 8], [12, 14, 15, 16, 17]])
BLOCK = {"gen_length": 16, "block_length": 8, "cache": "delayed"}
MODELS = ("llada", "dream", "mdlm")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return ROWS[request.param]()


class Watched(Denoiser):
    """Notes for every step: the sequences, the positions looked at, and how certain the model was of each."""

    def predict(self, step: Any, inputs: Tensor, mask: Any = None, where: Any = None, **others: Any) -> Prediction:
        found = super().predict(step, inputs, mask, where, **others)
        logits = found.logits().float()
        logits[:, self.mask_token] = -torch.inf
        certain = logits.softmax(-1).amax(-1).tolist()
        places = list(zip(*(part.tolist() for part in where), strict=True))
        self.steps = [*getattr(self, "steps", []), (inputs.clone(), dict(zip(places, certain, strict=True)))]
        return found


@pytest.mark.parametrize("way", [{}, {"refresh": 3}, {"steps": 8}, {"threshold": 0.9}])
@pytest.mark.parametrize("focus", [1, 3])
def test_what_is_looked_at(model: nn.Module, focus: int, way: dict[str, Any]) -> None:
    """Row by row: all masks of the block where everything runs, else those of the highest last certainty."""
    denoiser = Watched(model)
    found = decode(denoiser, PROMPTS, LLaDASettings(**BLOCK, focus=focus, **way))
    assert not (found == denoiser.mask_token).any()
    last: dict[tuple[int, int], float] = {}
    assert len(denoiser.steps) == len(denoiser.forwards) > 4
    narrow = 0
    for (sequences, looks), forward in zip(denoiser.steps, denoiser.forwards, strict=True):
        whole = forward.tokens == forward.keys
        for row, tokens in enumerate(sequences.tolist()):
            masks = [i for i, token in enumerate(tokens) if token == denoiser.mask_token]
            masks = [i for i in masks if i < (13 if masks[0] < 13 else 21)]
            most = max(focus, 2 if "steps" in way else 1)
            best = sorted(masks, key=lambda i: -last.get((row, i), 2.0))[:most]
            assert {i for n, i in looks if n == row} == set(masks if whole else best)
        narrow += not whole
        last |= looks
    assert narrow


def test_a_wide_focus_is_the_delayed_cache(model: nn.Module) -> None:
    plain, wide, narrow = (
        sw.generate(model, PROMPTS, family="llada", **BLOCK, **more) for more in ({}, {"focus": 8}, {"focus": 2})
    )
    assert torch.equal(plain.sequences, wide.sequences)
    assert plain.stats.block_flops == wide.stats.block_flops > narrow.stats.block_flops
    assert plain.stats.forwards == narrow.stats.forwards


@pytest.mark.parametrize("way", [{"cfg_scale": 0.5}, {"temperature": 0.7}, {"eos_token_id": 61}])
def test_rows_are_what_they_are_alone(model: nn.Module, way: dict[str, Any]) -> None:
    """In a padded batch, with guidance, noise and rows that end."""
    given = {"family": "llada", **BLOCK, "focus": 2, **way}
    padded = PROMPTS.clone()
    padded[1, :2] = 0
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    together = sw.generate(model, padded, attention_mask=mask, seed=3, **given).sequences
    for row in range(3):
        alone = sw.generate(model, PROMPTS[row : row + 1, 2 * (row == 1) :], seed=3 + row, **given).sequences
        assert torch.equal(alone[0, -16:], together[row, -16:])


def test_flops_are_those_that_happened(model: nn.Module) -> None:
    given = {"family": "llada", **BLOCK, "focus": 3, "stop_at_eos": False}
    sw.generate(model, PROMPTS, **given)
    with Meter() as meter:
        stats = sw.generate(model, PROMPTS, **given).stats
    counted = sum(price.flops for price in meter.prices.values())
    assert counted == pytest.approx(stats.all_in_flops - stats.spared_flops, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"focus": 4}, "focus=4 is of cache='delayed'; cache is None"),
        ({"focus": 4, "cache": "dual"}, "cache is 'dual'"),
        ({"focus": 0, "cache": "delayed"}, "focus=0"),
        ({"focus": 2, "cache": "delayed", "remasking": "random"}, "remasking='random'"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sw.UserError, match=message):
        LLaDASettings(**settings)
