"""Killed at any moment, every writer leaves the older or the newer, whole; and the next one clears up behind it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import skipwise as sw
from skipwise.analysis import Comparison
from skipwise.analysis.record import Analysis
from skipwise.checkpoints import Checkpoint
from skipwise.errors import UserError
from skipwise.files import PARTIAL, partial_file, partial_folder, remove_partials, write_bytes_atomically
from skipwise.finetuning.residuals import ResidualStore
from skipwise.plan import ModelShape, Plan
from tests.crashes import content, crash_points
from tests.test_residuals import SETTINGS, records
from tests.tiny_models import ROWS

SHAPE = ModelShape(architecture="Toy", stacks={"blocks": 4}, hidden_size=2)


@dataclass
class Writer:
    """older, newer: write into a folder. state: what a reader finds there, which must be that of one of the two."""

    older: Callable[[Path], object]
    newer: Callable[[Path], object]
    state: Callable[[Path], Any]


def adapter(folder: Path, value: float) -> Path:
    """A folder that looks like an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(f'{{"alpha": {value}}}')
    (folder / "adapter_model.safetensors").write_bytes(bytes([int(value)]) * 64)
    return folder


def plan(value: float, stand_ins: bool = True, healed: bool = True) -> Callable[[Path], object]:
    def write(folder: Path) -> object:
        made = Plan.static(SHAPE, {"blocks": [int(value)]})
        if stand_ins:
            made = made.with_stand_ins("constant", {"0/blocks/1": torch.full((2,), value)})
        if healed:
            made = made.with_adapter(adapter(folder.parent / f"adapter-{value:g}", value))
        return made.save(folder / "plan.json")

    return write


def plan_state(folder: Path) -> Any:
    found = Plan.load(folder / "plan.json")
    healed = found.adapter_folder()
    tensors = {name: tensor.tolist() for name, tensor in found.stand_in_tensors().items()}
    return found.phases, tensors, healed and content(healed)


def analysis(value: float) -> Callable[[Path], object]:
    tensors = {"blocks/similarity": torch.full((5, 5), value, dtype=torch.float64)}
    tensors["blocks/block_flops"] = torch.ones(4, dtype=torch.float64)
    return lambda folder: Analysis(f"{value}", SHAPE, "encoder", tensors).save(folder)


def analysis_state(folder: Path) -> Any:
    found = Analysis.load(folder)
    return found.name, float(found.tensors["blocks/similarity"][0, 0])


def comparison(value: float) -> Callable[[Path], object]:
    tensors = {"cka": torch.full((5, 5), value, dtype=torch.float64)}
    made = Comparison((f"{value}", "b"), (SHAPE, SHAPE), ("encoder", "encoder"), tensors)
    return made.save


def comparison_state(folder: Path) -> Any:
    found = Comparison.load(folder)
    return found.names[0], float(found.tensors["cka"][0, 0])


def run_state(step: int, save: bool) -> Callable[[Path], Any]:
    def work(folder: Path) -> Any:
        weight = nn.Parameter(torch.full((3,), float(step)))
        optimizer = torch.optim.AdamW([weight])
        checkpoint = Checkpoint(folder / "state.pt", {"settings": {"rank": 4}})
        if save:
            return checkpoint.save(step, [weight], optimizer)
        return checkpoint.resume([weight], optimizer), weight.tolist()

    return work


def store(numbers: range) -> Callable[[Path], object]:
    return lambda folder: ResidualStore.create(folder, SETTINGS, shard_bytes=10_000).add(records(numbers))


WRITERS = {
    "a plan over a plan": Writer(plan(1), plan(2), plan_state),
    "a plan over one without companions": Writer(plan(1, False, False), plan(2), plan_state),
    "a plan without an adapter over one with": Writer(plan(1), plan(2, healed=False), plan_state),
    "stand-ins over stand-ins": Writer(plan(1, healed=False), plan(2, healed=False), plan_state),
    "an analysis over an analysis": Writer(analysis(1), analysis(2), analysis_state),
    "a comparison over a comparison": Writer(comparison(1), comparison(2), comparison_state),
    "a healed plan over one with stand-ins": Writer(plan(1, healed=False), plan(2, stand_ins=False), plan_state),
    "an analysis beside a comparison": Writer(
        lambda folder: (comparison(1)(folder), analysis(1)(folder)),
        analysis(2),
        lambda folder: (analysis_state(folder), comparison_state(folder)),
    ),
    "the state of a run": Writer(run_state(1, True), run_state(2, True), run_state(0, False)),
    "bytes": Writer(
        lambda folder: write_bytes_atomically(folder / "a.txt", b"older"),
        lambda folder: write_bytes_atomically(folder / "a.txt", b"newer"),
        lambda folder: (folder / "a.txt").read_bytes(),
    ),
    "records beside records": Writer(
        store(range(3)), store(range(3, 6)), lambda folder: len(ResidualStore.open(folder, SETTINGS))
    ),
}


