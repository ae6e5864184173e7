"""What a forward does for a block by its number minds only where this model can reach it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import skipwise as sw
from skipwise.examples import Size, example_inputs
from skipwise.numbering import Numbering, find_numbering
from tests.survey.shrinking import shake
from tests.tiny_models import output

MINDS, FREE = Numbering(always=True), Numbering()


class Counting(nn.Module):
    """Blocks, and something for one of them alone."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.conv, self.twice, self.later = settings.get("conv"), settings.get("twice", False), False

    def switch(self) -> None:
        self.later = True


class Conv(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0 and self.conv is not None:
                x = self.conv(x)
        return x


class Twice(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x * i if self.twice else x)
        return x


class Not(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if not self.twice or self.conv is None:
                x = block(x)
            else:
                x = x * i
                x = block(x)
        return x


class Later(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x * i if self.later else x)
        return x


class Training(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x * i if self.training else x)
        return x


class Given(Counting):
    def forward(self, x: Tensor, by: Tensor | None = None, scales: Any = 1) -> Tensor:
        for i, block in enumerate(self.blocks):
            if by is not None:
                x = block(x * scales[i])
        return x


class Made(Counting):
    def forward(self, x: Tensor, by: Tensor | None = None, scales: Any = 1) -> Tensor:
        if by is None:
            by = x
        for i, block in enumerate(self.blocks):
            if by is not None:
                x = block(x * scales[i])
        return x


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Conv(), FREE),
        (Conv(conv=nn.Linear(2, 2)), MINDS),
        (Twice(), FREE),
        (Twice(twice=True), MINDS),
        (Not(), FREE),
        (Not(twice=True), FREE),
        (Not(twice=True, conv=nn.Linear(2, 2)), MINDS),
        (Later(), MINDS),  # another method sets it
        (Training().eval(), MINDS),
        (Given(), Numbering(arguments=frozenset({"by"}))),
        (Made(), MINDS),  # what is not given is made
    ],
)
def test_what_is_never_reached_minds_no_number(model: nn.Module, expected: Numbering) -> None:
    assert find_numbering(model, "blocks", ()) == expected


def deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    return shake(transformers.DebertaV2ForMaskedLM(config))


def test_deberta_without_its_convolution_can_be_exported(tmp_path: Path) -> None:
    model = deberta()
    model.save_pretrained(tmp_path / "source")
    plan = sw.Plan.of(sw.find_contract(model).shape, [0])
    smaller = type(model).from_pretrained(sw.export(plan, tmp_path / "source", tmp_path / "smaller")).eval()
    inputs = example_inputs(model, Size(batch=2))
    with torch.no_grad(), sw.skip(model, plan):
        expected = output(model, inputs)
    with torch.no_grad():
        assert torch.equal(output(smaller, inputs), expected)
