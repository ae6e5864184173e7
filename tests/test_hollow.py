"""Laws of training without the skipped blocks: exact before the trained ones, and behind them where it says so."""

import peft
import pytest
import torch
from torch import nn

from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError
from skipwise.finetuning.hollow import Remembered, hollow
from skipwise.finetuning.late import Streamed
from skipwise.finetuning.runs import Run, skipped_runs
from skipwise.kept import PassThrough
from skipwise.plan import Plan
from tests.hooked import hooked_record
from tests.tiny_models import IMAGE, VIDEO, example

DITS = IMAGE | VIDEO


def trained(model, early=True, late=True):
    """A plan that trains the middle of the main stack: `early` leaves out its first block, `late` its last."""
    contract = find_contract(model)
    main, names = contract.main_stack, list(contract.stacks)
    train = {name: range(contract.stacks[name].length) for name in names[names.index(main) + 1 :]} if not late else {}
    if not early:
        train |= {name: range(contract.stacks[name].length) for name in names[: names.index(main)]}
    length = contract.stacks[main].length
    train[main] = range(int(early), length - int(late))
    return Plan(model=contract.shape, train={name: tuple(numbers) for name, numbers in train.items()})


def add_lora(model, plan, seed=1):
    """LoRA with random weights, none of them zero, on every linear layer of the trained blocks."""
    blocks = [(name, module_list(model, name)[i]) for name, numbers in plan.train.items() for i in numbers]
    linear = {id(m) for _, block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in linear]
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)


def loss_and_gradients(model, inputs):
    """Loss against a fixed target, and the gradient of every LoRA weight by name."""
    out = model(**inputs)
    out = out.sample if hasattr(out, "sample") else out[0]
    out = torch.stack(out) if isinstance(out, list) else out
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    loss = (out - target).square().mean()
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    # the last block's text side may lead nowhere
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def build(row):
    model = DITS[row]()
    return model, example(model)


def adapted(row, **plan):
    model, inputs = build(row)
    made = trained(model, **plan)
    runs = skipped_runs(find_contract(model), made.train)
    record = hooked_record(model, runs, inputs)
    add_lora(model, made)
    return model, inputs, made, record


class HostMemory:
    """Blocks whose weights wait in a copy, by name."""

    def __init__(self, model, names):
        self.weights = {
            name: {k: v.clone() for k, v in model.get_submodule(name).state_dict().items()} for name in names
        }
        self.filled = []

    def fill(self, module, prefix, *, device=None):
        self.filled.append(prefix)
        module.load_state_dict(self.weights[prefix], assign=True)

    def release(self, module):
        module.to_empty(device="meta")


def test_runs_are_found_in_the_order_of_the_forward():
    contract = find_contract(DITS["flux"]())
    runs = skipped_runs(contract, {"single_transformer_blocks": [1, 3]})
    assert [(run.name, run.early) for run in runs] == [
        ("transformer_blocks.0-2", True),
        ("single_transformer_blocks.0-0", True),
        ("single_transformer_blocks.2-2", False),
    ]
    assert skipped_runs(contract, {"transformer_blocks": [2]})[1:] == (Run("single_transformer_blocks", 0, 4, False),)
    everything = {name: range(stack.length) for name, stack in contract.stacks.items()}
    assert skipped_runs(contract, everything) == ()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "No block is to be trained"),
        ({"transformer_blocks": []}, "No block is to be trained"),
        ({"blocks": [1]}, "Unknown stack 'blocks'"),
        ({"transformer_blocks": [3]}, "which has blocks 0 to 2"),
    ],
)
def test_runs_refuse_what_cannot_be_trained(train, message):
    with pytest.raises(UserError, match=message):
        skipped_runs(find_contract(DITS["flux"]()), train)


