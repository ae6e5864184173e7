"""Analyses: streamed statistics beside plain ones, own trajectories, and a round trip through files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipwise as sw
from skipwise.analysis.cka import CKA, unbiased_hsic
from skipwise.analysis.states import StateReader, StateStatistics, outlier_channels
from skipwise.blocks import find_contract
from skipwise.evaluation import calibration_texts
from skipwise.sampling import Denoiser, LLaDASettings
from skipwise.sampling.llada import decode
from tests.survey.classes import build
from tests.tiny_models import ROWS, example

TEXTS = [("s3141592=", "1123459"), ("r3141592=", "2951413"), ("a123+456=", "9750")]  # 16, 16 and 13 tokens


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


def joined(model: nn.Module, tokenizer: Any) -> Tensor:
    """(blocks + 1, tokens, width): the states of TEXTS, one text after the other."""
    ids = [torch.tensor([tokenizer(p + a)["input_ids"]]) for p, a in TEXTS]
    return torch.cat([plain_states(model, each).flatten(1, 2) for each in ids], 1)


def close(streamed: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(streamed.float(), plain.float(), rtol=1e-4, atol=1e-5)


def test_autoregressive_statistics_are_the_plain_ones(ar: tuple[nn.Module, Any]) -> None:
    model, tokenizer = ar
    analysis = sw.analyze(model, tokenizer, TEXTS, batch_size=1)
    states = joined(model, tokenizer)
    close(analysis.tensors["model.layers/similarity"], plain_similarity(states))
    norms = ((states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1)).mean(1)
    close(analysis.tensors["model.layers/update_norm"], norms)
    assert analysis.calibration["tokens"] == 16 + 16 + 13
    assert "model.layers/step_similarity" not in analysis.tensors


def test_similarity_without_outliers_is_that_of_the_other_channels(ar: tuple[nn.Module, Any]) -> None:
    model, tokenizer = ar
    analysis = sw.analyze(model, tokenizer, TEXTS, outliers=2, parts=("layers",))
    channels = analysis.tensors["model.layers/outlier_channels"].tolist()
    states = joined(model, tokenizer)
    others = [c for c in range(states.shape[-1]) if c not in channels]
    close(analysis.tensors["model.layers/similarity_without_outliers"], plain_similarity(states[..., others]))
    share = (states[..., channels].square() / states.square().sum(-1, keepdim=True)).mean(1)
    close(analysis.tensors["model.layers/outlier_share"], share)
    close(analysis.tensors["model.layers/similarity"], plain_similarity(states))
    none = sw.analyze(model, tokenizer, TEXTS, outliers=0, parts=("layers",))
    assert "model.layers/outlier_channels" not in none.tensors
    assert "model.layers/similarity_without_outliers" not in none.tensors


def test_one_channel_that_holds_a_cosine_near_one_is_seen_through() -> None:
    """Layer collapse: directions that change wholly under a channel that stays, ten thousand times as large."""
    torch.manual_seed(0)
    states = torch.randn(3, 500, 16)
    states[..., 5] = 1e4
    channels = outlier_channels(states, 1)
    assert channels.tolist() == [5]
    statistics = StateStatistics(2, channels)
    statistics.add(states)
    assert statistics.successive_similarity.min() > 0.999
    others = torch.cat([states[..., :5], states[..., 6:]], -1)
    close(statistics.similarity_without_outliers, plain_similarity(others))


def plain_cka(states: Tensor) -> Tensor:
    """Unbiased CKA of every pair, by U-centring in float64: the textbook's other form of HSIC_1."""
    n = states.shape[1]

    def centred(x: Tensor) -> Tensor:
        gram = (x @ x.T).double()
        gram.fill_diagonal_(0)
        rows = gram.sum(1, keepdim=True) / (n - 2)
        gram = gram - rows - rows.T + gram.sum() / ((n - 1) * (n - 2))
        return gram.fill_diagonal_(0)

    flat = torch.stack([centred(x).flatten() for x in states.double()])
    flat = flat / flat.norm(dim=1, keepdim=True)
    return flat @ flat.T


def test_cka_of_one_group_is_the_full_one(ar: tuple[nn.Module, Any]) -> None:
    states = joined(*ar)[:, :30]
    statistics = CKA(len(states))
    statistics.add(states[:, None], texts=1)
    assert statistics.cka is not None
    close(statistics.cka, plain_cka(states))


