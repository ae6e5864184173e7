"""Two models beside each other, and one analysis by two processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import skipwise as sw
from skipwise import cli
from skipwise.analysis.samples import Batch
from skipwise.evaluation import calibration_texts
from tests.test_analysis import TEXTS, close, joined, plain_cka, plain_similarity
from tests.tiny_models import ROWS, VOCABULARY


class Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) % (VOCABULARY - 5) for c in text]}


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, Any]:
    dllm, tokenizer = sw.load("tiny-dllm")
    return dllm, sw.load("tiny-ar")[0], tokenizer


def test_a_comparison_is_the_plain_one(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    first, second, tokenizer = pair
    found = sw.compare(first, second, tokenizer, TEXTS[:2], names=("tiny-dllm", "tiny-ar"))
    ids = torch.tensor([tokenizer(p + a)["input_ids"] for p, a in TEXTS[:2]])
    both = torch.cat([joined(model, tokenizer)[:, : ids.numel()] for model in (first, second)])
    n = len(both) // 2
    close(found.tensors["similarity"], plain_similarity(both)[:n, n:])
    cka = plain_cka(both)  # two texts of 16 tokens are one group of 32
    close(found.tensors["cka"], cka[:n, n:])
    close(found.tensors["first_cka"], cka[:n, :n])
    close(found.tensors["second_cka"], cka[n:, n:])
    (channel,) = found.tensors["outlier_channels"].tolist()
    others = [c for c in range(both.shape[-1]) if c != channel]
    close(found.tensors["similarity_without_outliers"], plain_similarity(both[..., others])[:n, n:])
    assert torch.equal(found.corresponding, found.tensors["cka"].diagonal())
    assert found.names == ("tiny-dllm", "tiny-ar")
    assert found.kinds == ("masked diffusion", "autoregressive")
    assert found.calibration["tokens"] == 32
    assert not any(module._forward_hooks for model in (first, second) for module in model.modules())


def test_a_model_is_like_itself_and_its_turned_twin_is_so_by_cka_alone() -> None:
    """Permuted channels, an exact symmetry of a Llama's stream: another cosine, the same CKA."""
    model, twin = ROWS["llama"](), ROWS["llama"]()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "norm" in name or any(part in name for part in ("o_proj", "down_proj")):
                weight.copy_(weight[order])
            else:
                weight.copy_(weight[:, order])
    texts = ["a first text that is read", "another one, which is longer than it"]
    itself = sw.compare(model, model, Letters(), texts)
    torch.testing.assert_close(itself.corresponding, torch.ones(5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(itself.tensors["similarity"].diagonal(), torch.ones(5).double(), atol=1e-5, rtol=0)
    turned = sw.compare(model, twin, Letters(), texts)
    torch.testing.assert_close(turned.corresponding, torch.ones(5).double(), atol=1e-4, rtol=0)
    assert turned.tensors["similarity"].diagonal().abs().max() < 0.5


def test_batching_does_not_matter(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    texts = calibration_texts(pair[2], 40)
    one, many = (sw.compare(*pair, texts, batch_size=size) for size in (1, 64))
    for key in one.tensors:
        torch.testing.assert_close(one.tensors[key], many.tensors[key], rtol=0, atol=1e-6, msg=key)


def test_round_trip_beside_an_analysis(pair: tuple[nn.Module, nn.Module, Any], tmp_path: Path) -> None:
    found = sw.compare(*pair, TEXTS)
    sw.analyze(pair[0], pair[2], TEXTS, max_steps=1, noise_levels=1).save(tmp_path)
    again = sw.Comparison.load(found.save(tmp_path))
    assert (again.names, again.models, again.kinds) == (found.names, found.models, found.kinds)
    assert all(torch.equal(again.tensors[key], value) for key, value in found.tensors.items())
    assert again.tensors.keys() == found.tensors.keys()
    assert (again.calibration, again.settings) == (found.calibration, found.settings)
    assert sw.Analysis.load(tmp_path).kind == "masked diffusion"
    with pytest.raises(sw.UserError, match="holds no readable comparison"):
        sw.Comparison.load(tmp_path / "none")


def test_what_cannot_be_compared(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    with pytest.raises(sw.UserError, match="the first has 24 blocks, the second 4"):
        sw.compare(pair[0], ROWS["llama"](), pair[2], TEXTS)
    with pytest.raises(sw.UserError, match="knows 64 tokens, but the texts hold token 90"):
        sw.compare(ROWS["llama"](), ROWS["qwen2"](), lambda text: {"input_ids": [1, 90]}, TEXTS)
    with pytest.raises(sw.UserError, match="no texts"):
        sw.compare(*pair, [])


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "tiny-ar", "--beside", "tiny-dllm", "--parts", "layers,lens", "--count", "6", "-o"]
    monkeypatch.setattr(sys, "argv", ["skipwise", *arguments, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "tiny-ar beside tiny-dllm: CKA of corresponding layers" in capsys.readouterr().out
    assert sw.Comparison.load(tmp_path).names == ("tiny-ar", "tiny-dllm")
    assert "model.layers/lens_agreement" in sw.Analysis.load(tmp_path).tensors
    monkeypatch.setattr(sys, "argv", ["skipwise", "analyze", "tiny-ar", "--parts", "layer", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "Did you mean 'layers'" in capsys.readouterr().err


SETTINGS: dict[str, Any] = {"noise_levels": 2, "max_steps": 2, "step_bins": 2, "batch_size": 9}


def _one_of_two(rank: int, folder: Path, name: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, tokenizer = sw.load(name)
    read: list[int] = []
    ids = Batch.ids.fget  # type: ignore[attr-defined]
    Batch.ids = property(lambda self: read.extend(s.number for s in self.samples) or ids(self))  # type: ignore
    texts = calibration_texts(tokenizer, 24)
    sw.analyze(model, tokenizer, texts, parts=sw.analysis.PARTS, **SETTINGS).save(folder / str(rank))
    (folder / f"read-{rank}.json").write_text(json.dumps(sorted(set(read))))
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["tiny-dllm", "tiny-ar"])
def test_two_processes_give_what_one_does(name: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_one_of_two, args=(rank, tmp_path, name)) for rank in range(2)]
    for worker in workers:
        worker.start()
    model, tokenizer = sw.load(name)
    texts = calibration_texts(tokenizer, 24)
    alone = sw.analyze(model, tokenizer, texts, parts=sw.analysis.PARTS, **SETTINGS)
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    read = [set(json.loads((tmp_path / f"read-{rank}.json").read_text())) for rank in range(2)]
    assert read[0] | read[1] == set(range(len(texts)))
    assert all(len(numbers) < len(texts) for numbers in read), "each reads its share"
    for rank in range(2):
        same(sw.Analysis.load(tmp_path / str(rank)).tensors, alone.tensors)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9, equal_nan=True, msg=key)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    """Two processes that accelerate starts on the CPU; one of them writes."""
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch = [str(Path(sys.executable).parent / launch[0]), *launch[1:], "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "skipwise"]
    command = ["analyze", "tiny-dllm", "--beside", "tiny-ar", "--count", "16", "--batch-size", "9", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([*launch, *command, str(tmp_path / "two")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens of tiny-dllm analysed") == 1
    alone = [sys.executable, "-m", "skipwise", *command, str(tmp_path / "one")]
    assert subprocess.run(alone, capture_output=True, env=environment).returncode == 0
    for record in (sw.Analysis, sw.Comparison):
        same(record.load(tmp_path / "two").tensors, record.load(tmp_path / "one").tensors)
