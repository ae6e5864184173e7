"""One thread changes a model at a time, and whatever is done while plans are in force, it is whole afterwards."""

import asyncio
import copy
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import skipwise as sw
from skipwise.errors import UserError
from skipwise.plan import Phase, Plan
from skipwise.skipping import cut_now, whole
from tests.tiny_models import ROWS

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def out(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def static(model: nn.Module, blocks: list[int]) -> Plan:
    shape = sw.find_contract(model).shape
    return Plan.static(shape, {next(iter(shape.stacks)): blocks})


def state(model: nn.Module) -> tuple:
    """All that a plan might leave changed."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()},
        model.config.to_dict(),
        sorted(vars(model)),
    )


def same(one: tuple, other: tuple) -> bool:
    tensors = all(
        one[1][name][0] == dtype and torch.equal(one[1][name][1], tensor) for name, (dtype, tensor) in other[1].items()
    )
    return (one[0], one[2], one[3]) == (other[0], other[2], other[3]) and one[1].keys() == other[1].keys() and tensors


def test_another_thread_is_refused_while_a_plan_is_in_force() -> None:
    """Both are inside at the same moment, by a barrier, and one of them is told so."""
    model = ROWS["llama"]()
    before, plan = state(model), static(model, [1])
    inside, leave, told = threading.Barrier(2), threading.Event(), []

    def hold() -> None:
        with sw.skip(model, plan):
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    for enter in (lambda: sw.skip(model, static(model, [0])), lambda: whole(model)):
        with pytest.raises(UserError, match="of another thread or task"), enter():
            told.append("entered")
    leave.set()
    thread.join()
    assert not told
    assert same(state(model), before)
    with sw.skip(model, plan):
        assert cut_now(model).skipped


def test_another_task_is_refused_while_a_plan_is_in_force() -> None:
    model = ROWS["llama"]()
    before, plan = state(model), static(model, [1])

    async def one(inside: asyncio.Event, leave: asyncio.Event) -> None:
        with sw.skip(model, plan):
            inside.set()
            await leave.wait()

    async def both() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(one(inside, leave))
        await inside.wait()
        with pytest.raises(UserError, match="of another thread or task"), sw.skip(model, plan):
            pass
        leave.set()
        await task

    asyncio.run(both())
    assert same(state(model), before)


def test_plans_left_in_another_order_all_end() -> None:
    model = ROWS["llama"]()
    before = state(model)
    outer, inner = sw.skip(model, static(model, [0])), sw.skip(model, static(model, [1]))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(UserError, match="left in another order"):
        outer.__exit__(None, None, None)
    assert same(state(model), before)
    with pytest.raises(UserError, match="left in another order"):
        inner.__exit__(None, None, None)
    assert same(state(model), before)
    with sw.skip(model, static(model, [1])):
        pass
    assert same(state(model), before)


def test_an_outer_plan_does_not_move_while_an_inner_one_is_in_force() -> None:
    model = ROWS["llama"]()
    shape = sw.find_contract(model).shape
    phases = (Phase(until=0.5, skip={"model.layers": (0,)}), Phase(skip={"model.layers": (1,)}))
    plan, before = Plan(model=shape, phases=phases), state(model)
    with (
        sw.skip(model, plan) as outer,
        sw.skip(model, static(model, [2])),
        pytest.raises(UserError, match="inside of this one"),
    ):
        outer.at(0.9)
    with sw.skip(model, plan) as outer:
        with whole(model):
            outer.at(0.9)
            assert len(list(model.model.layers)) == len(model.model.layers._modules)
        assert cut_now(model).skipped["model.layers"] == {1}
    assert same(state(model), before)


ACTIONS = (
    "enter",
    "enter",
    "leave",
    "leave",
    "whole",
    "phase",
    "eval",
    "train",
    "run",
    "save",
    "copy",
    "state",
    "raise",
)


@pytest.mark.parametrize("many", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_whatever_is_done_in_whatever_order_the_model_is_restored(many: int) -> None:
    model, plans = MODELS["llama"]
    model.train(False)
    before, reference = state(model), out(model)

    @settings(max_examples=many, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), min_size=1, max_size=12))
    def run(actions: list[tuple[str, int]]) -> None:
        with ExitStack() as stack:
            entered: list = []
            for what, number in actions:
                DO[what](model, plans[number % len(plans)], entered, stack)
            model.train(False)
            while entered:
                entered.pop().__exit__(None, None, None)
        assert same(state(model), before)
        assert torch.equal(out(model), reference)

    run()


def _models() -> dict[str, tuple[nn.Module, list[Plan]]]:
    model = ROWS["llama"]()
    shape = sw.find_contract(model).shape
    phases = (Phase(until=0.5, skip={"model.layers": (0,)}), Phase(skip={"model.layers": (1, 2)}))
    return {"llama": (model, [static(model, [0]), static(model, [1, 2]), Plan(model=shape, phases=phases)])}


MODELS = _models()


def _enter(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
    manager = sw.skip(model, plan)
    manager.__enter__()
    entered.append(manager)


def _leave(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
    if entered:
        entered.pop().__exit__(None, None, None)


def _raise(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
    with pytest.raises(KeyError), sw.skip(model, plan):
        raise KeyError


def _whole(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
    with whole(model):
        assert not cut_now(model).skipped or len(list(model.model.layers)) == len(model.model.layers._modules)


def _phase(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
    with sw.skip(model, plan) as skipping:
        skipping.at(0.9)
        out(model)


def _refused_or_whole(act: Callable[[nn.Module], object]) -> Callable[..., None]:
    def do(model: nn.Module, plan: Plan, entered: list, stack: ExitStack) -> None:
        try:
            act(model)
        except UserError:
            assert entered

    return do


DO: dict[str, Callable[..., None]] = {
    "enter": _enter,
    "leave": _leave,
    "raise": _raise,
    "whole": _whole,
    "phase": _phase,
    "eval": lambda model, *_: model.eval(),
    "train": lambda model, *_: model.train(),
    "run": lambda model, *_: out(model),
    "state": lambda model, *_: model.state_dict(),
    "save": _refused_or_whole(lambda model: model.save_pretrained("/dev/null/x") if cut_now(model).skipped else None),
    "copy": _refused_or_whole(lambda model: copy.deepcopy(model)),
}


@pytest.mark.slow
def test_two_threads_for_a_minute(tmp_path: Path) -> None:
    """Every output is that of the plan it was asked under, or is refused; the model is whole at the end."""
    model = ROWS["llama"]()
    before, seconds = state(model), 60.0
    plans = [static(model, [number]) for number in range(len(model.model.layers))]
    wanted = []
    for plan in plans:
        with sw.skip(model, plan):
            wanted.append(out(model))
    wrong, right, refused = [], [0], [0]
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        draw, end = random.Random(seed), time.monotonic() + seconds
        start.wait()
        while time.monotonic() < end:
            number = draw.randrange(len(plans))
            try:
                with sw.skip(model, plans[number]):
                    found = out(model)
            except UserError:
                refused[0] += 1
                time.sleep(draw.random() * 0.005)
            except Exception as error:
                wrong.append(repr(error))
            else:
                right[0] += 1
                if not torch.equal(found, wanted[number]):
                    wrong.append(f"plan {number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert right[0] > 10
    assert refused[0] > 0
    assert same(state(model), before)


def test_what_a_holder_starts_is_inside_of_its_claim() -> None:
    """An event loop, a task that is waited for, and asyncio's own threads; they take the claim along."""
    model = ROWS["llama"]()
    before, plan = state(model), static(model, [1])

    async def nested() -> None:
        with sw.skip(model, static(model, [0])):
            assert cut_now(model).skipped["model.layers"] == {0, 1}

    async def started() -> None:
        await asyncio.wait_for(nested(), 60)
        await asyncio.to_thread(lambda: out(model))

    with sw.skip(model, plan):
        asyncio.run(started())
    assert same(state(model), before)