def test_cka_is_unbiased_and_minds_neither_rotation_nor_scale() -> None:
    """Thousands of groups of few tokens: unrelated states have CKA 0, the biased estimate would be near 1."""
    torch.manual_seed(0)
    x, unrelated = torch.randn(2, 2000, 8, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    statistics = CKA(3)
    statistics.add(torch.stack([x, 3 * x @ rotation + 5, unrelated]), texts=1)
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(statistics.cka, expected.double(), atol=0.02, rtol=0)
    hsic = unbiased_hsic((x[0] @ x[0].T)[None, None].double())
    flat = x[0].double()
    assert float(hsic) == pytest.approx(float(unbiased_hsic(((flat + 9) @ (flat + 9).T)[None, None])))


def test_own_trajectory_is_averaged_over_its_steps(dllm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = dllm
    analysis = sw.analyze(model, tokenizer, [("a123+456=", "9750")], step_bins=4)
    ids = torch.tensor([tokenizer("a123+456=")["input_ids"]])
    seen: list[Tensor] = []
    settings = LLaDASettings(gen_length=4)
    decode(Denoiser(model, on_step=lambda s: seen.append(s.sequences.clone())), ids, settings)
    states = [plain_states(model, x).flatten(1, 2) for x in seen]
    assert len(states) == 4
    close(analysis.tensors["model.layers/similarity"], plain_similarity(torch.cat(states, 1)))
    by_step = torch.stack([torch.diagonal(plain_similarity(s), offset=1) for s in states])
    close(analysis.tensors["model.layers/step_similarity"], by_step)
    assert analysis.tensors["model.layers/progress"].tolist() == [0.125, 0.375, 0.625, 0.875]
    (channel,) = analysis.tensors["model.layers/outlier_channels"].tolist()
    others = [s[..., [c for c in range(s.shape[-1]) if c != channel]] for s in states]
    by_step = torch.stack([torch.diagonal(plain_similarity(s), offset=1) for s in others])
    close(analysis.tensors["model.layers/step_similarity_without_outliers"], by_step)
    assert analysis.tensors["model.layers/step_recency"].shape == (4, 25)


def test_noise_changes_the_states_by_level(dllm: tuple[nn.Module, Any]) -> None:
    analysis = sw.analyze(*dllm, calibration_texts(dllm[1], 16), noise_levels=4, max_steps=1, parts=["layers"])
    assert analysis.tensors["model.layers/noise_levels"].tolist() == [0.125, 0.375, 0.625, 0.875]
    norms = analysis.tensors["model.layers/noise_update_norm"]
    assert norms.shape == (4, 24)
    assert not torch.allclose(norms[0], norms[3], rtol=0.01)


def test_memory_does_not_grow_with_tokens() -> None:
    """Sums are kept, never states: after any number of tokens the accumulator holds the same tensors."""
    statistics = StateStatistics(3)
    before = {name: total.shape for name, total in statistics.totals.items()}
    for _ in range(5):
        statistics.add(torch.randn(4, 100, 8))
    assert {name: total.shape for name, total in statistics.totals.items()} == before
    assert [name for name, value in vars(statistics).items() if isinstance(value, Tensor)] == ["outliers"]
    assert sum(total.numel() for total in statistics.totals.values()) == 1 + 2 * 4 * 4 + 3
    assert statistics.tokens == 500
    assert torch.allclose(torch.diagonal(statistics.similarity), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tiny-dllm", "tiny-ar"])
def test_batching_does_not_matter(name: str) -> None:
    """Texts of unequal lengths; every statistic, also those of groups of tokens, of noise and of chosen texts."""
    model, tokenizer = sw.load(name)
    texts = [*calibration_texts(tokenizer, 14), "s31=13"]
    settings = {"parts": sw.analysis.PARTS, "noise_levels": 1, "step_bins": 2, "max_steps": 2}
    one, many = (sw.analyze(model, tokenizer, texts, batch_size=size, **settings) for size in (1, 64))
    assert one.tensors.keys() == many.tensors.keys()
    assert len(one.tensors) >= 15
    for key in one.tensors:
        torch.testing.assert_close(one.tensors[key], many.tensors[key], rtol=0, atol=1e-6, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", ["flux", "sd3", "cogview4"])
def test_reader_takes_the_image_stream_wherever_it_is(name: str) -> None:
    model = ROWS[name]()
    inputs = example(model)
    stack = find_contract(model).stacks["transformer_blocks"]
    reader = StateReader(model, stack)
    with reader.reading(), torch.no_grad():
        model(**inputs)
        states = reader.take()
        assert not reader.take()
    assert [state.shape for state in states] == [(2, 16, 32)] * (stack.length + 1), "text has another length"
    assert all(not block._forward_hooks for block in model.transformer_blocks)


def test_round_trip(dllm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    texts = calibration_texts(dllm[1], 8)
    analysis = sw.analyze(*dllm, texts, noise_levels=2, name="mine", parts=sw.analysis.PARTS)
    again = sw.Analysis.load(analysis.save(tmp_path / "a"))
    assert again.model == analysis.model
    assert again.name == "mine"
    assert again.tensors.keys() == analysis.tensors.keys()
    assert all(torch.equal(again.tensors[k], t) for k, t in analysis.tensors.items())
    assert (again.calibration, again.settings) == (analysis.calibration, analysis.settings)


def test_every_tensor_is_documented(dllm: tuple[nn.Module, Any]) -> None:
    """With its shape, where n = 24 blocks, and no other."""
    found = sw.analyze(*dllm, TEXTS, noise_levels=2, max_steps=4, parts=sw.analysis.PARTS)
    text = " ".join((sw.Analysis.__doc__ or "").split())
    known = {"steps": len(found.tensors["model.layers/progress"]), "levels": 2, "n": 24, "n+1": 25, "c": 1, "d": 15}
    known |= {"2b+1": 9, "2": 2}
    for key, tensor in found.tensors.items():
        name = key.rpartition("/")[2]
        assert f" {name} (" in text, name
        written = text.split(f" {name} (")[1].split(")")[0]
        assert tuple(known[size] for size in written.strip(",").split(", ")) == tensor.shape, name


def test_what_holds_no_analysis(dllm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(sw.UserError, match="holds no readable analysis"):
        sw.Analysis.load(tmp_path)
    folder = sw.analyze(*dllm, [("a1+1=", "2")], noise_levels=1).save(tmp_path / "a")
    (folder / "analysis.safetensors").write_bytes(b"cut")
    with pytest.raises(sw.UserError, match="holds no readable analysis"):
        sw.Analysis.load(folder)


def test_what_cannot_be_analyzed(dllm: tuple[nn.Module, Any]) -> None:
    with pytest.raises(sw.UserError, match="There are no texts to read"):
        sw.analyze(*dllm, [])
    with pytest.raises(sw.UserError, match="Did you mean 'layers'"):
        sw.analyze(*dllm, TEXTS, parts=["layer"])
    with pytest.raises(sw.UserError, match="give parts out of layers, tokens, attention, lens"):
        sw.analyze(*dllm, TEXTS, parts=[])
    with pytest.raises(sw.UserError, match="channels"):
        sw.analyze(*dllm, TEXTS, outliers=64)
    lens = sw.analyze(*dllm, TEXTS, parts=["lens"], max_steps=2)
    with pytest.raises(sw.UserError, match="analyze with `layers`"):
        lens.successive_similarity("model.layers")


def test_an_analysis_is_of_the_whole_model(ar: tuple[nn.Module, Any]) -> None:
    model, tokenizer = ar
    before = sw.analyze(model, tokenizer, TEXTS)
    with sw.skip(model, sw.make_plan(before, skip=3)):
        inside = sw.analyze(model, tokenizer, TEXTS)
    assert torch.equal(inside.tensors["model.layers/similarity"], before.tensors["model.layers/similarity"])


def test_bert_is_read_too() -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 64 for c in text]}

    analysis = sw.analyze(ROWS["bert"](), Letters(), ["hello world", "a text"])
    assert analysis.kind == "encoder"
    assert analysis.tensors["bert.encoder.layer/similarity"].shape == (5, 5)


def test_states_are_by_text_where_several_streams_come_first() -> None:
    """Gemma3n's are (streams, texts, tokens, width)."""
    model = build("Gemma3nForCausalLM")
    reader = StateReader(model, find_contract(model).stacks["model.layers"])
    with reader.reading(), torch.no_grad():
        model(input_ids=torch.arange(14).view(2, 7))
        states = reader.take()
    assert [tuple(state.shape) for state in states] == [(2, 7, 4 * 64)] * 7
