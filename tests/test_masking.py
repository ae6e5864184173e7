"""Subject-token masking: what is hidden is nothing else than the subject, on every kind of attention."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from torch.nn import functional as F

from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError
from skipwise.masking import Hidden, Masking, _attend, subject_masked
from tests.tiny_models import IMAGE, ROWS, VIDEO, example, output

SUBJECT = [1, 2]
CROSS = ["sana", "pixart", "wan", "ltx"]
JOINT = ["flux", "sd3", "qwen_image", "cogview4", "cogvideox"]
JOINED = ["flux2", "chroma", "aura_flow"]  # a joint stack, then one that takes a concatenation
TEXT, PIXELS = 5, 16  # tokens of the example: text, and image where a patch has 2 x 2 latent pixels


@cache
def model_of(name: str) -> nn.Module:
    return (IMAGE | VIDEO)[name]()


def all_blocks(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(range(stack.length)) for name, stack in find_contract(model).stacks.items()}


def with_text(kwargs: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """The same call with other states in these text tokens."""
    text = kwargs["encoder_hidden_states"].clone()
    text[:, tokens] = torch.randn(text[:, tokens].shape, generator=torch.Generator().manual_seed(1))
    return kwargs | {"encoder_hidden_states": text}


def change(model: nn.Module, kwargs: dict[str, Any], tokens: list[int] = SUBJECT) -> float:
    """How far the output moves when the text of these tokens changes."""
    return float((output(model, with_text(kwargs, tokens)) - output(model, kwargs)).norm())


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_masked_everywhere_leaves_nothing_of_the_subject(name: str) -> None:
    model = model_of(name)
    kwargs = example(model)
    with subject_masked(model, all_blocks(model), SUBJECT):
        assert torch.equal(output(model, kwargs), output(model, with_text(kwargs, SUBJECT)))
        assert change(model, kwargs, [0, 3]) > 1e-3, "other words are still seen"
    assert change(model, kwargs) > 1e-3


@pytest.mark.parametrize("name", JOINT + JOINED)
def test_joint_attention(name: str) -> None:
    """Masking all queries leaves nothing; masking the image's leaves what other words carry of the subject."""
    model = model_of(name)
    kwargs, plain = example(model), change(model, example(model))
    with subject_masked(model, all_blocks(model), SUBJECT, queries="all"):
        assert torch.equal(output(model, kwargs), output(model, with_text(kwargs, SUBJECT)))
        assert change(model, kwargs, [0, 3]) > 1e-3, "other words are still seen"
    with subject_masked(model, all_blocks(model), SUBJECT):
        leak = change(model, kwargs)
    assert 0 < leak < 0.4 * plain


@pytest.mark.parametrize("name", CROSS + JOINT + JOINED)
def test_a_column_for_each_token(name: str) -> None:
    model = model_of(name)
    with subject_masked(model, all_blocks(model), SUBJECT) as masking:
        output(model, example(model))
    assert set(masking.hidden) == {f"{stack}.{n}" for stack, numbers in all_blocks(model).items() for n in numbers}
    for calls in masking.hidden.values():
        (found,) = [call for call in calls if call is not None]
        assert found.columns.sum(1).tolist() == [2, 2]


def test_bfloat16_finds_the_same_columns() -> None:
    model = IMAGE["flux"]().to(torch.bfloat16)
    with subject_masked(model, all_blocks(model), SUBJECT) as masking:
        output(model, example(model))
    for calls in masking.hidden.values():
        assert calls[0] is not None
        assert calls[0].columns.nonzero()[:, 1].tolist() == SUBJECT * 2


def _text_first(queries: int, keys: int) -> Tensor | None:
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    hidden[TEXT:, SUBJECT] = True
    return hidden


def _image_first(queries: int, keys: int) -> Tensor | None:
    if keys == PIXELS:  # the second attention of a dual block, of the image alone
        return None
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    hidden[:PIXELS, [PIXELS + token for token in SUBJECT]] = True
    return hidden


