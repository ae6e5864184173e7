"""Linear maps by another library are the same maps, and only ever of plain weights."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.models import linear as module
from skipwise.models.linear import linear, product

needs_onednn = pytest.mark.skipif(not module._callable(), reason="this torch has no oneDNN")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN is preferred, whatever the machine, and from the first multiplication on; its calls are noted."""
    calls: list[int] = []
    plain = torch.ops.mkldnn._linear_pointwise

    def noted(x: Tensor, *args: Any) -> Tensor:
        calls.append(len(x))
        return plain(x, *args)

    monkeypatch.setattr(module, "PREFERRED", True)
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (3, 1, 2)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products_are_those_of_torch(quick: list[int], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias), torch.randn(*shape, 24)
    torch.testing.assert_close(linear(layer, x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    across = x.transpose(0, -1).contiguous().transpose(0, -1)
    torch.testing.assert_close(linear(layer, across), layer(x), rtol=1e-5, atol=1e-5)
    assert len(quick) == 2


@needs_onednn
def test_what_is_left_to_torch(quick: list[int]) -> None:
    """Gradients, half precision, weights that are no plain matrix, modules with hooks and adapters."""
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    assert linear(layer, x).requires_grad
    with torch.no_grad():
        assert linear(layer.double(), x.double()).dtype == torch.float64
        assert linear(layer.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
        weight = nn.Parameter(torch.randn(8, 8).t())
        torch.testing.assert_close(product(x, weight), x @ weight.t())
        seen: list[Tensor] = []
        layer.float().register_forward_hook(lambda _, args, out: seen.append(out))
        assert torch.equal(linear(layer, x), seen[0])
        adapted = inject_adapter_in_model(
            LoraConfig(target_modules=["0"], init_lora_weights=False), nn.Sequential(layer)
        )
        assert torch.equal(linear(adapted[0], x), adapted(x))
    assert not quick


@pytest.mark.parametrize(
    ("capability", "vendor", "preferred"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
@needs_onednn
def test_where_it_is_preferred(capability: str, vendor: str, preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(module, "_vendor", lambda: vendor)
    assert module.prefers_onednn() == preferred


@torch.no_grad()
def test_small_products_are_left_to_torch(quick: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for rows in (1, 9, 10):  # of 200 multiplications
        product(torch.randn(rows, 10), torch.randn(20, 10))
    assert quick == [10]
