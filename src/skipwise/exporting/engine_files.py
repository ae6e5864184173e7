"""The files beside the weights that some engines run: GGUF for llama.cpp, ONNX, and OpenVINO's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from skipwise.exporting import gguf_file, graph_files

Config = dict[str, Any]


class EngineFile(NamedTuple):
    """check(config, source) raises UserError before anything is written; write(folder, config) adds the file."""

    check: Callable[[Config, Path], None]
    write: Callable[[Path, Config], None]


FILES = {
    "llama.cpp": EngineFile(gguf_file.check, gguf_file.write),
    "onnx": EngineFile(graph_files.check_onnx, graph_files.write_onnx),
    "openvino": EngineFile(graph_files.check_openvino, graph_files.write_openvino),
}


def has_file(engine: str | None) -> bool:
    """Whether an export for this engine has a file of its own, with all weights in it once more."""
    return engine in FILES


def check_file(engine: str, config: Config, source: Path) -> None:
    """Raise UserError when the engine's file cannot be made of a model of this config with this folder's tokenizer."""
    if engine in FILES:
        FILES[engine].check(config, source)


def write_file(engine: str | None, folder: Path, config: Config) -> None:
    """Add the engine's file to the folder of an export."""
    if engine in FILES:
        FILES[engine].write(folder, config)
