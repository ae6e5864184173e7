"""Token-wise similarity, attention mass and the logit lens: beside a plain loop, and where the answer is known."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import skipwise as sw
from skipwise.analysis.attention import AttentionStatistics
from skipwise.analysis.lens import predictions, tail_of
from skipwise.analysis.states import StateReader
from skipwise.analysis.tokens import TokenStatistics, recency_index
from skipwise.blocks import find_contract
from skipwise.plan import Plan
from tests.tiny_models import DECODER, ROWS, VOCABULARY

TEXTS = ["the first text is long enough", "a second, of other length"]


class Letters:
    """A tokenizer for the tiny random models; no letter is their mask token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) % (VOCABULARY - 5) for c in text]}


def ids_of(text: str) -> Tensor:
    return torch.tensor([Letters()(text)["input_ids"]])


def states_of(model: nn.Module, ids: Tensor) -> list[Tensor]:
    contract = find_contract(model)
    reader = StateReader(model, contract.stacks[contract.main_stack])
    with reader.reading(), torch.no_grad():
        model(input_ids=ids)
        return reader.take()


def tensor(analysis: sw.Analysis, name: str) -> Tensor:
    found = analysis.get(analysis.main_stack, name)
    assert found is not None, name
    return found


# tokens


def test_token_similarity_is_the_plain_one() -> None:
    model = ROWS["llama"]()
    analysis = sw.analyze(model, Letters(), [*TEXTS, "short"], parts=["tokens"])
    near: dict[tuple[int, int], list[float]] = {}
    far: dict[int, list[float]] = {}
    for text in TEXTS:  # the third is too short to have a far context
        for i, state in enumerate(states_of(model, ids_of(text))):
            for p in range(len(text)):
                for q in range(p):
                    cosine = float(F.cosine_similarity(state[0, p], state[0, q], dim=0))
                    near.setdefault((i, p - q), []).append(cosine)
                    if p - q >= len(text) / 2:
                        far.setdefault(i, []).append(cosine)
    mean = {key: sum(values) / len(values) for key, values in near.items()}
    similarity = tensor(analysis, "token_similarity")
    longest = max(map(len, TEXTS))
    assert similarity.shape == (5, longest - 1)
    expected = torch.tensor([[mean[i, d] for d in range(1, longest)] for i in range(5)]).double()
    torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=0)
    expected_far = torch.tensor([sum(far[i]) / len(far[i]) for i in range(5)]).double()
    torch.testing.assert_close(tensor(analysis, "token_similarity_far"), expected_far, atol=1e-5, rtol=0)
    index = (expected[:, :4].mean(1) - expected_far) / (1 - expected_far)
    torch.testing.assert_close(tensor(analysis, "recency"), index, atol=1e-5, rtol=0)


def decaying(length: int, decay: float) -> Tensor:
    """(1, 1, length, length): states whose cosine at distance d is decay ** d."""
    place = torch.arange(length)
    gram = decay ** (place[:, None] - place).abs().double()
    return torch.linalg.cholesky(gram)[None, None]


def test_recency_of_a_known_decay() -> None:
    length, decay = 40, 0.8
    statistics = TokenStatistics(1, 16)
    statistics.add(decaying(length, decay))
    powers = decay ** torch.arange(1.0, 17, dtype=torch.float64)
    torch.testing.assert_close(statistics.similarity[0], powers, atol=1e-5, rtol=0)
    pairs = [(length - d, decay**d) for d in range(20, length)]
    far = sum(n * s for n, s in pairs) / sum(n for n, _ in pairs)
    assert float(statistics.recency) == pytest.approx((float(powers[:4].mean()) - far) / (1 - far), abs=1e-5)


