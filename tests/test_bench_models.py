"""Models of any shape with random weights, and how much memory it takes to make or to load one."""

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import skipwise as sw
from skipwise.errors import UserError
from skipwise.models import LLaDA
from skipwise.models.llada import official_state_dict
from skipwise.models.mdlm import MDLM, MDLMConfig
from skipwise.models.random import random_model

DIMS = {"width": 32, "layers": 3, "heads": 4, "mlp": 48, "vocab": 64}


def test_from_dims_has_the_shape_and_decodes() -> None:
    model = LLaDA.from_dims(**DIMS, kv_heads=2, mask_token_id=5, max_length=128)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 64)
    assert (config.num_key_value_heads, config.intermediate_size, config.mask_token_id) == (2, 48, 5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    found = sw.generate(model, torch.arange(8, 16).view(2, 4), gen_length=6).sequences
    assert found.shape == (2, 10)
    assert not (found == 5).any()


def test_the_mask_is_the_last_token_when_left_out() -> None:
    assert LLaDA.from_dims(**DIMS).config.mask_token_id == 63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_ordinary_initialisation(dtype: torch.dtype) -> None:
    """Spread and rotary table as when the class itself is called, the same again for a seed, others for another."""
    model = LLaDA.from_dims(**DIMS | {"vocab": 4096}, dtype=dtype, seed=1)
    torch.manual_seed(0)
    plain = type(model)(model.config)
    again, other = (LLaDA.from_dims(**DIMS | {"vocab": 4096}, dtype=dtype, seed=seed) for seed in (1, 2))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, again.state_dict()[name])
        assert abs(float(tensor.float().std() - plain.state_dict()[name].std())) < 0.002
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_drawing_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    LLaDA.from_dims(**DIMS)
    assert torch.equal(torch.rand(2), expected)


def test_a_head_that_begins_at_zero_is_drawn() -> None:
    model = random_model(MDLM, MDLMConfig(vocab_size=64, hidden_dim=32, cond_dim=8, n_blocks=2, n_heads=4))
    assert float(model(torch.arange(6)[None]).logits.detach().std()) > 0.01


@pytest.mark.parametrize(("changes", "named"), [({"heads": 5}, "heads=5"), ({"mask_token_id": 64}, "64")])
def test_sizes_that_do_not_go_together_are_named(changes: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LLaDA.from_dims(**DIMS | changes)


# Memory of loading. What is counted is anonymous memory: pages of a mapped file are the system's to drop.

MIB = 2**20
SLACK = 24 * MIB  # what Python and torch take beside tensors
LOAD = """
import sys
import torch
import skipwise as sw
sw.load("tiny-dllm")  # so that what is imported on the first use is not counted
input(print("ready", flush=True) or "")
{how}
print("done", flush=True)
input()
"""
OURS = "model, _ = sw.load(sys.argv[1], dtype='float32')"
NAIVE = """
from pathlib import Path
from safetensors.torch import load_file
from skipwise.loading import load_random
shards = [load_file(path) for path in sorted(Path(sys.argv[1]).glob("*.safetensors"))]
weights = {key: tensor.float() for shard in shards for key, tensor in shard.items()}
model = load_random(sys.argv[1])
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official LLaDA checkpoint in bfloat16, 80 MiB in 8 shards."""
    folder = tmp_path_factory.mktemp("sharded")
    dims = {"width": 512, "layers": 8, "heads": 8, "mlp": 2048, "vocab": 8192}
    model = LLaDA.from_dims(**dims, dtype=torch.bfloat16)
    weights = official_state_dict(model)
    keys, index = list(weights), {}
    for number in range(8):
        name = f"model-{number + 1:05d}-of-00008.safetensors"
        part = keys[number * len(keys) // 8 : (number + 1) * len(keys) // 8]
        save_file({key: weights[key] for key in part}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(model.config.to_official()))
    return folder


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def growth(how: str, folder: Path) -> int:
    """Highest anonymous memory of a process while it loads, above what it had before; watched from outside."""
    command = [sys.executable, "-c", LOAD.format(how=how), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = highest = anonymous_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        with _reading(child) as done:
            while not done():
                highest = max(highest, anonymous_bytes(child.pid))
                time.sleep(0.002)
        highest = max(highest, anonymous_bytes(child.pid))
        child.stdin.write("end\n")
    return highest - before


@contextmanager
def _reading(child: subprocess.Popen[str]) -> Iterator[Callable[[], bool]]:
    """A function that says whether the child has said that it is done."""
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
    yield lambda: bool(selector.select(0))
    selector.close()
    assert child.stdout.readline() == "done\n"  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux alone")
@pytest.mark.parametrize("how", [OURS, NAIVE], ids=["ours", "two copies"])
def test_loading_holds_the_model_and_no_more_than_one_shard(how: str, sharded: Path) -> None:
    """As float32, so that nothing can be left mapped. What holds two copies fails the same measure."""
    shards = [path.stat().st_size for path in sharded.glob("*.safetensors")]
    limit = 2 * sum(shards) + max(shards) + SLACK
    found = growth(how, sharded)
    assert found > 2 * sum(shards) - SLACK
    assert (found <= limit) == (how == OURS), f"{found / MIB:.0f} MiB; {limit / MIB:.0f} MiB are allowed"
