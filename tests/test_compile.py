"""`generate(..., compile=True)`: the same tokens, one graph a phase, nothing compiled from step to step."""

from typing import Any

import pytest
import torch
from torch import nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.models import linear
from skipwise.plan import Phase, Plan
from tests.tiny_models import ROWS

PROMPTS = torch.tensor([[0, 0, 9, 10, 11], [4, 5, 6, 7, 8], [12, 3, 13, 14, 15]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def phased(model: nn.Module) -> Plan:
    (stack,) = find_contract(model).stacks
    few, one = Phase(until=0.5, skip={stack: (0, 1, 2)}), Phase(until=1.0, skip={stack: (0, 2, 3)})
    return Plan(model=find_contract(model).shape, phases=(few, one))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llada", {"block_length": 3, "cfg_scale": 0.5}), ("dream", {"alg": "entropy"}), ("mdlm", {"steps": 4})],
)
def test_compiled_steps(name: str, settings: dict[str, Any]) -> None:
    """Under a plan of phases, with padding and rows that end at different times."""
    model = ROWS[name]()
    plan = phased(model)
    run = {"attention_mask": PADDED, "gen_length": 6, "plan": plan, **settings}
    model.config.eos_token_id = int(sw.generate(model, PROMPTS, stop_at_eos=False, **run).sequences[1, 5])
    plain = sw.generate(model, PROMPTS, **run)
    before = {key: id(module) for key, module in model.named_modules()}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first = sw.generate(model, PROMPTS, compile=True, **run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2), "one a phase; alike phases may share"
    assert first.stats.warmup_seconds > 0 < first.stats.seconds
    with torch.compiler.set_stance("fail_on_recompile"):
        again = sw.generate(model, PROMPTS, compile=True, **run)
    assert again.stats.warmup_seconds == plain.stats.warmup_seconds == 0
    assert torch.equal(first.sequences, plain.sequences)
    assert torch.equal(again.sequences, plain.sequences)
    rows, forwards = again.stats.by_model[None].rows, again.stats.forwards
    assert rows == forwards * 3 * (2 if "cfg_scale" in settings else 1), "all rows are run in every forward"
    assert {key: id(module) for key, module in model.named_modules()} == before
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["llada", "dream", "mdlm"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_compiled_steps_without_padding(name: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """everywhere: oneDNN makes all products, however small."""
    if everywhere:
        monkeypatch.setattr(linear, "PREFERRED", True)
        monkeypatch.setattr(linear, "WORTH", 0)
    model = ROWS[name]()
    given = {"gen_length": 4, "stop_at_eos": False, "seed": 1}
    torch._dynamo.reset()
    compiled = sw.generate(model, PROMPTS[1:2], compile=True, **given)
    assert torch.equal(compiled.sequences, sw.generate(model, PROMPTS[1:2], **given).sequences)


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["llada"]()
    with pytest.raises(sw.UserError, match="compat='llada' repeats the official arithmetic; leave out compile=True"):
        sw.generate(model, PROMPTS, compat="llada", compile=True)
    with pytest.raises(sw.UserError, match="is not a masked diffusion model; leave out compile"):
        sw.generate(ROWS["llama"](), PROMPTS, compile=True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(sw.UserError, match=r"torch\.compile failed .*install a C\+\+ compiler such as g\+\+"):
        sw.generate(model, PROMPTS, gen_length=2, compile=True)
    torch._dynamo.reset()
    assert sw.generate(model, PROMPTS, gen_length=2).stats.forwards == 2, "the model still runs"
