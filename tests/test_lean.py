"""The short forward of decoding beside transformers' own, and everything that must make it step aside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import skipwise as sw
from skipwise.analysis.states import StateReader
from skipwise.blocks import find_contract
from skipwise.cost import Meter
from skipwise.models import lean
from skipwise.models.workspace import Workspace
from skipwise.plan import Plan
from skipwise.sampling.cache import Stored
from skipwise.skipping import skip
from tests.tiny_models import ROWS

IDS = torch.tensor([[0, 0, 9, 3, 11, 7, 8], [4, 3, 6, 7, 3, 5, 12]])
PRESENT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
WHERE = (torch.tensor([0, 0, 1]), torch.tensor([3, 6, 2]))
ALONE = (torch.tensor([0, 0]), torch.tensor([6, 2]))
NAMES = ("llada", "dream")
INPUTS = [(IDS, None, WHERE), (IDS, PRESENT, WHERE), (IDS[1:], None, ALONE), (IDS[1:], PRESENT[1:], ALONE)]


def stock(model: Any, ids: Tensor, mask: Tensor | None, **others: Any) -> Tensor:
    """transformers' decoder, to its last states."""
    return model.model(ids, attention_mask=mask, **others).last_hidden_state


def key_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()[:, None, None, :]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return ROWS[request.param]()


@pytest.mark.parametrize(("ids", "mask", "where"), INPUTS)
@torch.no_grad()
def test_states_are_those_of_the_decoder(model: Any, ids: Tensor, mask: Tensor | None, where: lean.Places) -> None:
    keys = key_mask(mask)
    assert lean.is_lean(model.model, keys)
    expected = stock(model, ids, mask)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()  # not of padding
    torch.testing.assert_close(lean.run(model.model, ids, keys)[seen], expected[seen], rtol=1e-5, atol=1e-5)
    found = lean.run(model.model, ids, keys, where=where)
    torch.testing.assert_close(found, expected[where], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_rounds_as_transformers_does(model: Any, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    assert torch.equal(lean.run(model.model, IDS), stock(model, IDS, None))


@pytest.mark.parametrize("where", [None, WHERE])
@torch.no_grad()
def test_stored_keys_are_seen_and_replaced(model: Any, where: lean.Places | None) -> None:
    """A window against what is stored of the other positions, with tokens changed in between."""
    found, changed = [], IDS.clone()
    changed[:, 4] += 1
    for run in (lean.run, stock):
        past = Stored(IDS.shape[1])
        run(model.model if run is lean.run else model, IDS, None, **_past(run, past))
        past.window = slice(2, 5)
        found.append(run(model.model if run is lean.run else model, changed[:, 2:5], None, **_past(run, past)))
        past.window = slice(0, 7)
        found.append(past._layers[-1][0])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(None), slice(1)])
@torch.no_grad()
def test_each_row_may_run_its_own_positions(model: Any, rows: slice) -> None:
    """Of unequally many, against what is stored of the others, as transformers' decoder runs them."""
    ids, found = IDS[rows], []
    wanted = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1, 0]]).bool()[rows]
    places = (torch.arange(len(ids)), torch.ones(len(ids), dtype=torch.long))
    for run in (lean.run, stock):
        past = Stored(ids.shape[1])
        run(model.model if run is lean.run else model, ids, None, **_past(run, past))
        past.choose(wanted, 3)
        given = {"numbers" if run is lean.run else "position_ids": past.position_ids}
        inputs = past.part(ids + 1)
        found.append(run(model.model if run is lean.run else model, inputs, None, **given, **_past(run, past)))
        found.append(past._layers[-1][0])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-5)
    assert past.position_ids.tolist() == [[2, 4, 5], [0, 5, 0]][rows]
    narrow = lean.run(model.model, inputs, None, past, places, past.position_ids)
    torch.testing.assert_close(narrow, found[0][places], rtol=1e-5, atol=1e-5)


def _past(run: Any, past: Stored) -> dict[str, Any]:
    return {"past" if run is lean.run else "past_key_values": past}


def hook(model: Any, seen: list[Any]) -> None:
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(out))


def pre_hook(model: Any, seen: list[Any]) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args))


def replaced(model: Any, seen: list[Any]) -> None:
    part = model.model.layers[0].self_attn.q_proj
    inner = part.forward
    part.forward = lambda x: seen.append(x) or inner(x)


def adapter(model: Any, seen: list[Any]) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], init_lora_weights=False), model)
    model.eval()
    model.model.layers[2].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *call: seen.append(call))


def another_norm(model: Any, seen: list[Any]) -> None:
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    model.model.norm = Norm(model.config.hidden_size)


