"""Analyses: streamed statistics beside plain ones, own trajectories, and a round trip through files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipwise as sw
from skipwise.analysis.states import StateReader, StateStatistics
from skipwise.blocks import find_contract
from skipwise.evaluation import calibration_texts
from skipwise.sampling import Denoiser, LLaDASettings
from skipwise.sampling.llada import decode
from tests.tiny_models import ROWS, example


@pytest.fixture(scope="module")
def dllm() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


@pytest.fixture(scope="module")
def ar() -> tuple[nn.Module, Any]:
    return sw.load("tiny-ar")


def plain_states(model: nn.Module, ids: Tensor) -> Tensor:
    """(blocks + 1, batch, length, width), read block by block by hand."""
    states: list[Tensor] = []
    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda m, a, k: states.append(a[0]), with_kwargs=True)]
    handles += [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return torch.stack(states)


def plain_similarity(states: Tensor) -> Tensor:
    """Mean over tokens of the cosine of every pair, one pair at a time."""
    n = len(states)
    return torch.tensor(
        [[F.cosine_similarity(states[i], states[j], dim=-1).mean() for j in range(n)] for i in range(n)]
    )


def test_autoregressive_statistics_are_the_plain_ones(ar: tuple[nn.Module, Any]) -> None:
    model, tokenizer = ar
    texts = [("s3141592=", "1123459"), ("r3141592=", "2951413"), ("a123+456=", "9750")]
    analysis = sw.analyze(model, tokenizer, texts, batch_size=1)
    states = [plain_states(model, torch.tensor([tokenizer(p + a)["input_ids"]])).flatten(1, 2) for p, a in texts]
    joined = torch.cat(states, 1)
    torch.testing.assert_close(
        analysis.tensors["model.layers/similarity"].float(), plain_similarity(joined), rtol=1e-4, atol=1e-5
    )
    norms = ((joined[1:] - joined[:-1]).norm(dim=-1) / joined[:-1].norm(dim=-1)).mean(1)
    torch.testing.assert_close(analysis.tensors["model.layers/update_norm"].float(), norms, rtol=1e-4, atol=1e-5)
    assert analysis.calibration["tokens"] == 16 + 16 + 13
    assert "model.layers/step_similarity" not in analysis.tensors


def test_own_trajectory_is_averaged_over_its_steps(dllm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = dllm
    analysis = sw.analyze(model, tokenizer, [("a123+456=", "9750")], step_bins=4)
    ids = torch.tensor([tokenizer("a123+456=")["input_ids"]])
    seen: list[Tensor] = []
    decode(Denoiser(model, on_step=lambda s: seen.append(s.sequences.clone())), ids, LLaDASettings(gen_length=4))
    states = [plain_states(model, x).flatten(1, 2) for x in seen]
    assert len(states) == 4
    expected = plain_similarity(torch.cat(states, 1))
    torch.testing.assert_close(analysis.tensors["model.layers/similarity"].float(), expected, rtol=1e-4, atol=1e-5)
    by_step = torch.stack([torch.diagonal(plain_similarity(s), offset=1) for s in states])
    torch.testing.assert_close(analysis.tensors["model.layers/step_similarity"].float(), by_step, rtol=1e-4, atol=1e-5)
    assert analysis.tensors["model.layers/progress"].tolist() == [0.125, 0.375, 0.625, 0.875]


def test_noise_changes_the_states_by_level(dllm: tuple[nn.Module, Any]) -> None:
    analysis = sw.analyze(*dllm, calibration_texts(dllm[1], 16), noise_levels=4)
    assert analysis.tensors["model.layers/noise_levels"].tolist() == [0.125, 0.375, 0.625, 0.875]
    norms = analysis.tensors["model.layers/noise_update_norm"]
    assert norms.shape == (4, 24)
    assert not torch.allclose(norms[0], norms[3], rtol=0.01)


def test_memory_does_not_grow_with_tokens() -> None:
    """Sums are kept, never states: after any number of tokens the accumulator holds the same tensors."""
    statistics = StateStatistics(3)
    for _ in range(5):
        statistics.add(torch.randn(4, 100, 8))
    held = [t for t in vars(statistics).values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) == 4 * 4 + 3
    assert statistics.tokens == 500
    assert torch.allclose(torch.diagonal(statistics.similarity), torch.ones(4, dtype=torch.float64))


def test_padding_and_batching_do_not_matter(dllm: tuple[nn.Module, Any]) -> None:
    texts = calibration_texts(dllm[1], 12)
    one, many = (sw.analyze(*dllm, texts, batch_size=size, noise_levels=2) for size in (1, 64))
    key = "model.layers/similarity"
    torch.testing.assert_close(one.tensors[key], many.tensors[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3", "cogview4"])
def test_reader_takes_the_image_stream_wherever_it_is(name: str) -> None:
    model = ROWS[name]()
    inputs = example(model)
    stack = find_contract(model).stacks["transformer_blocks"]
    reader = StateReader(model, stack)
    with reader.reading(), torch.no_grad():
        model(**inputs)
        length = reader._states[0].shape[1]
        states = reader.states(torch.ones(2, length, dtype=torch.bool))
    assert states.shape == (stack.length + 1, 2 * length, 32)
    assert length == 16, "text has another length"
    assert all(not block._forward_hooks for block in model.transformer_blocks)


def test_round_trip(dllm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    analysis = sw.analyze(*dllm, calibration_texts(dllm[1], 8), noise_levels=2, name="mine")
    again = sw.Analysis.load(analysis.save(tmp_path / "a"))
    assert again.model == analysis.model
    assert again.name == "mine"
    assert again.tensors.keys() == analysis.tensors.keys()
    assert all(
        torch.equal(
            again.tensors[k],
            t,
        )
        for k, t in analysis.tensors.items()
    )
    assert (again.calibration, again.settings) == (analysis.calibration, analysis.settings)


def test_what_holds_no_analysis(dllm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(sw.UserError, match="holds no readable analysis"):
        sw.Analysis.load(tmp_path)
    folder = sw.analyze(*dllm, [("a1+1=", "2")], noise_levels=1).save(tmp_path / "a")
    (folder / "analysis.safetensors").write_bytes(b"cut")
    with pytest.raises(sw.UserError, match="holds no readable analysis"):
        sw.Analysis.load(folder)
    with pytest.raises(sw.UserError, match="There are no texts to analyze"):
        sw.analyze(*dllm, [])


def test_bert_is_read_too() -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 64 for c in text]}

    analysis = sw.analyze(ROWS["bert"](), Letters(), ["hello world", "a text"])
    assert analysis.kind == "encoder"
    assert analysis.tensors["bert.encoder.layer/similarity"].shape == (5, 5)