@pytest.mark.parametrize(("name", "layout"), [("flux", _text_first), ("sd3", _image_first)])
def test_the_same_as_a_mask_made_by_hand(
    name: str, layout: Callable[[int, int], Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention written out, with the layout of the model in the place of probing."""

    def written_out(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        hidden = layout(query.shape[-2], key.shape[-2])
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ value

    model, kwargs = model_of(name), example(model_of(name))
    plain = output(model, kwargs)
    with subject_masked(model, all_blocks(model), SUBJECT) as masking:
        found = output(model, kwargs)
    for calls in masking.hidden.values():
        for call in calls:
            if call is not None:
                expected = layout(*call.pairs.shape[-2:])
                assert expected is not None
                assert torch.equal(call.pairs, expected.expand_as(call.pairs))
    monkeypatch.setattr(F, "scaled_dot_product_attention", written_out)
    torch.testing.assert_close(found, output(model, kwargs), atol=1e-5, rtol=1e-4)
    assert float((found - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sana", "pixart"])
def test_masking_adds_to_the_models_own_mask(name: str) -> None:
    """In cross attention, to mask the subject everywhere is to pad the subject."""
    model, kwargs = model_of(name), example(model_of(name))
    own, padded = torch.ones(2, TEXT), torch.ones(2, TEXT)
    own[:, 4] = padded[:, [1, 2, 4]] = 0
    with subject_masked(model, all_blocks(model), SUBJECT):
        found = output(model, kwargs | {"encoder_attention_mask": own})
    torch.testing.assert_close(found, output(model, kwargs | {"encoder_attention_mask": padded}))


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_masks_combine(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 4, 8, generator=generator).unbind()
    own = torch.ones(4, 4, dtype=torch.bool).tril()
    columns = torch.tensor([[False, True, False, False], [False, False, False, True]])
    rows = torch.tensor([[True, True, False, True], [False, True, True, True]])
    call: dict[str, Any] = {"query": query, "key": key, "value": value}
    bias = torch.zeros(4, 4).masked_fill(~own, -torch.inf)
    call |= {"causal": {"is_causal": True}, "bool": {"attn_mask": own}, "float": {"attn_mask": bias}}[kind]
    scores = query @ key.mT / math.sqrt(8)
    for b in range(2):
        for q in range(4):
            for k in range(4):
                if not own[q, k] or (rows[b, q] and columns[b, k]):
                    scores[b, :, q, k] = -torch.inf
    torch.testing.assert_close(_attend(call, Hidden(rows, columns)), scores.softmax(-1) @ value)


@pytest.mark.parametrize("name", ["flux", "sana"])
@pytest.mark.parametrize("tokens", [[[1], [2, 3]], [[], [0]]])
def test_every_row_has_its_own_tokens(name: str, tokens: list[list[int]]) -> None:
    model, kwargs = model_of(name), example(model_of(name))
    with subject_masked(model, all_blocks(model), tokens):
        together = output(model, kwargs)
    for row, alone in enumerate(tokens):
        with subject_masked(model, all_blocks(model), alone):
            torch.testing.assert_close(together[row], output(model, kwargs)[row], atol=1e-5, rtol=1e-4)
    assert float((together - output(model, kwargs))[1].abs().max()) > 1e-4


def test_only_the_named_blocks_are_masked() -> None:
    model, kwargs = model_of("pixart"), example(model_of("pixart"))
    with subject_masked(model, {"transformer_blocks": [2]}, SUBJECT) as masking:
        one = output(model, kwargs)
        assert change(model, kwargs) > 1e-3
    assert list(masking.hidden) == ["transformer_blocks.2"]
    assert not torch.equal(one, output(model, kwargs))


def test_no_tokens_change_nothing() -> None:
    model, kwargs = model_of("flux"), example(model_of("flux"))
    for tokens in ([], [[], []]):
        with subject_masked(model, all_blocks(model), tokens):
            found = output(model, kwargs)
        assert torch.equal(found, output(model, kwargs))


def test_a_subject_that_is_the_whole_text_is_masked_too() -> None:
    model, kwargs = model_of("sana"), example(model_of("sana"))
    with subject_masked(model, all_blocks(model), list(range(TEXT))):
        assert output(model, kwargs).isfinite().all()
        assert torch.equal(output(model, kwargs), output(model, with_text(kwargs, list(range(TEXT)))))


def test_gradients_see_the_mask() -> None:
    model, kwargs = model_of("sana"), dict(example(model_of("sana")))
    text = kwargs["encoder_hidden_states"].clone().requires_grad_()
    with subject_masked(model, all_blocks(model), SUBJECT):
        model(**kwargs | {"encoder_hidden_states": text})[0].square().sum().backward()
    assert text.grad is not None
    assert torch.equal(text.grad.abs().amax((0, 2)) > 0, torch.tensor([True, False, False, True, True]))


def _bare(model: nn.Module) -> bool:
    """Whether no block has a forward or a hook of ours."""
    blocks = [block for stack in find_contract(model).stacks for block in module_list(model, stack)]
    return not any("forward" in b.__dict__ or b._forward_hooks or b._forward_pre_hooks for b in blocks)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_the_model_is_put_back(name: str) -> None:
    model, kwargs = model_of(name), example(model_of(name))
    before = output(model, kwargs)
    first = module_list(model, "transformer_blocks")[0]
    with subject_masked(model, all_blocks(model), SUBJECT):
        assert not torch.equal(output(model, kwargs), before)
    assert _bare(model)
    assert torch.equal(output(model, kwargs), before)
    with pytest.raises(UserError, match="Token 9 is not in the text"), subject_masked(model, all_blocks(model), [9]):
        output(model, kwargs)
    assert _bare(model)
    assert torch.equal(output(model, kwargs), before)
    own = first.forward
    first.forward = own  # what accelerate does
    with subject_masked(model, all_blocks(model), SUBJECT):
        assert first.__dict__["forward"] is not own
    assert first.__dict__.pop("forward") == own


def test_tokens_are_counted_in_the_text_that_the_model_is_given() -> None:
    """AuraFlow puts eight registers before the text."""
    model = model_of("aura_flow")
    with subject_masked(model, {"joint_transformer_blocks": [1], "single_transformer_blocks": [3]}, [4]) as masking:
        output(model, example(model))
    for calls in masking.hidden.values():
        assert calls[0] is not None
        assert calls[0].columns.nonzero().tolist() == [[0, 8 + 4], [1, 8 + 4]]
        assert calls[0].rows[0].nonzero()[:, 0].tolist() == list(range(8 + TEXT, 8 + TEXT + PIXELS))


def test_nested_masks_add_up() -> None:
    model, kwargs = model_of("pixart"), example(model_of("pixart"))
    with subject_masked(model, all_blocks(model), [1]), subject_masked(model, all_blocks(model), [2]):
        nested = output(model, kwargs)
    with subject_masked(model, all_blocks(model), [1, 2]):
        torch.testing.assert_close(nested, output(model, kwargs))


@pytest.mark.parametrize(
    ("name", "blocks", "settings", "message"),
    [
        ("flux", {"transformer_block": [0]}, {}, "Unknown stack 'transformer_block'. Did you mean 'transformer_bl"),
        ("flux", {"transformer_blocks": [3]}, {}, "Block 3 is not in transformer_blocks, which has blocks 0 to 2"),
        ("flux", {"transformer_blocks": [0]}, {"tokens": [1, 5]}, "Token 5 is not in the text, .* tokens 0 to 4"),
        ("flux", {"transformer_blocks": [0]}, {"tokens": [[1]] * 3}, "tokens for 3 rows, but the batch has 2"),
        ("flux", {"transformer_blocks": [0]}, {"queries": "text"}, "Unknown queries 'text'"),
        ("dit", {"transformer_blocks": [0]}, {}, r"transformer_blocks.0 \(BasicTransformerBlock\) takes no `encoder"),
        ("lumina2", {"layers": [1]}, {}, "layers.1 .* no stack before it shows where the text is"),
    ],
)
def test_mistakes(name: str, blocks: dict[str, list[int]], settings: dict[str, Any], message: str) -> None:
    model = model_of(name)
    with (
        pytest.raises(UserError, match=message),
        subject_masked(model, blocks, **{"tokens": SUBJECT} | settings),
    ):
        output(model, example(model))
    assert _bare(model)


def test_other_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not go through torch's attention would not be masked."""

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    model, kwargs = model_of("flux"), example(model_of("flux"))
    find_contract(model)
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", flash)
    output(model, kwargs)
    with (
        pytest.raises(UserError, match=r"transformer_blocks.0 .* was caught; .*set_attention_backend\('native'\)"),
        subject_masked(model, all_blocks(model), SUBJECT),
    ):
        output(model, kwargs)


def test_a_kernel_without_masks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it where a backend is forced that takes no mask."""

    def kernel(**_: Any) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    states, seen = torch.zeros(1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    call = {"query": states, "key": states, "value": states}
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with pytest.raises(UserError, match=r"takes no mask; .*set_attention_backend\('native'\)"):
        _attend(call, Hidden(seen, seen))
    with pytest.raises(RuntimeError, match="No available kernel"):
        _attend(call, None)


class Toy(nn.Module):
    """Two blocks of one kind; width 4, one head."""

    def __init__(self, block: type[nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])
        self.example = {"hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 4)}

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states


class Mixing(nn.Module):
    """Keys that depend on the whole text."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = self.key(encoder_hidden_states + encoder_hidden_states.mean(1, keepdim=True))[:, None]
        return hidden_states + F.scaled_dot_product_attention(hidden_states[:, None], text, text)[:, 0]


class CrossThenSelf(nn.Module):
    """What the first attention brings from the text, the second finds in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for context in (encoder_hidden_states, None):
            query = hidden_states[:, None]
            keys = query if context is None else self.key(context)[:, None]
            hidden_states = hidden_states + F.scaled_dot_product_attention(query, keys, keys)[:, 0]
        return hidden_states


def test_attention_that_mixes_tokens_is_refused() -> None:
    """No column is the subject's."""
    model = Toy(Mixing)
    with (
        pytest.raises(UserError, match=r"\[3\] keys depend on \[1\] tokens of the text"),
        subject_masked(model, {"blocks": [0]}, [1], example=model.example),
    ):
        model(**model.example)


def test_what_an_earlier_attention_brought_is_not_the_text() -> None:
    model = Toy(CrossThenSelf)
    with subject_masked(model, {"blocks": [0, 1]}, [1], example=model.example) as masking:
        assert torch.equal(model(**model.example), model(**with_text(model.example, [1])))
    for first, second in masking.hidden.values():
        assert first is not None
        assert (first.columns[0].tolist(), second) == ([False, True, False], None)


def test_masking_is_what_is_yielded() -> None:
    model = ROWS["sana"]()
    with subject_masked(model, all_blocks(model), SUBJECT) as masking:
        assert isinstance(masking, Masking)
        output(model, example(model))
        assert [call is None for call in masking.hidden["transformer_blocks.0"]] == [False], "attn1 is linear"
