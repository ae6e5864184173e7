"""The exported program of a language model, for ONNX runtimes and OpenVINO: token ids in, logits out, no KV cache.

torch.export traces the finished export, loaded whole; both lengths of the input are free.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skipwise.errors import UserError, require
from skipwise.loading import NATIVE

Config = dict[str, Any]
ONNX_FILE, OPENVINO_FILE = "model.onnx", "openvino_model.xml"


class Logits(nn.Module):
    """A language model as a function of token ids (batch, length): logits (batch, length, vocabulary)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Of a text without padding."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def check_onnx(config: Config, source: Path) -> None:
    """Raise UserError where torch.onnx lacks a library, and for models that take no token ids."""
    require("onnxscript", "onnx")
    _check_language(config)


def check_openvino(config: Config, source: Path) -> None:
    """Raise UserError where openvino is not installed, and for models that take no token ids."""
    require("openvino", "openvino")
    _check_language(config)


def _check_language(config: Config) -> None:
    kind = config.get("model_type")
    if kind in NATIVE or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"ONNX and OpenVINO files are written of transformers' causal language models, not of {kind!r}."
        )


def write_onnx(folder: Path, config: Config) -> None:
    """Write model.onnx into the folder of an export. Raises UserError for a model that torch cannot trace."""
    model, inputs, shapes = _traceable(folder)
    names: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"]}
    with _one_line(config):
        torch.onnx.export(model, inputs, folder / ONNX_FILE, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)


def write_openvino(folder: Path, config: Config) -> None:
    """Write openvino_model.xml and its .bin into the folder of an export.

    Raises UserError for a model that torch cannot trace or openvino cannot convert.
    """
    openvino = require("openvino", "openvino")
    model, inputs, shapes = _traceable(folder)
    with _one_line(config):
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        openvino.save_model(openvino.convert_model(program), folder / OPENVINO_FILE, compress_to_fp16=False)


@contextmanager
def _one_line(config: Config) -> Iterator[None]:
    """Turn whatever tracing a model's code raises into one line."""
    try:
        yield
    except Exception as error:  # torch.export raises the errors of many layers
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{config['model_type']} cannot be traced ({reason[:200]}); export without --for.") from error


def _traceable(folder: Path) -> tuple[nn.Module, tuple[Tensor], Any]:
    """(the export as a function of token ids, an example, which of its lengths are free)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    lengths = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}
    return Logits(model), (torch.arange(8).view(2, 4),), {"input_ids": lengths}
