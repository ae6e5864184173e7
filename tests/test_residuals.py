"""The residual store: found by what a draw is, refused when a byte is wrong, gone on with after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from skipwise.blocks import find_contract
from skipwise.errors import UserError
from skipwise.examples import Size, example_inputs
from skipwise.files import PARTIAL
from skipwise.finetuning.draws import Draw, Example
from skipwise.finetuning.hollow import hollow
from skipwise.finetuning.images import Picture
from skipwise.finetuning.making import OnTheFly, StoreSize, fill_store, size_of
from skipwise.finetuning.patches import Patch
from skipwise.finetuning.residuals import DrawKey, ResidualStore
from skipwise.finetuning.runs import skipped_runs
from skipwise.finetuning.shards import Resident
from skipwise.finetuning.streaming import shapes_of
from skipwise.plan import Plan
from tests.hooked import hooked_record
from tests.tiny_models import IMAGE, output

SETTINGS = {"base": "f" * 64, "runs": ["transformer_blocks.0-0"], "dtype": "float32", "prompt": {"text": "a sks dog"}}
TRAIN = {"transformer_blocks": [1]}


def key(number: int, **changes) -> DrawKey:
    return DrawKey(
        **{"image": f"{number:064x}", "crop": (0, 3, 8), "timestep": 0.25, "noise_seed": number}
        | {"prompt": "dog"}
        | changes
    )


def records(numbers, generator=0):
    made = torch.Generator().manual_seed(generator)
    return {
        key(n): {
            "a.0-1": (torch.randn(1, 3, 4, generator=made), None),
            "b.2-2": (torch.randn(1, 5, 4, generator=made),),
        }
        for n in numbers
    }


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sd3():
    return IMAGE["sd3"]()


def sample_of(model):
    """Model inputs that follow from the key alone."""

    def of(draw: DrawKey):
        inputs = example_inputs(model, Size(batch=1))
        generator = torch.Generator().manual_seed(draw.noise_seed)
        latents = torch.randn(inputs["hidden_states"].shape, generator=generator)
        return inputs | {"hidden_states": latents, "timestep": torch.tensor([1000 * draw.timestep])}

    return of


def runs_of(model):
    return skipped_runs(find_contract(model), TRAIN)


def fill(store, keys, model, **settings):
    fill_store(store, keys, sample_of(model), model, runs_of(model), Resident(model), **settings)


def test_a_key_is_what_the_draw_is():
    """Each part of it counts; the weight of the loss, and the order of draws, do not."""
    draw = Draw(Example(Picture(Path("p.png"), "0" * 64, (9, 9)), "dog", weight=0.5), Patch(0, 3, 8), 0.25, 0)
    assert DrawKey.of(draw) == key(0)
    changed = [key(1), key(0, crop=(0, 3, 9)), key(0, timestep=0.5), key(0, noise_seed=1), key(0, prompt="cat")]
    assert len({k.digest for k in [key(0), *changed]}) == 6
    assert re.fullmatch("[0-9a-f]{64}", key(0).digest)


def test_records_come_back_by_key(tmp_path):
    store = ResidualStore.create(tmp_path, SETTINGS, shard_bytes=300)  # 128 bytes a record: two in a file
    made = records(range(5))
    store.add(made)
    assert len(list(tmp_path.glob("records-*.safetensors"))) == 3
    for opened in (store, ResidualStore.open(tmp_path, SETTINGS)):
        assert len(opened) == 5
        assert opened.missing([key(7), key(3), key(7)]) == [key(7)]
        batch = opened.read([key(3), key(0), key(3)])
        assert batch.keys() == {"a.0-1", "b.2-2"}
        for run, streams in batch.items():
            for place, stream in enumerate(streams):
                rows = [made[key(n)][run][place] for n in (3, 0, 3)]
                assert (stream is None and rows == [None] * 3) or torch.equal(stream, torch.cat(rows))
    with pytest.raises(UserError, match=r"lacks 1 of these 2 draws, the first of picture 0000.* at t = 0.25"):
        store.read([key(0), key(9)])


def test_what_is_there_is_not_written_again(tmp_path):
    store = ResidualStore.create(tmp_path, SETTINGS)
    store.add(records([1, 2]))
    before = content(tmp_path)
    store.add(records([2, 1], generator=9))
    assert content(tmp_path) == before
    store.add({})
    again = ResidualStore.create(tmp_path, SETTINGS)
    again.add(records([2, 3]))
    assert len(again) == 3
    assert before.items() < content(tmp_path).items()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_records_are_in_the_dtype_asked_for(tmp_path, dtype):
    store = ResidualStore.create(tmp_path, SETTINGS | {"dtype": dtype})
    made = records([1])
    store.add(made)
    (stream,) = store.read([key(1)])["b.2-2"]
    assert stream.dtype == getattr(torch, dtype)
    assert torch.equal(stream, made[key(1)]["b.2-2"][0].to(stream.dtype))


def test_one_flipped_byte_anywhere_is_refused(tmp_path):
    """Of every byte of a file: its length, its head, keys and checksums in it, and the records."""
    ResidualStore.create(tmp_path, SETTINGS).add(records([1, 2]))
    (path,) = tmp_path.glob("records-*.safetensors")
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) == head + 2 * 128
    for place in [*range(8), *range(8, head, 7), *range(head, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if place < head:
            with pytest.raises(UserError, match=rf"{path.name} is damaged: its head .* Delete this file and make"):
                ResidualStore.open(tmp_path, SETTINGS)
        else:
            store = ResidualStore.open(tmp_path, SETTINGS)
            hit = [n for n in (1, 2) if not reads(store, key(n))]
            assert len(hit) == 1, place
            with pytest.raises(UserError, match=rf"{path.name} .* record {key(hit[0]).digest[:12]}... is not what was"):
                store.read([key(hit[0])])
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"is damaged: record .* cannot be read"):
        ResidualStore.open(tmp_path, SETTINGS).read([key(1)])
    path.write_bytes(whole)
    path.rename(tmp_path / f"records-00000-{'0' * 16}.safetensors")
    with pytest.raises(UserError, match="is damaged: its head"):
        ResidualStore.open(tmp_path, SETTINGS)


def reads(store, draw) -> bool:
    try:
        store.read([draw])
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "0" * 64}, r"another base model: base is 'f+' there and '0+' here"),
        ({"prompt": {"text": "a cat"}}, r"other settings: prompt.text is 'a sks dog' there and 'a cat' here"),
        ({"resolution": 256}, r"other settings: resolution is not set there and 256 here"),
        ({"runs": ["blocks.0-3"]}, r"runs is \['transformer_blocks.0-0'\] there and \['blocks.0-3'\] here"),
        ({"prompt": {"text": "a cat"}, "base": "1"}, r"another base model: base"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    ResidualStore.create(tmp_path, SETTINGS)
    for opening in (ResidualStore.open, ResidualStore.create):
        with pytest.raises(UserError, match=message + ".*Choose another folder"):
            opening(tmp_path, SETTINGS | changes)
    assert len(ResidualStore.open(tmp_path, SETTINGS)) == 0


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no residual store in"):
        ResidualStore.open(tmp_path / "nowhere", SETTINGS)
    (tmp_path / "holiday.png").touch()
    with pytest.raises(UserError, match="is not empty and holds no residual store"):
        ResidualStore.create(tmp_path, SETTINGS)
    for text in ("{", "[]", '{"format": "other"}', json.dumps({"format": "skipwise-residuals/1"})):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(UserError, match=r"store.json cannot be read: .* make the records again"):
            ResidualStore.open(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="lack 'base'"):
        ResidualStore.create(tmp_path / "new", {"dtype": "float32"})
    with pytest.raises(UserError, match="dtype is 'int8'; legal are bfloat16, float32"):
        ResidualStore.create(tmp_path / "new", SETTINGS | {"dtype": "int8"})


def test_batches_of_different_shapes_are_refused(tmp_path):
    store = ResidualStore.create(tmp_path, SETTINGS)
    store.add({key(1): {"a.0-1": (torch.ones(1, 3, 4),)}, key(2): {"a.0-1": (torch.ones(1, 5, 4),)}})
    with pytest.raises(UserError, match=r"different shapes \[\(3, 4\), \(5, 4\)\] make no batch"):
        store.read([key(1), key(2)])


@pytest.mark.parametrize("row", ["sd3", "flux", "flux2", "sana"])
def test_stored_records_are_those_of_a_whole_forward(row, tmp_path):
    """Through the store into the hollow model: the prediction of the whole model."""
    model = IMAGE[row]()
    contract, of = find_contract(model), sample_of(model)
    train = {name: [1, 2] for name in contract.stacks}
    runs = skipped_runs(contract, train)
    store = ResidualStore.create(tmp_path, SETTINGS)
    keys = [key(n, timestep=n / 8) for n in range(3)]
    fill_store(store, keys, of, model, runs, Resident(model))
    shapes = shapes_of(model, of(keys[0]), runs, Resident(model))
    batch = [keys[2], keys[0]]
    record = store.read(batch)
    for run in runs:
        rows = [hooked_record(model, runs, of(k))[run.name] for k in batch]
        for place, shape in enumerate(shapes[run.name]):
            expected = None if shape is None else torch.cat([row[place] for row in rows])
            found = record[run.name][place]
            assert (found is None and expected is None) or torch.equal(found, expected)
    with hollow(model, Plan(model=contract.shape, train=dict.fromkeys(contract.stacks, (1, 2)))) as shell:
        shell.feed(store.read([keys[1]]))
        hollow_output = output(model, of(keys[1]))
    assert torch.allclose(hollow_output, output(model, of(keys[1])), rtol=1e-4, atol=1e-4)


def test_on_the_fly_reads_what_a_store_reads(sd3, tmp_path):
    keys = [key(n) for n in range(3)]
    store = ResidualStore.create(tmp_path, SETTINGS | {"dtype": "bfloat16"})
    fill(store, keys, sd3)
    live = OnTheFly(sd3, sample_of(sd3), runs_of(sd3), Resident(sd3), dtype=torch.bfloat16)
    assert live.missing(keys) == []
    assert {id(p) for p in live.model.parameters()} == {id(p) for p in sd3.parameters()}
    plan = Plan(model=find_contract(sd3).shape, train={"transformer_blocks": (1,)})
    with hollow(sd3, plan) as shell:  # the base is whole, while the model in training is not
        found = live.read(keys[::-1])
        shell.feed(found)
    stored = store.read(keys[::-1])
    assert found.keys() == stored.keys()
    for run in found:
        for mine, theirs in zip(found[run], stored[run], strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("row", ["sd3", "flux", "sana"])
def test_the_size_is_known_before(row, tmp_path):
    """To the byte, of the tensors; a file's head is below what is allowed for."""
    model = IMAGE[row]()
    said: list[StoreSize] = []
    loaded: list[str] = []
    runs = skipped_runs(find_contract(model), TRAIN)
    for dtype in ("float32", "bfloat16"):
        store = ResidualStore.create(tmp_path / dtype, SETTINGS | {"dtype": dtype})
        fill_store(
            store,
            [key(n) for n in range(4)],
            sample_of(model),
            model,
            runs,
            Resident(model),
            announce=lambda size: said.append(size) or loaded.clear(),
            on_block=loaded.append,
        )
        (path,) = (tmp_path / dtype).glob("records-*.safetensors")
        head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert said[-1].bytes == path.stat().st_size - head
        said[-1].check(tmp_path, usage(said[-1].bytes + 4 * (4096 + 256 * said[-1].tensors)))
        assert head < 4 * (4096 + 256 * said[-1].tensors)
        assert loaded
    assert said[0].bytes == 2 * said[1].bytes
    assert str(StoreSize(1000, 6 << 20, 3)) == "1000 draws of 6.00 MiB, 5.86 GiB in all"
    assert size_of({"a": (torch.Size([1, 3, 4]), None)}, 2, torch.bfloat16) == StoreSize(2, 24, 1)
    with pytest.raises(UserError, match="a batch of 2"):
        size_of({"a": (torch.Size([2, 3, 4]),)}, 2, torch.bfloat16)


