"""Weights read block by block: a model built without weights and filled is the one that `from_pretrained` gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import skipwise as sw
from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError
from skipwise.finetuning.shards import Resident, Shards, places
from tests.tiny_models import IMAGE, VIDEO, example, output

DITS = IMAGE | VIDEO
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A folder with tiny FLUX in one file."""
    folder = tmp_path_factory.mktemp("flux")
    DITS["flux"]().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(flux, tmp_path) -> Path:
    """The same folder, to be spoilt."""
    return Path(shutil.copytree(flux, tmp_path / "flux"))


def change(folder: Path, change_tensors) -> None:
    tensors = load_file(folder / SINGLE)
    change_tensors(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("row", DITS)
def test_a_filled_skeleton_is_the_pretrained_model(row, tmp_path):
    """Parameters, dtypes, tables that no checkpoint holds, and the forward, bit for bit, in the dtype asked for."""
    model = DITS[row]()
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        expected = type(model).from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype)).eval()
        shards = Shards.open(tmp_path, dtype=dtype)
        skeleton = shards.skeleton()
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        shards.fill_outside(skeleton)
        contract = find_contract(skeleton)  # with blocks that are not there
        for name, stack in contract.stacks.items():
            for number, block in enumerate(module_list(skeleton, name)):
                assert all(parameter.is_meta for parameter in block.parameters())
                shards.fill(block, f"{name}.{number}")
            assert stack == find_contract(expected).stacks[name]
        wanted, found = expected.state_dict(), skeleton.state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert {n: b.dtype for n, b in skeleton.named_buffers()} == {n: b.dtype for n, b in expected.named_buffers()}
        inputs = example(expected)
        assert torch.equal(output(skeleton, inputs), output(expected, inputs))


def test_a_block_is_there_inside_of_the_with_only(flux):
    shards = Shards.open(flux)
    model = shards.skeleton()
    shards.fill_outside(model)
    outside = shards.bytes_read
    with shards.block(model, "transformer_blocks.1") as block:
        assert block is model.transformer_blocks[1]
        assert not any(parameter.is_meta for parameter in block.parameters())
        inside = sum(p.numel() * p.element_size() for p in block.parameters())
        assert shards.bytes_read == outside + inside
    with pytest.raises(RuntimeError, match="in the middle"), shards.block(model, "transformer_blocks.1"):
        raise RuntimeError("in the middle")
    assert all(parameter.is_meta for parameter in model.transformer_blocks[1].parameters())
    assert not any(parameter.is_meta for parameter in model.x_embedder.parameters())
    assert shards.opened == {"transformer_blocks.1": 2}
    shards.fill_outside(model)
    assert shards.bytes_read == outside + 2 * inside  # what is there is not read again


def test_a_graph_keeps_released_weights(flux):
    """Late blocks are streamed in training: their weights are let go before the backward has used them."""
    shards = Shards.open(flux)
    linear = nn.Linear(32, 32, bias=False)
    x = torch.ones(1, 32, requires_grad=True)
    name = next(n for n in shards.names if shards.entries[n].shape == (32, 32)).removesuffix(".weight")
    linear.requires_grad_(False)
    shards.fill(linear_without_bias(linear), name)
    weight, out = linear.weight.clone(), linear(x)
    shards.release(linear)
    assert linear.weight.is_meta
    assert not linear.weight.requires_grad
    out.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0)[None])


def linear_without_bias(linear: nn.Linear) -> nn.Linear:
    assert linear.bias is None
    return linear


def test_sharded_and_single_files_are_one_checkpoint(flux, tmp_path):
    """The fingerprint is that of the weights, however they are cut into files, and of the model in memory."""
    model = DITS["flux"]()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shards, single = Shards.open(tmp_path), Shards.open(flux)
    assert shards.names == single.names == sorted(model.state_dict()) == Resident(model).names
    assert shards.fingerprint() == single.fingerprint() == Resident(model).fingerprint()
    filled = shards.skeleton()
    shards.fill(filled)
    assert all(torch.equal(p, q) for p, q in zip(filled.parameters(), model.parameters(), strict=True))
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"lacks diffusion_pytorch_model-00001-of-\d+.safetensors, which"):
        Shards.open(tmp_path)


