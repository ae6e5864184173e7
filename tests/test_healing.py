"""Stand-ins and adapters: laws, closed forms beside plain ones, and what they are for: less is lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.analysis.states import StateReader
from skipwise.blocks import find_contract, module_list
from skipwise.calibration import Calibration, Sample
from skipwise.cost import price_blocks
from skipwise.healing import HealSettings, fit_stand_ins, heal
from skipwise.plan import Phase, Plan
from skipwise.stand_ins import Moments, key, normed
from tests.deleted import deleted
from tests.tiny_models import ROWS

NAMES = ["llama", "gemma3", "gpt2", "qwen3", "llada", "dream", "mdlm"]


def calibration_of(model: nn.Module, **others: Any) -> Calibration:
    torch.manual_seed(1)
    return Calibration(model, [Sample(tuple(torch.randint(4, 40, (12,)).tolist()), 3) for _ in range(6)], **others)


def plan_of(model: nn.Module, numbers: list[int]) -> Plan:
    contract = find_contract(model)
    return Plan.static(contract.shape, {contract.main_stack: numbers})


def enter(model: nn.Module, plan: Plan) -> None:
    with sw.skip(model, plan):
        pass


def random_stand_ins(plan: Plan, kind: Any, width: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for number, phase in enumerate(plan.phases):
        for stack, blocks in phase.skip.items():
            for block in blocks:
                tensors[key(number, stack, block, "bias")] = torch.randn(width) * 0.1
                if kind == "linear":
                    tensors[key(number, stack, block, "weight")] = torch.randn(width, width) * 0.1
    return tensors


class Replaced(nn.Module):
    """A plain stand-in in a block's own place, to hold `skip`'s beside."""

    def __init__(self, weight: Tensor | None, bias: Tensor, block: nn.Module):
        super().__init__()
        self.weight, self.bias, self.returns_tuple = weight, bias, None
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = x + self.bias
        if self.weight is not None:
            out = x + normed(x) @ self.weight.T + self.bias
        return out


@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("numbers", [[1], [0], [0, 1], [1, 2], "last", "all", []])
@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_takes_the_blocks_place(name: str, numbers: Any, kind: Any) -> None:
    """`skip` with stand-ins == the model in whose list each skipped block is replaced by what it leaves behind."""
    model = ROWS[name]()
    contract = find_contract(model)
    stack, length = contract.main_stack, contract.stacks[contract.main_stack].length
    numbers = {"last": [length - 2, length - 1], "all": list(range(length))}.get(str(numbers), numbers)
    plan = plan_of(model, numbers)
    tensors = random_stand_ins(plan, kind, contract.hidden_size)
    plan = plan.with_stand_ins(kind, tensors) if numbers else plan
    twin = copy.deepcopy(model)
    blocks = module_list(twin, stack)
    for number in numbers:
        weight = tensors.get(key(0, stack, number, "weight"))
        blocks[number] = Replaced(weight, tensors[key(0, stack, number, "bias")], blocks[number])
    ids = torch.arange(4, 24).view(2, 10)
    cacheless = {} if name == "mdlm" else {"use_cache": False}
    before = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        with sw.skip(model, plan):
            found = model(ids, **cacheless).logits
        expected = twin(ids, **cacheless).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, expected) or kind == "linear", "constants are exact; matrix products may round otherwise"
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3"])
@pytest.mark.parametrize("numbers", [[0], [1, 2]])
def test_stand_ins_work_with_a_cache(name: str, numbers: list[int]) -> None:
    model = ROWS[name]()
    plan = plan_of(model, numbers)
    plan = plan.with_stand_ins("linear", random_stand_ins(plan, "linear", plan.model.hidden_size))
    prompt = torch.arange(4, 14).view(2, 5)
    with sw.skip(model, plan):
        cached = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        plain = model.generate(
            prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
        )
    assert torch.equal(cached, plain)


def test_each_phase_has_its_own_stand_ins_and_nested_plans_keep_theirs() -> None:
    model = ROWS["llada"]()
    contract = find_contract(model)
    stack = contract.main_stack
    phases = (Phase(until=0.5, skip={stack: (1,)}), Phase(until=1.0, skip={stack: (1,)}))
    plan = Plan(model=contract.shape, phases=phases)
    plan = plan.with_stand_ins("constant", random_stand_ins(plan, "constant", contract.hidden_size))
    assert not plan.is_static
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), sw.skip(model, plan) as skipping:
        early = model(ids).logits
        skipping.at(0.7)
        late = model(ids).logits
        with sw.skip(model, plan_of(model, [1, 2])):
            nested = model(ids).logits
        assert torch.equal(model(ids).logits, late)
    assert not torch.equal(early, late)
    tensors = plan.stand_in_tensors()
    with torch.no_grad():
        twin = deleted(model, stack, {2})
        blocks = module_list(twin, stack)
        blocks[1] = Replaced(None, tensors[key(1, stack, 1, "bias")], blocks[1])
        assert torch.equal(nested, twin(ids).logits)


def test_stand_ins_are_priced() -> None:
    model = ROWS["llada"]()
    plan = plan_of(model, [1, 2])
    width = plan.model.hidden_size
    linear = plan.with_stand_ins("linear", random_stand_ins(plan, "linear", width))
    constant = plan.with_stand_ins("constant", random_stand_ins(plan, "constant", width))
    size = sw_size(10)
    bare, dear, free = (sw.estimate(model, p, size) for p in (plan, linear, constant))
    assert dear.block_flops - bare.block_flops == 2 * (2 * 10 * width**2)
    assert free.block_flops == bare.block_flops
    assert dear.weight_bytes - bare.weight_bytes == 2 * 4 * (width**2 + width)
    prices = price_blocks(model, sw_size(9))
    stats = sw.generate(model, torch.arange(4, 9)[None], gen_length=4, plan=linear).stats
    assert stats.block_flops == 4 * (prices.of_blocks({"model.layers": (1, 2)}).flops + 2 * 2 * 9 * width**2)


def sw_size(tokens: int) -> Any:
    from skipwise.examples import Size

    return Size(tokens=tokens)


def test_stand_in_flops_equal_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = ROWS["llada"]()
    plan = plan_of(model, [1])
    linear = plan.with_stand_ins("linear", random_stand_ins(plan, "linear", plan.model.hidden_size))
    counts = []
    for p in (plan, linear):
        with torch.no_grad(), sw.skip(model, p), FlopCounterMode(display=False) as counter:
            model(torch.arange(4, 14)[None])
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 10 * plan.model.hidden_size**2


def test_moments_beside_a_plain_regression() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(500, 8, dtype=torch.float64) * 3, torch.randn(500, 8, dtype=torch.float64)
    y += normed(x) @ torch.randn(8, 8, dtype=torch.float64) + 2
    moments = Moments(8)
    for part in range(0, 500, 90):
        moments.add(x[part : part + 90], y[part : part + 90])
    weight, bias = moments.linear(0.0)
    design = torch.cat([normed(x), torch.ones(500, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, y).solution
    assert torch.allclose(weight.double(), solution[:8].T, atol=1e-4)
    assert torch.allclose(bias.double(), solution[8], atol=1e-4)
    assert torch.allclose(moments.constant().double(), y.mean(0), atol=1e-5)
    heavy, _ = moments.linear(1e6)
    assert heavy.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_fitting_beside_a_plain_loop(kind: Any) -> None:
    """The second block is fitted behind the first one's stand-in, towards the whole model's states."""
    model = ROWS["llama"]()
    calibration = calibration_of(model)
    plan = fit_stand_ins(plan_of(model, [1, 2]), calibration, kind, ridge=1e-3, epochs=1)
    tensors = plan.stand_in_tensors()
    whole, first = [], []
    with torch.no_grad():
        for batch in calibration.batches():
            with StateReader(model, find_contract(model).stacks["model.layers"]).reading() as reader:
                model(batch.inputs, use_cache=False)
                states = reader.take()[1:]
            whole.append(torch.stack(states).flatten(1, 2))
            first.append(states[0].flatten(0, 1))
    target, x = torch.cat(whole, dim=1), torch.cat(first)
    for block in (1, 2):
        moments = Moments(x.shape[-1])
        moments.add(x, target[block] - x)
        bias = moments.constant()
        if kind == "linear":
            weight, bias = moments.linear(1e-3)
            assert torch.allclose(tensors[key(0, "model.layers", block, "weight")], weight, atol=1e-4)
            x = x + normed(x) @ weight.T
        assert torch.allclose(tensors[key(0, "model.layers", block, "bias")], bias, atol=1e-4)
        x = x + bias


def test_a_plan_travels_with_its_stand_ins(tmp_path: Path) -> None:
    model = ROWS["llada"]()
    plan = fit_stand_ins(plan_of(model, [1]), calibration_of(model), epochs=1)
    loaded = Plan.load(plan.save(tmp_path / "a" / "plan.json"))
    again = Plan.load(loaded.save(tmp_path / "b" / "other.json"))
    ids = torch.arange(4, 12)[None]
    outputs = []
    for p in (plan, loaded, again):
        with torch.no_grad(), sw.skip(model, p):
            outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["other.json", "other.stand-ins.safetensors"]
    file = tmp_path / "b" / "other.stand-ins.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with (
        pytest.raises(sw.UserError, match="is not the file that the plan was made with"),
        sw.skip(model, Plan.load(tmp_path / "b" / "other.json")),
    ):
        pass
    file.unlink()
    with (
        pytest.raises(sw.UserError, match="cannot be read; copy it beside the plan"),
        sw.skip(model, Plan.load(tmp_path / "b" / "other.json")),
    ):
        pass


def test_a_plan_under_another_name_keeps_all_else(tmp_path: Path) -> None:
    fresh = fit_stand_ins(plan_of(ROWS["llada"](), [1]), calibration_of(ROWS["llada"]()), epochs=1)
    for number, plan in enumerate((fresh, Plan.load(fresh.save(tmp_path / "plan.json")))):
        other = plan.named("mine")
        assert (other.method, plan.method) == ("mine + linear stand-ins", "by hand + linear stand-ins")
        assert other.named(plan.made_by.method) == plan
        Plan.load(other.save(tmp_path / "named" / f"{number}.json"))
        content = [
            (tmp_path / name).read_bytes()
            for name in ("plan.stand-ins.safetensors", f"named/{number}.stand-ins.safetensors")
        ]
        assert content[0] == content[1]


def test_what_cannot_leave_anything_behind() -> None:
    model = ROWS["llada"]()
    with pytest.raises(sw.UserError, match="skips no block, so there is nothing to leave behind"):
        fit_stand_ins(plan_of(model, []), calibration_of(model))
    with pytest.raises(sw.UserError, match="Unknown kind of stand-in 'quadratic'"):
        fit_stand_ins(plan_of(model, [1]), calibration_of(model), "quadratic")  # type: ignore[arg-type]
    flux = ROWS["flux"]()
    plan = plan_of(flux, [1])
    plan = plan.with_stand_ins("constant", random_stand_ins(plan, "constant", plan.model.hidden_size))
    with pytest.raises(sw.UserError, match="cannot leave stand-ins behind"), sw.skip(flux, plan):
        pass


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    return sw.load("tiny-dllm")


@pytest.fixture(scope="module")
def zoo_calibration(trained: tuple[nn.Module, Any]) -> Calibration:
    from skipwise.evaluation import calibration_texts

    return Calibration.of(*trained, calibration_texts(trained[1], 256))


def loss(calibration: Calibration, plan: Plan) -> float:
    """Mean KL from the whole model to the model under the plan, on masks that no method has seen."""
    total, tokens = 0.0, 0
    for batch in calibration.batches(epoch=99):
        with torch.no_grad():
            wanted = calibration.model(batch.inputs).logits[batch.predicted].log_softmax(-1)
            with sw.skip(calibration.model, plan):
                found = calibration.model(batch.inputs).logits[batch.predicted].log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
        tokens += len(wanted)
    return total / tokens


def test_stand_ins_lose_less_than_the_identity(zoo_calibration: Calibration) -> None:
    plan = plan_of(zoo_calibration.model, [9, 11, 12, 13, 14, 15, 17, 18])
    bare = loss(zoo_calibration, plan)
    linear = loss(zoo_calibration, fit_stand_ins(plan, zoo_calibration, "linear", epochs=2))
    assert linear < 0.7 * bare


@pytest.mark.slow
def test_healing_loses_less_and_leaves_the_model_alone(zoo_calibration: Calibration, tmp_path: Path) -> None:
    model = zoo_calibration.model
    plan = plan_of(model, [9, 11, 12, 13, 14, 15, 17, 18])
    names = [name for name, _ in model.named_modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    healed = heal(plan, zoo_calibration, tmp_path / "healed.json", HealSettings(steps=30, learning_rate=3e-3))
    assert loss(zoo_calibration, healed) < 0.5 * loss(zoo_calibration, plan)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["healed.adapter", "healed.json"]
    assert healed.describe().endswith("healed by an adapter")
    with pytest.raises(sw.UserError, match="has an adapter already"):
        heal(healed, zoo_calibration, tmp_path / "twice.json")


def test_models_without_linear_layers_are_refused(tmp_path: Path) -> None:
    model = ROWS["gpt2"]()  # its projections are Conv1D
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(sw.UserError, match="has a linear layer"):
        heal(plan_of(model, [1]), calibration_of(model), tmp_path / "p.json")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not list(tmp_path.iterdir())


def test_the_adapter_is_pefts(zoo_calibration: Calibration, tmp_path: Path) -> None:
    """peft loads the folder, and its own merge under a plan without an adapter gives what ours gives."""
    import peft

    model = zoo_calibration.model
    plan = plan_of(model, [5, 9])
    healed = heal(plan, zoo_calibration, tmp_path / "p.json", HealSettings(steps=3))
    ids = next(iter(zoo_calibration.batches())).inputs
    with torch.no_grad():
        with sw.skip(model, healed):
            found = model(ids).logits
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "p.adapter").merge_and_unload()
        with sw.skip(theirs, plan):
            expected = theirs(ids).logits
        with sw.skip(model, plan):
            unhealed = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, unhealed, atol=1e-2)


def test_a_killed_healing_goes_on(zoo_calibration: Calibration, tmp_path: Path) -> None:
    plan = plan_of(zoo_calibration.model, [5, 9])
    settings = HealSettings(steps=6, checkpoint_every=2)
    straight = heal(plan, zoo_calibration, tmp_path / "straight.json", settings)
    heal(plan, zoo_calibration, tmp_path / "cut.json", settings, stop_after=5)
    assert not (tmp_path / "cut.json").exists()
    steps: list[int] = []
    resumed = heal(
        plan, zoo_calibration, tmp_path / "cut.json", settings, on_progress=lambda step, *_: steps.append(step)
    )
    assert steps == [5, 6], "from the checkpoint after step 4"
    assert resumed.adapter is not None
    assert straight.adapter is not None
    assert resumed.adapter.sha256 == straight.adapter.sha256
    assert sorted(f.name for f in tmp_path.glob("cut*")) == ["cut.adapter", "cut.json"]
    heal(plan, zoo_calibration, tmp_path / "cut.json", settings, stop_after=3)
    with pytest.raises(sw.UserError, match=r"differs in settings\.checkpoint_every, settings\.steps; delete it"):
        heal(plan, zoo_calibration, tmp_path / "cut.json", HealSettings(steps=7))


def test_another_adapter_than_the_plans_is_refused(zoo_calibration: Calibration, tmp_path: Path) -> None:
    plan = plan_of(zoo_calibration.model, [5])
    heal(plan, zoo_calibration, tmp_path / "p.json", HealSettings(steps=1))
    config = tmp_path / "p.adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with (
        pytest.raises(sw.UserError, match="is not the file that the plan was made with"),
        sw.skip(zoo_calibration.model, Plan.load(tmp_path / "p.json")),
    ):
        pass