@pytest.mark.parametrize("change", [hook, pre_hook, replaced, adapter, another_norm])
def test_what_is_not_plain_is_called(model: Any, change: Callable[[Any, list[Any]], None]) -> None:
    seen: list[Any] = []
    change(model, seen)
    with torch.no_grad():
        expected = stock(model, IDS, None)[WHERE]
        seen.clear()
        found = model.states(IDS, None, WHERE)
        if model.shift:
            expected = stock(model, IDS, None)[WHERE[0], WHERE[1] - 1]
    assert seen
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ids", "mask", "where"), [(IDS, None, WHERE), (IDS, PRESENT, None), (IDS[1:], None, ALONE)])
@torch.no_grad()
def test_who_only_looks_on_sees_every_layer(
    model: Any, ids: Tensor, mask: Tensor | None, where: lean.Places | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that an analysis reads: those of transformers' layers, of which none is called for it."""
    contract = find_contract(model)
    reader = StateReader(model, contract.stacks[contract.main_stack])
    with reader.reading():
        expected = stock(model, ids, key_mask(mask))
        streams = reader.take()
        monkeypatch.setattr(type(model.model.layers[0]), "forward", None)
        space = Workspace()
        found = lean.run(model.model, ids, key_mask(mask), where=where, space=space)
        assert not space.narrowed, "the last layer's states are wanted everywhere"
        seen = reader.take()
    at = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert len(seen) == len(streams) == 5
    for one, other in zip(seen, streams, strict=True):
        assert not one.is_inference()
        torch.testing.assert_close(one[at], other[at], rtol=1e-5, atol=1e-5)
    shown = (found, expected[where]) if where else (found[at], expected[at])
    torch.testing.assert_close(*shown, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_a_decoder_that_looks_back(name: str) -> None:
    """Autoregressive models, as an analysis runs them."""
    model = ROWS[name]()
    assert lean.is_lean(model.model, None)
    torch.testing.assert_close(lean.run(model.model, IDS), stock(model, IDS, None), rtol=1e-5, atol=1e-5)
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    assert not lean.is_lean(model.model, None)


def test_training_and_other_attention_are_left_to_transformers(model: Any) -> None:
    assert not lean.is_lean(model.model, None), "gradients are on"
    with torch.no_grad():
        assert lean.is_lean(model.model, None)
        assert not lean.is_lean(model.model, torch.ones(2, 1, 7, 7).bool()), "a mask of every query's own"
        with torch.autocast("cpu"):
            assert not lean.is_lean(model.model, None)
        model.train()
        assert not lean.is_lean(model.model, None)
        model.eval().set_attn_implementation("eager")
        assert not lean.is_lean(model.model, None)
    states = model.states(IDS)
    states.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("name", [*NAMES, "mdlm"])
def test_states_can_be_learned_from(name: str) -> None:
    """What decoding made is of use as an input or a target of training."""
    model = ROWS[name]()
    with torch.no_grad():
        states = model.states(IDS, None, WHERE)
    assert not states.is_inference()
    probe = nn.Linear(states.shape[-1], 2)
    probe(states).square().sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("name", [*NAMES, "mdlm"])
@pytest.mark.parametrize("skipped", [(3,), (0, 1, 2, 3)])
@torch.no_grad()
def test_under_a_plan(name: str, skipped: tuple[int, ...]) -> None:
    """The last block that is left is the narrow one; where none is left, nothing is."""
    model = ROWS[name]()
    (stack,) = find_contract(model).stacks
    with skip(model, Plan.static(find_contract(model).shape, {stack: skipped})):
        rows, positions = WHERE
        whole, space = model.states(IDS)[rows, positions], Workspace()
        torch.testing.assert_close(model.states(IDS, None, WHERE, space=space), whole, rtol=1e-5, atol=1e-5)
        assert space.narrowed == (len(skipped) < 4)


@pytest.mark.parametrize("name", [*NAMES, "mdlm"])
@pytest.mark.parametrize("ids", [IDS, IDS[1:]])
@torch.no_grad()
def test_flops_that_are_spared(name: str, ids: Tensor) -> None:
    """Positions that are not wanted: of the last block, and for one row alone also of its queries."""
    model, counts = ROWS[name](), []
    where = ALONE if len(ids) == 1 else WHERE
    for wanted in (where, None):
        with Meter() as meter:
            model.states(ids, None, wanted)
        counts.append(sum(price.flops for price in meter.prices.values()))
    assert counts[1] - counts[0] == (ids.numel() - len(where[0])) * model.spared(len(ids), ids.shape[1]) > 0


@torch.no_grad()
def test_generate_with_and_without(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are the same, one by one."""
    given = {"attention_mask": PRESENT, "gen_length": 12, "block_length": 4, "family": "llada", "stop_at_eos": False}
    short = sw.generate(model, IDS, **given)
    monkeypatch.setattr("skipwise.models.bidirectional.is_lean", lambda *_: False)
    plain = sw.generate(model, IDS, **given)
    assert torch.equal(short.sequences, plain.sequences)
    assert short.stats.all_in_flops == plain.stats.all_in_flops
    assert short.stats.spared_flops > 0 == plain.stats.spared_flops
