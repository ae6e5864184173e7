"""Records made block by block are those of a hooked whole forward, bit for bit, and each block is loaded once."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from skipwise.blocks import find_contract, module_list
from skipwise.errors import UserError
from skipwise.examples import Size, example_inputs
from skipwise.finetuning.dataflow import record_shapes
from skipwise.finetuning.hollow import hollow
from skipwise.finetuning.host import Host
from skipwise.finetuning.making import size_of
from skipwise.finetuning.runs import skipped_runs
from skipwise.finetuning.shards import Resident, Shards
from skipwise.finetuning.streaming import make_records
from skipwise.loading import load, load_skeleton
from skipwise.plan import Plan
from tests.hooked import hooked_record
from tests.tiny_models import IMAGE, VIDEO, example, output

DITS = IMAGE | VIDEO
# these join image and text to one stream and cut the text off behind the last block; the whole stream counts as used
JOINED = {"flux2", "chroma", "aura_flow", "z_image", "lumina2", "hunyuan_video"}


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture(params=DITS)
def model(request, models) -> nn.Module:
    if request.param not in models:
        models[request.param] = DITS[request.param]()
    return models[request.param]


def varied(model, number=3, batch=1):
    """Samples that differ in all their random tensors."""
    image = 16 if type(model).__name__ == "ZImageTransformer2DModel" else 8
    samples = []
    for seed in range(number):
        inputs = example_inputs(model, Size(batch=batch, image=image))
        generator = torch.Generator().manual_seed(seed)

        def anew(value, generator=generator):
            if isinstance(value, list) and isinstance(value[0], torch.Tensor):
                return [anew(item) for item in value]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2:
                return torch.randn(value.shape, generator=generator).to(value.dtype)
            return value

        samples.append({name: anew(value) for name, value in inputs.items()})
    return samples


def trains(contract):
    """Runs before, between and behind trained blocks; all trained in the first stack, or in the last."""
    names = list(contract.stacks)
    yield {name: [1] for name in names}
    yield {names[0]: [1]}
    yield {names[-1]: [1, 2]}


def same(found, wanted, shapes):
    """Equal where wanted, None where the model makes no use of a stream."""
    assert found.keys() == wanted.keys() == shapes.keys()
    for name in found:
        for mine, theirs, shape in zip(found[name], wanted[name], shapes[name], strict=True):
            assert (mine is None) == (shape is None)
            assert mine is None or (mine.shape == shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_hooked(model, dtype):
    """Every diffusers row, streams of unequal lengths; batches are as exact as single samples."""
    model.to(dtype)
    contract = find_contract(model)
    for train, batch in zip(trains(contract), (1, 2, 1), strict=False):
        runs = skipped_runs(contract, train)
        samples = varied(model, 2, batch)
        records = make_records(model, samples, runs, Resident(model))
        shapes = record_shapes(model, runs, samples[0])
        for record, sample in zip(records, samples, strict=True):
            same(record, hooked_record(model, runs, sample), shapes)
        assert any(shape for row in shapes.values() for shape in row)
    model.float()


def test_dropped_streams_do_not_matter(model):
    """A hollow model gives the same prediction with what `record_shapes` leaves out as with everything."""
    inputs = example(model)
    contract = find_contract(model)
    for train in trains(contract):
        runs = skipped_runs(contract, train)
        whole = hooked_record(model, runs, inputs)
        record = make_records(model, [inputs], runs, Resident(model))[0]
        with hollow(model, Plan(model=contract.shape, train={n: tuple(b) for n, b in train.items()})) as shell:
            shell.feed(whole)
            expected = output(model, inputs)
            shell.feed(record)
            assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("row", [row for row in DITS if row not in JOINED])
def test_kept_streams_matter(row, models):
    """And each stream that it keeps changes the prediction: nothing is stored in vain."""
    model = models.get(row) or DITS[row]()
    inputs = example(model)
    contract = find_contract(model)
    for train in trains(contract):
        runs = skipped_runs(contract, train)
        record = make_records(model, [inputs], runs, Resident(model))[0]
        with hollow(model, Plan(model=contract.shape, train={n: tuple(b) for n, b in train.items()})) as shell:
            shell.feed(record)
            expected = output(model, inputs)
            for name, streams in record.items():
                for place, stream in enumerate(streams):
                    if stream is not None:
                        other = [stream + 1 if i == place else s for i, s in enumerate(streams)]
                        shell.feed(record | {name: tuple(other)})
                        assert not torch.equal(output(model, inputs), expected), (name, place)


@pytest.mark.parametrize("row", ["flux", "chroma", "sd3", "sana", "wan", "z_image"])
def test_streamed_from_a_folder(row, tmp_path):
    """Each block is read once for all samples, and is gone again; blocks behind the last run are never read."""
    DITS[row]().save_pretrained(tmp_path, max_shard_size="50KB")
    # read from the same files: where a weight lies in memory can change the last bit of a product on a CPU
    whole = load(str(tmp_path))[0]
    for train in trains(find_contract(whole)):
        shards = Shards.open(tmp_path)
        model = shards.skeleton()
        runs = skipped_runs(shards.contract, train)
        samples, seen = varied(whole), []

        def see(name, shards=shards, model=model, seen=seen):
            seen.append(name)
            assert not held(model, shards.contract)

        records = make_records(model, samples, runs, shards, on_block=see)
        shapes = record_shapes(model, runs, samples[0])
        for record, sample in zip(records, samples, strict=True):
            same(record, hooked_record(whole, runs, sample), shapes)
        names = [f"{name}.{i}" for name, stack in shards.contract.stacks.items() for i in range(stack.length)]
        stop = max(names.index(f"{run.stack}.{run.stop - 1}") for run in runs if any(shapes[run.name]))
        assert shards.opened == Counter(names[: stop + 1])
        assert sorted(seen) == sorted(names[: stop + 1])
        stored = sum(entry.end - entry.begin for entry in shards.entries.values())
        behind = tuple(f"{name}." for name in names[stop + 1 :])
        skipped = sum(e.end - e.begin for name, e in shards.entries.items() if name.startswith(behind))
        assert shards.bytes_read == stored - (skipped if behind else 0)
        assert not held(model, shards.contract)


def held(model, contract):
    """Blocks whose weights are there."""
    blocks = [block for name in contract.stacks for block in module_list(model, name)]
    return [block for block in blocks if not all(parameter.is_meta for parameter in block.parameters())]


def test_no_more_than_one_block_is_there(tmp_path):
    """In the middle of its work, too; and what is outside of the blocks is there all the time."""
    whole = DITS["flux"]()
    whole.save_pretrained(tmp_path)
    shards = Shards.open(tmp_path)
    model, counts = shards.skeleton(), []
    fill = shards.fill

    def counted(module, prefix="", *, device=None):
        fill(module, prefix, device=device)
        counts.append(len(held(model, shards.contract)))

    shards.fill = counted
    runs = skipped_runs(shards.contract, {"single_transformer_blocks": [1, 2]})
    make_records(model, varied(whole), runs, shards)
    assert counts == [1] * 7
    assert not any(parameter.is_meta for parameter in model.proj_out.parameters())


# MiB of a record in bfloat16 at 256 and at 512 pixels, early and late; text tokens; pixels a latent pixel
PUBLISHED = {
    "flux.1-dev": (
        512,
        8,
        {"transformer_blocks": range(14, 19), "single_transformer_blocks": range(23)},
        [(4.5, 1.5), (9.0, 6.0)],
    ),
    "sd3-medium": (333, 8, {"transformer_blocks": range(6, 18)}, [(1.726, 0.75), (3.976, 3.0)]),
    "sana-1.6b": (300, 32, {"transformer_blocks": range(5, 15)}, [(0.273, 0.273), (1.094, 1.094)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_full_models_follow_from_their_configs(name):
    """Without a weight; by hand: tokens x width x 2 bytes, image and text before the trained blocks, image behind."""
    text, scale, train, wanted = PUBLISHED[name]
    model = load_skeleton(name)
    runs = skipped_runs(find_contract(model), train)
    for pixels, sizes in zip((256, 512), wanted, strict=True):
        sample = example_inputs(model, Size(image=pixels // scale, text=text))
        shapes = record_shapes(model, runs, sample)
        found = [size_of({name: row}, 1, torch.bfloat16).bytes / 2**20 for name, row in shapes.items()]
        assert found == pytest.approx(sizes, abs=6e-4)


def test_late_blocks_are_not_loaded_for_early_runs():
    """Late modes frozen, streamed and none store early runs alone."""
    model = DITS["flux"]()
    contract = find_contract(model)
    runs = [run for run in skipped_runs(contract, {"transformer_blocks": [1]}) if run.early]
    blocks = Resident(model)
    (record,) = make_records(model, varied(model, 1), runs, blocks)
    assert list(record) == ["transformer_blocks.0-0"]
    assert blocks.opened == {"transformer_blocks.0": 1}


def test_states_on_disk_are_the_same(tmp_path, models):
    model = models.get("flux2") or DITS["flux2"]()
    runs = skipped_runs(find_contract(model), {"transformer_blocks": [1], "single_transformer_blocks": [2]})
    samples = varied(model)
    plain = make_records(model, samples, runs, Resident(model))
    spilled = make_records(model, samples, runs, Resident(model), spill=tmp_path)
    assert not list(tmp_path.iterdir())  # the files have no names any more
    for a, b in zip(plain, spilled, strict=True):
        for name in a:
            assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True))


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.truncate", full)
    with pytest.raises(UserError, match=r"Cannot keep 0.25 GiB of states in .*No space left on device"):
        Host(tmp_path).keep(torch.ones(3))
    assert not list(tmp_path.iterdir())


def test_host_segments_hold_what_was_put_in_them(tmp_path):
    host = Host(tmp_path, segment=1000)
    tensors = [
        torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n, dtype in itertools.product((1, 7, 300, 0), (torch.float32, torch.bfloat16))
    ]
    kept = [host.keep(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, kept, strict=True))
    shared = [Host().share(tensors[2]) for _ in range(2)]
    assert shared[0] is not shared[1]
    host = Host()
    assert host.share(tensors[2]) is host.share(tensors[2].clone())
    assert host.share(tensors[2]) is not host.share(tensors[2] + 1)


def test_the_model_is_left_as_it_was(models):
    model = models.get("sd3") or DITS["sd3"]()
    inputs = example(model)
    modules, expected = list(model.modules()), output(model, inputs)
    runs = skipped_runs(find_contract(model), {"transformer_blocks": [1]})
    make_records(model, [inputs], runs, Resident(model))
    with pytest.raises(TypeError):
        make_records(model, [inputs | {"nonsense": 1}], runs, Resident(model))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(output(model, inputs), expected)
    assert make_records(model, [], runs, Resident(model)) == []


def test_streams_that_change_between_blocks_are_refused():
    """diffusers adds what a ControlNet gives between blocks, where nobody would know of it."""
    model = DITS["sd3"]()
    inputs = example(model)
    states = torch.ones(2, 16, 32)
    runs = skipped_runs(find_contract(model), {"transformer_blocks": [1]})
    with pytest.raises(UserError, match=r"change between blocks 0 and 1 of transformer_blocks, as with a ControlNet"):
        make_records(model, [inputs | {"block_controlnet_hidden_states": [states] * 4}], runs, Resident(model))
