"""Exports for mlx-lm, opened in mlx-lm: the logits are transformers' own, or the export was refused.

pip install mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2   # on Linux; mlx-cpu is for machines without a GPU
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import skipwise as sw
from tests.test_engines import IDS, logits, plan_of, saved, stock

pytestmark = pytest.mark.slow
# two blocks out: of Gemma3 and Cohere2 in their rhythm and out of it
CASES = [
    ("gemma3", (0, 4)),
    ("gemma3", (6, 7)),
    ("gemma3", (1, 2)),
    ("gemma3", (3, 7)),
    ("cohere2", (1, 6)),
    ("cohere2", (1, 2)),
    ("smollm3", (1, 2)),
    ("smollm3", (0, 7)),
    ("qwen2", (2, 5)),
    ("llama", (2, 5)),
    ("qwen3", (2, 5)),
    ("olmo3", (1, 5)),
    ("olmo3", (3, 7)),
]
REFUSED = [("gemma3", (1, 2)), ("gemma3", (3, 7)), ("cohere2", (1, 2)), ("olmo3", (3, 7))]


def of_mlx(at: Path) -> torch.Tensor:
    """The logits of a folder in mlx-lm, on the CPU."""
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    mlx.set_default_device(mlx.cpu)
    model, _ = importlib.import_module("mlx_lm.utils").load_model(at)
    return torch.from_numpy(np.array(model(mlx.array(IDS.numpy())).astype(mlx.float32)))


@pytest.mark.parametrize(("name", "skipped"), CASES)
def test_mlx_lm(name: str, skipped: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    model: Any = saved(name, tmp_path / "source")
    plan = plan_of(model, *skipped)
    if (name, skipped) in REFUSED:
        with pytest.raises(sw.UserError, match=r"mlx-lm 0\.32\.2"):
            sw.export(plan, tmp_path / "source", tmp_path / "target", engine="mlx-lm")
        plain = sw.export(plan, tmp_path / "source", tmp_path / "plain")
        with pytest.raises((AssertionError, IndexError, ValueError, TypeError)):  # it was right to refuse
            torch.testing.assert_close(of_mlx(plain), logits(stock(plain)), atol=1e-3, rtol=1e-3)
        if name == "olmo3":
            return
    target = sw.export(plan, tmp_path / "source", tmp_path / "target", engine="mlx-lm", nearest=True)
    torch.testing.assert_close(of_mlx(target), logits(stock(target)), atol=1e-3, rtol=1e-3)
