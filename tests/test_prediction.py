"""Reading logits: what is quicker on a CPU gives what torch's own functions give."""

import pytest
import torch
from torch import Tensor

from skipwise.sampling import prediction
from skipwise.sampling.prediction import largest, probabilities_of


@pytest.fixture(autouse=True)
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "MANY", 0)
    monkeypatch.setattr(prediction, "RUN", 16)


def tied() -> Tensor:
    return torch.randint(0, 3, (40, 100)).float()


def ends() -> Tensor:
    """The largest in the first run, the last whole one, and what is left over."""
    values = torch.randn(6, 100)
    for row, column in enumerate((0, 15, 16, 95, 96, 99)):
        values[row, column] = 9.0
    return values


def missing() -> Tensor:
    values = torch.randn(4, 100)
    values[0] = -torch.inf
    values[1, :97] = -torch.inf
    values[2, 50] = torch.nan
    values[3, 99] = torch.nan
    return values


@pytest.mark.parametrize("make", [tied, ends, missing, lambda: torch.randn(7, 96), lambda: torch.randn(2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest(make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = make().to(dtype)
    assert torch.equal(largest(values), values.argmax(-1))


def test_the_largest_of_several_dimensions_and_of_few_words() -> None:
    for values in (torch.randn(2, 3, 50), torch.randn(3, 15)):
        assert torch.equal(largest(values), values.argmax(-1))


@pytest.mark.parametrize("words", [1, 7, 16, 1000, 5003])
def test_probabilities(words: int) -> None:
    logits = 20 * torch.randn(9, words)
    logits[:, words // 2] = -torch.inf
    expected = logits.softmax(-1)
    assert torch.equal(probabilities_of(logits).nan_to_num(7), expected.nan_to_num(7))
