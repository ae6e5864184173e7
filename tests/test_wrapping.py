"""Models inside of other libraries' wrappers are planned as what is inside, and are what they were afterwards."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import skipwise as sw
from skipwise.errors import UserError
from skipwise.examples import example_inputs
from skipwise.wrapping import class_of, unwrap
from tests.tiny_models import IMAGE, LANGUAGE

IDS = torch.arange(3, 15)[None]
CPU = torch.device("cpu")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item,return-value]
    "DataParallel": nn.DataParallel,
    "a compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),  # type: ignore[dict-item,return-value]
    "PeftModel": lora,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_planned_as_what_is_inside(name: str) -> None:
    wrapped = WRAPPERS[name](LANGUAGE["llama"]())
    plain = unwrap(wrapped)
    before = logits(wrapped)
    with sw.skip(plain, [1]):
        expected = logits(plain)
    with sw.skip(wrapped, [1]):
        assert torch.equal(logits(wrapped), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(wrapped), before)
    assert sw.estimate(wrapped) == sw.estimate(plain)
    assert torch.equal(
        sw.generate(wrapped, IDS, plan=sw.Plan.of(sw.find_contract(plain).shape, [1]), gen_length=3).sequences,
        sw.generate(plain, IDS, plan=sw.Plan.of(sw.find_contract(plain).shape, [1]), gen_length=3).sequences,
    )


@pytest.mark.parametrize("name", ["DataParallel", "PeftModel"])
def test_wrapped_models_are_analysed_calibrated_and_evaluated(name: str) -> None:
    model, tokenizer = sw.load("tiny-ar")
    wrapped, texts = WRAPPERS[name](model), ["s3141592=1123459", "s2718281=1122788"]
    plain = unwrap(wrapped)
    found, expected = (sw.analyze(each, tokenizer, texts).tensors for each in (wrapped, plain))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert sw.Calibration.of(wrapped, tokenizer, texts).model is plain
    rows = [sw.evaluate(each, tokenizer, tasks=["sort"], examples=2).rows for each in (wrapped, plain)]
    assert rows[0][0].scores == rows[1][0].scores


def test_a_wrapped_diffusion_model_generates() -> None:
    plain = LANGUAGE["llada"]()
    expected = sw.generate(plain, IDS, gen_length=6).sequences
    for wrap in (WRAPPERS["torch.compile"], WRAPPERS["DataParallel"]):
        assert torch.equal(sw.generate(wrap(plain), IDS, gen_length=6).sequences, expected)


@pytest.mark.parametrize("wrap", [lambda block: torch.compile(block, backend="eager"), checkpoint_wrapper])
@pytest.mark.parametrize("row", ["llama", "mdlm"])
def test_wrapped_blocks(row: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = LANGUAGE[row](), LANGUAGE[row]()
    stack = sw.find_contract(plain).main_stack
    blocks: Any = wrapped.get_submodule(stack)
    for number, block in enumerate(blocks):
        blocks[number] = wrap(block)
    assert sw.find_contract(wrapped) == sw.find_contract(plain)
    with sw.skip(plain, [1]), sw.skip(wrapped, [1]):
        assert torch.equal(logits(wrapped), logits(plain))


def test_prompts_of_peft_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="PROMPT_TUNING"):
        sw.find_contract(peft.get_peft_model(LANGUAGE["llama"](), config))


OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model(name: str, tmp_path: Path) -> None:
    plain, offloaded = LANGUAGE["llama"](), LANGUAGE["llama"]()
    OFFLOADS[name](offloaded, tmp_path)
    before = logits(offloaded)
    with sw.skip(plain, [1]), sw.skip(offloaded, [1]):
        assert torch.equal(logits(offloaded), logits(plain))
    assert torch.equal(logits(offloaded), before)
    assert sw.estimate(offloaded) == sw.estimate(plain)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_a_dit_under_group_offloading(kind: str) -> None:
    plain, offloaded = IMAGE["flux"](), IMAGE["flux"]()
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    diffusers.hooks.apply_group_offloading(offloaded, onload_device=CPU, offload_device=CPU, offload_type=kind, **more)
    inputs = example_inputs(plain)
    with sw.skip(plain, {"transformer_blocks": [0]}), sw.skip(offloaded, {"transformer_blocks": [0]}), torch.no_grad():
        assert torch.equal(offloaded(**inputs)[0], plain(**inputs)[0])
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs)[0], plain(**inputs)[0])


@pytest.fixture
def one_process() -> Iterator[Any]:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("row", ["llama", "llada"])
def test_a_sharded_model(row: str, one_process: Any) -> None:
    plain, sharded = LANGUAGE[row](), LANGUAGE[row]()
    for layer in sharded.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    assert class_of(sharded) is type(plain)
    assert sw.find_contract(sharded) == sw.find_contract(plain)
    assert sw.estimate(sharded) == sw.estimate(plain)
    with sw.skip(plain, [1]), sw.skip(sharded, [1]):
        assert torch.equal(logits(sharded), logits(plain))
    plan = sw.Plan.of(sw.find_contract(plain).shape, [1])
    found, expected = (sw.generate(model, IDS, plan=plan, gen_length=4).sequences for model in (sharded, plain))
    assert torch.equal(found, expected)


def test_data_parallel_training_under_a_plan(one_process: Any) -> None:
    waits = DistributedDataParallel(LANGUAGE["llama"]())
    finds = DistributedDataParallel(LANGUAGE["llama"](), find_unused_parameters=True)
    for wrapped in (waits, waits.module):
        with sw.skip(wrapped, [1]), pytest.raises(UserError, match="find_unused_parameters=True"):
            waits(IDS)
    with sw.skip(finds, [1]):
        finds(IDS, labels=IDS).loss.backward()
    layers = finds.module.model.layers
    assert layers[1].mlp.up_proj.weight.grad is None
    assert layers[2].mlp.up_proj.weight.grad is not None


def _trained(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(LANGUAGE["llama"](), find_unused_parameters=True)
    with sw.skip(model, [1]):
        model(IDS + rank, labels=IDS + rank).loss.backward()
    with torch.no_grad():
        torch.save(model.module.model.layers[2].mlp.up_proj.weight.grad, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_reduce_the_gradients_of_the_blocks_that_run(tmp_path: Path) -> None:
    mp.spawn(_trained, (20000 + os.getpid() % 20000, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = LANGUAGE["llama"]()
    with sw.skip(model, [1]):
        for rank in (0, 1):
            (model(IDS + rank, labels=IDS + rank).loss / 2).backward()
    assert torch.equal(first, second)
    assert torch.allclose(first, model.model.layers[2].mlp.up_proj.weight.grad, atol=1e-6)


def test_a_model_flattened_by_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which wants a process group."""

    with pytest.raises(UserError, match="fully_shard"):
        unwrap(FullyShardedDataParallel())