# those of which another one does all that they do, and more
ALIKE = ("without companions", "without an adapter", "comparison over", "one with stand-ins", "beside a comparison")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if any(part in n for part in ALIKE) else []) for n in WRITERS]
)
def test_older_or_newer(name: str, tmp_path: Path) -> None:
    writer, folder = WRITERS[name], tmp_path / "there"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        writer.older(folder)
        (folder / "a stranger's").write_text("left alone")

    prepare()
    older = writer.state(folder)
    writer.newer(folder)
    newer = writer.state(folder)
    assert older != newer
    found = []
    for _ in crash_points(prepare, lambda: writer.newer(folder)):
        found.append(writer.state(folder))
        assert found[-1] in (older, newer), f"after {len(found)} operations"
        writer.newer(folder)
        assert writer.state(folder) == newer
        left = [path.name for path in folder.iterdir() if path.name.startswith(PARTIAL) or "." * 2 in path.name]
        assert not left, "what the killed writer left is still there"
        assert (folder / "a stranger's").read_text() == "left alone"
    assert older in found
    assert found[-1] == newer
    assert len(found) > 4
    print(f"{len(found)} points of {name}")


@pytest.mark.slow
def test_an_export_is_whole_or_absent(tmp_path: Path) -> None:
    """Killed at any moment there is no folder, or the one that an export that was let be writes."""
    model = ROWS["llama"]()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    plan = Plan.static(sw.find_contract(model).shape, {"model.layers": [1]})
    target = tmp_path / "target"
    sw.export(plan, tmp_path / "source", target)
    wanted, points = content(target), 0
    for points in crash_points(
        lambda: shutil.rmtree(target, ignore_errors=True), lambda: sw.export(plan, tmp_path / "source", target)
    ):
        assert not target.exists() or content(target) == wanted, points
        shutil.rmtree(target, ignore_errors=True)
        write_bytes_atomically(tmp_path / "another writer", b"")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["another writer", "source"]
    assert points > 20


def test_a_store_that_was_killed_at_once_can_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for _ in crash_points(lambda: shutil.rmtree(folder, ignore_errors=True), lambda: store(range(2))(folder)):
        store(range(2))(folder)
        assert len(ResidualStore.open(folder, SETTINGS)) == 2


def test_what_another_writer_is_at_is_left_alone(tmp_path: Path) -> None:
    with partial_file(tmp_path) as file, partial_folder(tmp_path) as folder:
        remove_partials(tmp_path)
        assert file.exists()
        assert folder.exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / f"{PARTIAL}dead").write_text("half")
    write_bytes_atomically(tmp_path / "b", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("name", ["pipe", "folder", "link to a folder"])
def test_outputs_that_are_no_files(name: str, tmp_path: Path) -> None:
    import os

    target = tmp_path / "out"
    if name == "pipe":
        os.mkfifo(target)
    elif name == "folder":
        target.mkdir()
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    kind = os.stat(target).st_mode
    with pytest.raises(UserError, match="give the name of a file"):
        Plan.static(SHAPE, {}).save(target)
    assert os.stat(target).st_mode == kind


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    Plan.static(SHAPE, {}).save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Plan.load(tmp_path / "real.json") == Plan.static(SHAPE, {})


def test_a_disk_that_is_full_leaves_the_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    plan(1)(tmp_path)
    before = content(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        plan(2)(tmp_path)
    assert content(tmp_path) == before


def test_companions_lie_beside_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    plan(1)(tmp_path / "real")
    link = tmp_path / "best.json"
    link.symlink_to(tmp_path / "real" / "plan.json")
    assert Plan.load(link).stand_in_tensors()
    made = Plan.static(SHAPE, {"blocks": [3]}).with_stand_ins("constant", {"0/blocks/3": torch.ones(2)})
    made.save(link)
    assert link.is_symlink()
    for path in (link, tmp_path / "real" / "plan.json"):
        assert Plan.load(path).stand_in_tensors().keys() == {"0/blocks/3"}


def test_a_plan_is_written_into_a_folder_that_is_being_made(tmp_path: Path) -> None:
    """Its writer holds it: to wait for that would be for ever."""
    with partial_folder(tmp_path) as folder:
        plan(1)(folder)
        assert plan_state(folder)


def test_names_with_a_dot_have_companions_of_their_own(tmp_path: Path) -> None:
    for value, name in ((1.0, "greedy-0.25"), (2.0, "greedy-0.50"), (3.0, "greedy-0.50.json")):
        made = Plan.static(SHAPE, {"blocks": [1]})
        made.with_stand_ins("constant", {"0/blocks/1": torch.full((2,), value)}).save(tmp_path / name)
    assert float(Plan.load(tmp_path / "greedy-0.25").stand_in_tensors()["0/blocks/1"][0]) == 1


def test_two_writers_of_one_plan_leave_one_of_theirs(tmp_path: Path) -> None:
    """Each in a process of its own, again and again."""
    import os

    for _ in range(8):
        children = []
        for value in (1.0, 2.0):
            child = os.fork()
            if not child:
                try:
                    plan(value)(tmp_path / "there")
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        assert plan_state(tmp_path / "there")[1]["0/blocks/1"][0] in (1.0, 2.0)