def test_recency_does_not_see_anisotropy() -> None:
    """A component that all states share raises every cosine; the index stays. It is 0 where order does not matter."""
    plain, shifted, unordered = (TokenStatistics(1, 16) for _ in range(3))
    states = decaying(40, 0.8)
    plain.add(states)
    shifted.add(torch.cat([states, torch.full_like(states[..., :1], 3.0)], -1))
    assert float(shifted.far) > float(plain.far) + 0.5
    torch.testing.assert_close(shifted.recency, plain.recency, atol=1e-4, rtol=0)
    torch.manual_seed(0)
    unordered.add(torch.randn(1, 500, 20, 8))
    assert abs(float(unordered.recency)) < 0.01
    assert float(recency_index(torch.ones(1, 8), torch.ones(1))) == 0


def test_short_texts_have_no_token_part() -> None:
    analysis = sw.analyze(ROWS["llama"](), Letters(), ["nine long"], parts=["layers", "tokens"])
    assert analysis.get(analysis.main_stack, "recency") is None
    assert tensor(analysis, "similarity").shape == (5, 5)


# attention


def plain_attention(weights: Tensor, half: int) -> tuple[dict[int, float], float, float]:
    """(mass by offset, near, far) of one text's weights (length, length), by a loop."""
    length = len(weights)
    mass: dict[int, float] = {}
    near, far = [], []
    for q in range(length):
        for k in range(length):
            mass[k - q] = mass.get(k - q, 0.0) + float(weights[q, k])
        if q > half:
            near.append(float(weights[q, q - 4 : q].mean()))
            far.append(float(weights[q, 1 : q - half + 1].mean()))
    return mass, sum(near), sum(far)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_attention_is_the_plain_one(name: str) -> None:
    model = ROWS[name]()
    analysis = sw.analyze(model, Letters(), TEXTS, parts=["attention"])
    mass, offsets = tensor(analysis, "attention_mass"), tensor(analysis, "attention_offsets").tolist()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [model(input_ids=ids_of(text), output_attentions=True).attentions for text in TEXTS]
    queries = sum(map(len, TEXTS))
    for block in range(4):
        per_text = [plain_attention(w[block][0].mean(0), -(-w[block].shape[-1] // 2)) for w in weights]
        for column, (one, other) in enumerate(offsets):
            low, high = sorted((one, other))
            total = sum(m for found, _, _ in per_text for offset, m in found.items() if low <= offset <= high)
            assert float(mass[block, column]) == pytest.approx(total / queries, abs=1e-6)
        near, far = (sum(each[i] for each in per_text) for i in (1, 2))
        assert float(tensor(analysis, "attention_recency")[block]) == pytest.approx(
            (near - far) / (near + far), abs=1e-5
        )
        sink = sum(float(w[block][0].mean(0)[:, 0].sum()) for w in weights) / queries
        assert float(tensor(analysis, "attention_sink")[block]) == pytest.approx(sink, abs=1e-6)


def test_bidirectional_attention_sees_the_future_and_causal_does_not() -> None:
    for name, sees in (("llada", True), ("dream", True), ("llama", False)):
        analysis = sw.analyze(ROWS[name](), Letters(), TEXTS, parts=["attention"], noise_levels=2)
        mass = tensor(analysis, "attention_mass")
        torch.testing.assert_close(mass.sum(1), torch.ones(4, dtype=torch.float64))
        future = mass[:, tensor(analysis, "attention_offsets")[:, 0] > 0]
        assert bool((future.sum(1) > 0.1).all() if sees else (future == 0).all()), name


@pytest.mark.parametrize("causal", [True, False])
def test_attention_recency_of_known_weights(causal: bool) -> None:
    """Uniform attention has no preference, with or without a future; all on the last tokens is 1, all far is -1."""
    length = 20
    offsets = torch.arange(length)[:, None] - torch.arange(length)  # query - key
    allowed = (offsets >= 0) if causal else torch.ones_like(offsets, dtype=torch.bool)
    far = (offsets >= 10) & (torch.arange(length) > 0)
    near = (offsets >= 1) & (offsets <= 4)
    for preferred, expected in ((allowed, 0.0), (near, 1.0), (far, -1.0)):
        scores = torch.where(allowed & preferred, 0.0, -40.0).masked_fill(~allowed, -torch.inf)
        statistics = AttentionStatistics(1, length)
        statistics.add(0, scores.softmax(-1).expand(2, 3, -1, -1))
        assert float(statistics.recency) == pytest.approx(expected, abs=1e-6)


def test_no_weights_no_tensors() -> None:
    analysis = sw.analyze(ROWS["mdlm"](), Letters(), TEXTS, parts=["attention"], noise_levels=1)
    assert [key.rpartition("/")[2] for key in analysis.tensors] == ["block_flops"]


def test_the_implementation_is_put_back_after_an_error() -> None:
    model = ROWS["llama"]()
    with pytest.raises(IndexError):
        sw.analyze(model, lambda text: {"input_ids": [VOCABULARY + 9] * 12}, TEXTS, parts=["attention"])
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


# lens


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "gemma3", "bert", "modernbert", "llada", "dream", "mdlm"]
)
def test_the_lens_is_the_model_with_later_blocks_skipped(name: str) -> None:
    model = ROWS[name]()
    contract = find_contract(model)
    stack = contract.stacks[contract.main_stack]
    torch.manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (3, 9))
    states = torch.stack(states_of(model, ids))
    reader = StateReader(model, stack)
    with torch.no_grad(), tail_of(model, contract, stack.name, reader.stream) as tail:
        said = predictions(tail, ids, states)
    assert said is not None
    for depth in range(stack.length + 1):
        plan = Plan.static(contract.shape, {stack.name: range(depth, stack.length)})
        with torch.no_grad(), sw.skip(model, plan):
            assert torch.equal(said[depth], model(input_ids=ids).logits.argmax(-1)), depth
    assert not any(module._forward_hooks for module in model.modules())