Usage = namedtuple("Usage", ["free"])


def usage(free):
    return lambda folder: Usage(free)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(sd3, tmp_path):
    store = ResidualStore.create(tmp_path, SETTINGS)
    blocks = Resident(sd3)
    said: list[StoreSize] = []
    with pytest.raises(UserError, match=r"\(4 draws of .* do not fit: .* has 0.00 GiB free. Free some space"):
        fill_store(
            store,
            [key(n) for n in range(4)],
            sample_of(sd3),
            sd3,
            runs_of(sd3),
            blocks,
            announce=said.append,
            usage=usage(1000),
        )
    assert len(said) == 1
    assert not blocks.opened
    assert not len(store)


def test_a_full_disk_leaves_what_was_made(tmp_path, monkeypatch):
    store = ResidualStore.create(tmp_path, SETTINGS)
    store.add(records([1]))
    before = content(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipwise.finetuning.residuals.save_file", full)
    with pytest.raises(UserError, match=r"Cannot write in .*No space left on device. What is there stays"):
        store.add(records([2]))
    assert content(tmp_path) == before
    assert store.missing([key(1), key(2)]) == [key(2)]


def test_passes_read_each_block_once(sd3, tmp_path):
    """As many draws as host memory allows pass through the blocks together, whole files of them."""
    blocks = Resident(sd3)
    keys = [key(n) for n in range(7)]
    size = size_of(shapes_of(sd3, sample_of(sd3)(keys[0]), runs_of(sd3), blocks), 7, torch.float32)
    store = ResidualStore.create(tmp_path, SETTINGS, shard_bytes=2 * size.record_bytes)
    fill_store(store, keys, sample_of(sd3), sd3, runs_of(sd3), blocks, host_bytes=5 * 3 * size.record_bytes)
    assert set(blocks.opened.values()) == {2}  # 4 draws and 3, not 5 and 2
    assert len(list(tmp_path.glob("records-*"))) == 4
    fill_store(store, keys, sample_of(sd3), sd3, runs_of(sd3), blocks)
    assert set(blocks.opened.values()) == {2}


KILLED = """
import os, signal, sys
import tests.conftest  # one thread, as here: their number may change the last bits
from skipwise.finetuning.residuals import ResidualStore
from tests.test_residuals import SETTINGS, fill, key
from tests.tiny_models import IMAGE

replace, renamed = os.replace, []

def killing(source, target):
    renamed.append(target)
    if len(renamed) == 3:  # store.json, a file of records, and in the middle of the next
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killing
model = IMAGE["sd3"]()
fill(ResidualStore.create(sys.argv[1], SETTINGS, shard_bytes=10_000), [key(n) for n in range(5)], model)
"""


def test_a_killed_making_goes_on_where_it_ended(sd3, tmp_path):
    """kill -9 while a file is written; then the store is, byte for byte, that of a making that was let be."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(killed)], env=environment, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = content(killed)
    assert any(name.startswith(PARTIAL) for name in left)
    keys = [key(n) for n in range(5)]
    store = ResidualStore.open(killed, SETTINGS)
    assert 0 < len(store) < 5
    store = ResidualStore.create(killed, SETTINGS, shard_bytes=10_000)
    assert store.missing(keys) == keys[len(store) :]
    fill(store, keys, sd3)
    uninterrupted = ResidualStore.create(whole, SETTINGS, shard_bytes=10_000)
    fill(uninterrupted, keys, sd3)
    assert content(killed) == content(whole)
    assert len(content(whole)) > 3
    made = {name: left[name] for name in left if name.startswith("records-")}
    assert made.items() <= content(killed).items()