def test_the_fingerprint_tells_models_apart(flux, copy):
    before = Shards.open(flux).fingerprint()
    name = "transformer_blocks.1.attn.to_q.weight"
    assert Shards.open(copy).fingerprint() == before

    def flip(tensors):
        tensors[name][0, 0] += 1

    change(copy, flip)
    assert Shards.open(copy).fingerprint() != before
    shutil.copy(flux / SINGLE, copy)
    change(copy, lambda tensors: tensors.update({name: tensors[name].T.reshape(16, 64).contiguous()}))
    assert Shards.open(copy).fingerprint() != before
    shutil.copy(flux / SINGLE, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert Shards.open(copy).fingerprint() == before
    (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    assert Shards.open(copy).fingerprint() != before


def test_large_tensors_are_sampled_at_both_ends_and_in_the_middle():
    big = nn.Linear(10_000, 1, bias=False)
    seen = Resident(big).fingerprint()
    for changed, at in ((True, 0), (True, 5_000), (True, 9_999), (False, 2_500)):
        twin = nn.Linear(10_000, 1, bias=False)
        twin.load_state_dict(big.state_dict())
        with torch.no_grad():
            twin.weight[0, at] += 1
        assert (Resident(twin).fingerprint() != seen) == changed, at


def test_what_does_not_fit_is_named(copy):
    change(copy, lambda tensors: tensors.pop("transformer_blocks.1.attn.to_q.weight"))
    shards = Shards.open(copy)
    model = shards.skeleton()
    shards.fill(model.transformer_blocks[0], "transformer_blocks.0")
    with pytest.raises(UserError, match=r"lacks transformer_blocks.1.attn.to_q.weight. Is its config.json"):
        shards.fill(model.transformer_blocks[1], "transformer_blocks.1")
    with pytest.raises(UserError, match=r"in shape \(32, 16\), the model in \(32, 32\)"):
        shards.fill(nn.ModuleDict({"x_embedder": nn.Linear(32, 32)}))


def test_a_model_built_wholly_on_meta_is_refused(tmp_path):
    """What it should have computed when it was built is lost."""
    DITS["wan"]().save_pretrained(tmp_path)
    model = sw.loading.load_skeleton(str(tmp_path))
    assert any(buffer.is_meta for buffer in model.buffers())
    with pytest.raises(UserError, match=r"rope.freqs_cos is computed when .* Shards.skeleton\(\)"):
        Shards.open(tmp_path).fill_outside(model)


def test_folders_that_cannot_be_read_are_refused(copy):
    whole = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut short"):
        Shards.open(copy)
    (copy / SINGLE).write_bytes(whole[:4])
    with pytest.raises(UserError, match="damaged or cut short"):
        Shards.open(copy)
    (copy / SINGLE).rename(copy / "one.safetensors")
    shutil.copy(copy / "one.safetensors", copy / "two.safetensors")
    with pytest.raises(UserError, match=r"several checkpoints \(one.safetensors, two.safetensors\)"):
        Shards.open(copy)
    with pytest.raises(UserError, match=r"Unknown dtype 'int8'"):
        Shards.open(copy, dtype="int8")


def test_tied_weights_stay_tied():
    """A transformers folder, whose checkpoint has one of two names of a tensor."""
    model, _ = sw.load("tiny-ar")
    shards = Shards.open("tiny-ar")
    filled = shards.skeleton()
    shards.fill(filled)
    assert filled.config.tie_word_embeddings == (filled.get_input_embeddings().weight is filled.lm_head.weight)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(filled(ids).logits, model(ids).logits)


def test_resident_weights_stay_where_they_are():
    model = DITS["sd3"]()
    before = {place.name: id(place.tensor) for place in places(model)}
    weights = Resident(model)
    weights.fill_outside(model)
    with weights.block(model, "transformer_blocks.2") as block:
        assert block is model.transformer_blocks[2]
    assert {place.name: id(place.tensor) for place in places(model)} == before
    assert weights.opened == {"transformer_blocks.2": 1}