def test_lens_agreement_is_the_plain_one() -> None:
    model = ROWS["llama"]()
    analysis = sw.analyze(model, Letters(), TEXTS, parts=["lens"])
    agreement = tensor(analysis, "lens_agreement")
    assert float(agreement[-1]) == 1.0
    contract = find_contract(model)
    agreed, positions = torch.zeros(5), 0
    with torch.no_grad():
        for text in TEXTS:
            final = model(input_ids=ids_of(text)).logits.argmax(-1)
            positions += len(text)
            for depth in range(5):
                with sw.skip(model, Plan.static(contract.shape, {contract.main_stack: range(depth, 4)})):
                    agreed[depth] += (model(input_ids=ids_of(text)).logits.argmax(-1) == final).sum()
    torch.testing.assert_close(agreement.float(), agreed / positions)
    assert 0 < float(agreement[3]) < 1


def test_lens_of_a_diffusion_model_is_of_the_masked_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    from skipwise.analysis.lens import LensStatistics

    seen: list[Any] = []
    add = LensStatistics.add

    def spy(self: LensStatistics, tail: Any, input_ids: Tensor, states: Tensor, keep: Tensor) -> None:
        seen.append((input_ids.clone(), keep.clone()))
        add(self, tail, input_ids, states, keep)

    monkeypatch.setattr(LensStatistics, "add", spy)
    analysis = sw.analyze(ROWS["llada"](), Letters(), [("a prompt and ", "twelve tokens")], parts=["lens"], step_bins=4)
    assert [int(keep.sum()) for _, keep in seen] == list(range(13, 0, -1))
    assert all(torch.equal(ids == 3, keep) for ids, keep in seen)
    steps = tensor(analysis, "step_lens_agreement")
    assert steps.shape == (4, 5)
    assert steps[:, -1].tolist() == [1.0] * 4


def test_no_logits_no_lens() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**DECODER)).eval()
    analysis = sw.analyze(model, Letters(), TEXTS, parts=["layers", "lens"])
    assert analysis.get(analysis.main_stack, "lens_agreement") is None
    assert tensor(analysis, "similarity").shape == (5, 5)