@pytest.mark.parametrize("row", DITS)
def test_without_early_blocks_loss_and_gradients_are_those_of_ordinary_lora(row):
    """What runs before the first trained block has no part in the gradient."""
    model, inputs, plan, record = adapted(row, late=False)
    wanted, gradients = loss_and_gradients(model, inputs)
    with hollow(model, plan, late="none") as shell:
        assert shell.runs
        assert all(run.early for run in shell.runs)
        shell.feed(record)
        assert not _live(model, shell)
        loss, found = loss_and_gradients(model, inputs)
    assert loss.allclose(wanted, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert found[name].allclose(gradient, rtol=1e-4, atol=1e-6), name
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def _live(model, shell):
    """Skipped blocks that are still in the model."""
    places = [module_list(model, run.stack)[number] for run in shell.runs for number in run.blocks]
    return [place for place in places if not isinstance(place, PassThrough) or list(place.parameters())]


@pytest.mark.parametrize("row", DITS)
def test_fresh_residuals_give_the_whole_models_prediction(row):
    """Before anything is learnt the loss is the whole model's, also with late residuals (paper 3)."""
    model, inputs = build(row)
    plan = trained(model)
    runs = skipped_runs(find_contract(model), plan.train)
    assert {run.early for run in runs} == {True, False}
    record = hooked_record(model, runs, inputs)
    add_lora(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    wanted, _ = loss_and_gradients(model, inputs)
    with hollow(model, plan) as shell:
        shell.feed(record)
        loss, _ = loss_and_gradients(model, inputs)
    assert loss.allclose(wanted, rtol=1e-5)


def test_late_residuals_lose_the_jacobian():
    """The reason for the other late modes: the loss is right, the gradient is not."""
    model, inputs, plan, record = adapted("flux", early=False)
    wanted, gradients = loss_and_gradients(model, inputs)
    with hollow(model, plan) as shell:
        shell.feed(record)
        loss, found = loss_and_gradients(model, inputs)
    assert not loss.equal(wanted)  # stale: LoRA is not at zero here
    cosines = [torch.cosine_similarity(found[n].flatten(), g.flatten(), dim=0) for n, g in gradients.items()]
    assert min(cosines) < 0.999


@pytest.mark.parametrize("row", DITS)
def test_streamed_late_blocks_are_exact(row):
    model, inputs, plan, record = adapted(row)
    wanted, gradients = loss_and_gradients(model, inputs)
    late = [run for run in skipped_runs(find_contract(model), plan.train) if not run.early]
    names = [f"{run.stack}.{number}" for run in late for number in run.blocks]
    blocks = HostMemory(model, names)
    early = {run.name: record[run.name] for run in skipped_runs(find_contract(model), plan.train) if run.early}
    with hollow(model, plan, late="streamed", blocks=blocks) as shell:
        for name in names:
            assert isinstance(model.get_submodule(name), Streamed)
        shell.feed(early)
        loss, found = loss_and_gradients(model, inputs)
        assert blocks.filled == [*names, *reversed(names)]  # one forward, one backward
    assert loss.allclose(wanted, rtol=1e-6)
    for name, gradient in gradients.items():
        assert found[name].allclose(gradient, rtol=1e-4, atol=1e-6), name
    for name in names:  # nothing of them stays behind
        assert all(parameter.is_meta for parameter in model.get_submodule(name).parameters())


def test_frozen_late_blocks_are_exact():
    model, inputs, plan, record = adapted("sd3")
    wanted, gradients = loss_and_gradients(model, inputs)
    with hollow(model, plan, late="frozen") as shell:
        shell.feed({run.name: record[run.name] for run in shell.runs})
        loss, found = loss_and_gradients(model, inputs)
    assert loss.allclose(wanted, rtol=1e-6)
    assert all(found[name].allclose(gradient, rtol=1e-4, atol=1e-6) for name, gradient in gradients.items())


@pytest.mark.parametrize("row", ["flux", "sd3", "sana", "pixart"])
def test_checkpointing_changes_nothing(row):
    model, inputs, plan, record = adapted(row)
    with hollow(model, plan) as shell:
        shell.feed(record)
        wanted, gradients = loss_and_gradients(model, inputs)
        model.enable_gradient_checkpointing()
        model.train()
        loss, found = loss_and_gradients(model, inputs)
    assert loss.equal(wanted)
    assert all(found[name].equal(gradient) for name, gradient in gradients.items())


def test_names_stay_and_everything_is_put_back():
    model = DITS["flux"]()
    before = dict(model.named_modules())
    plan = trained(model)

    def fail():
        with hollow(model, plan):
            kept = {f"{name}.{i}" for name, numbers in plan.train.items() for i in numbers}
            assert all(model.get_submodule(name) is before[name] for name in kept)
            assert isinstance(model.transformer_blocks[0], Remembered)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


def test_mistakes_are_named():
    model, inputs = build("flux")
    plan = trained(model)
    with pytest.raises(UserError, match="feed the record of this batch first"), hollow(model, plan):
        model(**inputs)
    with hollow(model, plan) as shell, pytest.raises(UserError, match="holds runs"):
        shell.feed({"blocks.0-1": ()})
    record = hooked_record(model, skipped_runs(find_contract(model), plan.train), inputs)
    other_batch = {name: tuple(s[:1] for s in streams if s is not None) for name, streams in record.items()}
    with hollow(model, plan) as shell:
        shell.feed(other_batch)
        with pytest.raises(UserError, match="another resolution"):
            model(**inputs)
    with pytest.raises(UserError, match="Unknown late mode 'resident'"), hollow(model, plan, late="resident"):
        pass
    with pytest.raises(UserError, match="trains the last blocks"), hollow(model, plan, late="none"):
        pass
    with pytest.raises(UserError, match="needs `blocks`"), hollow(model, plan, late="streamed"):
        pass
    with pytest.raises(UserError, match="made for a model"), hollow(DITS["sd3"](), plan):
        pass
