"""ONNX and OpenVINO files give the exported model's logits, for texts of other lengths too."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import skipwise as sw
from skipwise.blocks import find_contract
from tests.tiny_models import ROWS

IDS = torch.arange(3, 24).view(3, 7)


def exported(at: Path, engine: str, name: str = "llama") -> Path:
    model: Any = ROWS[name]()
    model.save_pretrained(at / "source")
    plan = sw.Plan.static(find_contract(model).shape, {"model.layers": [1]})
    return sw.export(plan, at / "source", at / "target", engine=engine)


def logits(at: Path) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(at).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    target = exported(tmp_path, "onnx", name)
    session = onnxruntime.InferenceSession(target / "model.onnx")
    (found,) = session.run(["logits"], {"input_ids": IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(target), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_openvino(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    target = exported(tmp_path, "openvino", name)
    compiled = openvino.compile_model(target / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = next(iter(compiled([IDS.numpy()]).values()))
    torch.testing.assert_close(torch.from_numpy(found), logits(target), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("engine", "module"), [("onnx", "onnxscript"), ("openvino", "openvino"), ("llama.cpp", "gguf")]
)
def test_a_library_that_is_missing(engine: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(sw.UserError, match=rf"needs {module}, which is not installed. Install it with: pip install"):
        exported(tmp_path, engine)
    assert not (tmp_path / "target").exists()


def test_a_model_that_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing is left."""

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nCould not guard on data-dependent expression\nmore")

    monkeypatch.setitem(sys.modules, "openvino", sys)
    monkeypatch.setattr(torch.export, "export", failing)
    with pytest.raises(sw.UserError, match=r"llama cannot be traced \(Could not guard on data-dependent expression\);"):
        exported(tmp_path, "openvino")
    assert not (tmp_path / "target").exists()
