"""A fine-tuning from end to end: on tiny pipelines, in all late modes, killed and resumed, wrong in every way."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from skipwise.errors import UserError
from skipwise.finetuning.finetune import Subject, Work, finetune
from skipwise.finetuning.lora import load_lora
from skipwise.finetuning.selection import select_blocks
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.shards import Shards
from skipwise.finetuning.train import TrainingSettings, read_log
from skipwise.plan import Plan
from tests.tiny_pipelines import PROMPT, ROWS, save

SIDE = 32
SETTINGS = FinetuneSettings(resolution=2 * SIDE, patch=SIDE, rank=2, dtype="float32", late="residual")
TRAINING = TrainingSettings(steps=4, draws=2, learning_rate=1e-2, checkpoint_every=2)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Row -> the folder of its saved pipeline, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def get(row):
        if row not in made:
            made[row] = folder / row
            save(row, made[row])
        return str(made[row])

    return get


@pytest.fixture
def subject(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(2):
        pixels = noise.integers(0, 255, (2 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return Subject(folder, PROMPT)


def plan_of(name, late=True):
    """Trains the middle of the longest stack; with `late` its last block is skipped."""
    contract = Shards.open(name).contract
    main = contract.main_stack
    return Plan(model=contract.shape, train={main: tuple(range(1, contract.stacks[main].length - int(late)))})


def tensors(path):
    return load_file(path)


@pytest.mark.parametrize("row", ROWS)
def test_every_family_trains_and_its_stock_pipeline_loads_the_adapter(row, pipelines, subject, tmp_path):
    name = pipelines(row)
    path = finetune(name, subject, tmp_path / "out", plan_of(name), SETTINGS, TRAINING, device="cpu")
    log = read_log(tmp_path / "out" / "train.jsonl")
    assert [line["step"] for line in log] == [2, 4]
    assert all(line["loss"] > 0 and line["seconds_a_step"] > 0 for line in log)
    parts = log[-1]["peak_by_part"]
    assert log[-1]["peak_bytes"] == sum(parts.values())
    assert min(parts["weights"], parts["lora"], parts["optimiser"], parts["activations"]) > 0
    # the text side of the last trained block may lead nowhere
    learnt = [
        t for key, t in tensors(path).items() if key.endswith("attn.to_q.lora_B.weight") or "attn2.to_q.lora_B" in key
    ]
    assert learnt
    assert all(tensor.abs().max() > 0 for tensor in learnt)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(name)
    before = pipeline(PROMPT, **_small(row)).images
    load_lora(pipeline, tmp_path / "out")
    assert (pipeline(PROMPT, **_small(row)).images - before).abs().max() > 0
    assert Plan.load(tmp_path / "out" / "plan.json").train == plan_of(name).train
    assert not (tmp_path / "out" / "state.pt").exists()


def _small(row):
    return {
        "height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **({} if row in ("flux", "sd3") else {"use_resolution_binning": False}),
    }  # fmt: skip


@pytest.mark.parametrize("late", ["frozen", "streamed", "none"])
def test_exact_late_modes_learn_what_lora_on_the_same_blocks_learns(late, pipelines, subject, tmp_path):
    """Ordinary LoRA on these blocks is the model with nothing taken out."""
    name = pipelines("flux")
    plan = plan_of(name, late=late != "none")
    settings = replace(SETTINGS, late=late)
    found = tensors(finetune(name, subject, tmp_path / late, plan, settings, TRAINING, device="cpu"))
    wanted = _ordinary(name, subject, plan, tmp_path)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].allclose(tensor, rtol=1e-3, atol=1e-5), key


def test_paper_mode_trains_on_stored_residuals(pipelines, subject, tmp_path):
    """The store is made once; a run from the same store, and one whose records are made on the fly, learn the same."""
    name = pipelines("flux")
    stored = tensors(finetune(name, subject, tmp_path / "stored", plan_of(name), SETTINGS, TRAINING, device="cpu"))
    files = list((tmp_path / "stored" / "residuals").glob("records-*"))
    assert files
    (tmp_path / "stored" / "train.jsonl").unlink()
    times = [path.stat().st_mtime_ns for path in files]
    again = tensors(finetune(name, subject, tmp_path / "stored", plan_of(name), SETTINGS, TRAINING, device="cpu"))
    assert [path.stat().st_mtime_ns for path in files] == times
    assert all(again[key].equal(tensor) for key, tensor in stored.items())
    fresh = replace(TRAINING, draws=0)  # two pictures, four steps: the same two draws of each
    flying = tensors(finetune(name, subject, tmp_path / "flying", plan_of(name), SETTINGS, fresh, device="cpu"))
    assert not (tmp_path / "flying" / "residuals").exists()
    assert all(flying[key].allclose(tensor, rtol=1e-4, atol=1e-6) for key, tensor in stored.items())


def test_records_on_the_fly_are_those_of_the_store_in_bfloat16(pipelines, subject, tmp_path):
    """In reduced precision too they are made as stored ones are."""
    name, half = pipelines("flux"), replace(SETTINGS, dtype="bfloat16")
    stored, flying = (
        tensors(finetune(name, subject, tmp_path / str(draws), plan_of(name), half, settings, device="cpu"))
        for draws in (2, 0)
        for settings in [replace(TRAINING, draws=draws)]
    )
    assert all(flying[key].equal(tensor) for key, tensor in stored.items())


def test_what_was_prepared_with_other_settings_is_not_used(pipelines, subject, tmp_path):
    name, other = pipelines("flux"), replace(SETTINGS, resolution=32, patch=16)
    finetune(name, subject, tmp_path, None, SETTINGS, TRAINING, device="cpu", stop_after=1)
    assert (tmp_path / "prepared.safetensors").exists()
    work = Work.begin(name, subject, tmp_path, None, other, TRAINING, "cpu", None)  # the same crops, resized to less
    sides = {latents.shape[-1] for latents in work.prepared().latents.values()}
    assert sides == {8}
    (tmp_path / "prepared.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="delete it, and it is made anew"):
        work.prepared()


def test_less_is_in_memory_when_blocks_are_skipped_and_crops_are_small(pipelines, subject, tmp_path):
    """What is measured falls as what is estimated does: the skipped blocks' weights and activations are not there."""
    name = pipelines("flux")
    whole = replace(SETTINGS, patch=None)
    finetune(name, subject, tmp_path / "whole", None, whole, TRAINING, device="cpu")
    finetune(name, subject, tmp_path / "less", plan_of(name), SETTINGS, TRAINING, device="cpu")
    most, least = (read_log(tmp_path / run / "train.jsonl")[-1]["peak_by_part"] for run in ("whole", "less"))
    assert least["weights"] < 0.6 * most["weights"]
    assert least["activations"] < 0.6 * most["activations"]


def test_a_run_that_ends_early_goes_on_to_the_same_end(pipelines, subject, tmp_path):
    name, plan = pipelines("flux"), None
    whole = tensors(finetune(name, subject, tmp_path / "whole", plan, SETTINGS, TRAINING, device="cpu"))
    finetune(name, subject, tmp_path / "cut", plan, SETTINGS, TRAINING, device="cpu", stop_after=3)
    assert (tmp_path / "cut" / "state.pt").exists()
    assert not list((tmp_path / "cut").glob("*lora*"))
    other = replace(TRAINING, learning_rate=1.0)
    with pytest.raises(UserError, match="is of a run that differs in training; delete it"):
        finetune(name, subject, tmp_path / "cut", plan, SETTINGS, other, device="cpu")
    cut = tensors(finetune(name, subject, tmp_path / "cut", plan, SETTINGS, TRAINING, device="cpu"))
    assert all(cut[key].equal(tensor) for key, tensor in whole.items())
    assert [line["step"] for line in read_log(tmp_path / "cut" / "train.jsonl")] == [2, 4]


def test_prior_preservation_takes_pictures_of_the_class_into_every_batch(pipelines, subject, tmp_path):
    both = replace(subject, class_images=subject.images)
    training = replace(TRAINING, prior_weight=0.25)
    work = Work.begin(pipelines("flux"), both, tmp_path / "out", None, SETTINGS, training, "cpu", None)
    mine, others = work.groups
    assert {draw.example.prompt for draw in mine} == {PROMPT}
    assert {draw.example.prompt for draw in others} == {"a photo of dog"}
    assert {draw.example.weight for draw in others} == {0.25}
    with_prior = finetune(pipelines("flux"), both, tmp_path / "out", None, SETTINGS, training, device="cpu")
    without = finetune(pipelines("flux"), subject, tmp_path / "plain", None, SETTINGS, training, device="cpu")
    assert any(not tensors(with_prior)[key].equal(tensor) for key, tensor in tensors(without).items())


def test_the_loss_of_the_class_is_weighted(pipelines, subject, tmp_path):
    """Of the first step, which is that of the base model: linear in the weight, and the subject's alone at zero."""
    both, losses = replace(subject, class_images=subject.images), {}
    for weight in (0.0, 0.25, 1.0):
        training = replace(TRAINING, prior_weight=weight, steps=1, checkpoint_every=1)
        output = tmp_path / str(weight)
        finetune(pipelines("flux"), both, output, None, SETTINGS, training, device="cpu")
        losses[weight] = read_log(output / "train.jsonl")[0]["loss"]
    alone = replace(TRAINING, steps=1, checkpoint_every=1)
    finetune(pipelines("flux"), subject, tmp_path / "alone", None, SETTINGS, alone, device="cpu")
    assert losses[0.0] == pytest.approx(read_log(tmp_path / "alone" / "train.jsonl")[0]["loss"] / 2)  # a mean over two
    assert losses[1.0] > 1.2 * losses[0.0]
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0])


def test_the_learning_rate_rises_over_the_warmup(pipelines, subject, tmp_path):
    """AdamW's first step is as long as the learning rate, from weights B that are zero."""
    assert [TrainingSettings(learning_rate=1.0, warmup=3).rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    plan = plan_of(pipelines("flux"))
    for warmup, rate in ((0, 1e-2), (3, 2.5e-3)):
        training = replace(TRAINING, steps=1, warmup=warmup)
        path = finetune(pipelines("flux"), subject, tmp_path / str(warmup), plan, SETTINGS, training, device="cpu")
        steps = [tensor.abs().max() for key, tensor in tensors(path).items() if "to_q.lora_B" in key]
        assert max(steps) == pytest.approx(rate, rel=0.02)


def test_crops_keep_their_places_where_the_model_has_any(pipelines, subject, tmp_path):
    keep = replace(TRAINING, place="keep")
    finetune(pipelines("flux"), subject, tmp_path / "flux", None, SETTINGS, keep, device="cpu")
    with pytest.raises(UserError, match="cannot be told where a crop lies"):
        finetune(pipelines("sana"), subject, tmp_path / "sana", None, SETTINGS, keep, device="cpu")
    two = replace(SETTINGS, batch=2)
    with pytest.raises(UserError, match="at batch 1 only"):
        finetune(pipelines("flux"), subject, tmp_path / "two", None, two, keep, device="cpu")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was(pipelines, subject, tmp_path):
    wild = replace(TRAINING, learning_rate=1e30, clip=1e30)
    with pytest.raises(UserError, match=r"The loss is (nan|inf) at step \d"):
        finetune(pipelines("flux"), subject, tmp_path / "out", None, SETTINGS, wild, device="cpu")
    assert not list((tmp_path / "out").glob("*lora*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "a photo of a dog"}, "lacks the subject token 'sks'"),
        ({"images": "nowhere"}, "There is no folder"),
        ({"settings": replace(SETTINGS, patch=30)}, "Resolution 30 does not suit FLUX"),
        ({"settings": replace(SETTINGS, late="none")}, "trains the last blocks"),
        ({"settings": replace(SETTINGS, optimiser="adamw8bit")}, "needs bitsandbytes"),
        ({"settings": replace(SETTINGS, targets=("to_x",))}, "to_x"),
        ({"training": replace(TRAINING, place="keep"), "settings": replace(SETTINGS, batch=2)}, "at batch 1 only"),
        ({"model": "sd3"}, "made for a model with"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(wrong, message, pipelines, subject, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    wrong = dict(wrong)
    name = pipelines(wrong.pop("model", "flux"))
    settings, training = wrong.pop("settings", SETTINGS), wrong.pop("training", TRAINING)
    wrong = {key: Path(value) if key == "images" else value for key, value in wrong.items()}
    with pytest.raises(UserError, match=message):
        finetune(name, replace(subject, **wrong), tmp_path / "out", plan_of(pipelines("flux")), settings, training)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"draws": -1}, "draws is -1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"place": "left"}, "Unknown place of crops 'left'"),
    ],
)
def test_training_settings_are_checked(wrong, message):
    with pytest.raises(UserError, match=message):
        TrainingSettings(**wrong)


def _ordinary(name, subject, plan, tmp_path):
    """The plain twin: the whole pipeline in memory, LoRA on the plan's blocks, the same batches."""
    from skipwise.finetuning.lora import add_lora, lora_targets
    from skipwise.finetuning.train import Samples, batch_of

    work = Work.begin(name, subject, tmp_path / "twin", plan, SETTINGS, TRAINING, "cpu", None)
    model = diffusers.DiffusionPipeline.from_pretrained(name).transformer
    samples = Samples(work.family, model, work.prepared(), SETTINGS)
    with torch.random.fork_rng():
        torch.manual_seed(TRAINING.seed)
        weights = add_lora(model, lora_targets(model, plan.train, SETTINGS.targets), SETTINGS.rank, torch.float32)
    optimizer = torch.optim.AdamW(weights, lr=TRAINING.learning_rate)
    for step in range(TRAINING.steps):
        batch = samples(batch_of(work.groups[0], step, 1, TRAINING.seed))
        output = model(**batch.inputs, return_dict=False)
        prediction = work.family.prediction(output, batch.latents)
        work.family.loss(prediction, batch.latents, batch.noise, batch.t).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, TRAINING.clip)
        optimizer.step()
        optimizer.zero_grad()
    named = {n.replace(".default.", "."): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {f"transformer.{n}": p for n, p in named.items()}


def test_the_command_line_trains_draws_and_says_what_is_wrong(pipelines, subject, tmp_path, skipwise):
    small = ["--set", "dtype=float32", "--set", "rank=2", "--set", "draws=2", "--resolution", "64", "--patch", "32"]
    command = ["finetune", pipelines("flux"), "--images", subject.images, "--prompt", PROMPT, *small]
    output = tmp_path / "out"
    code, _, error = skipwise(
        *command, "--blocks", "3", "--steps", "2", "-o", output, "--device", "cpu", "--validate", PROMPT
    )
    assert code == 0, error
    assert (output / "pytorch_lora_weights.safetensors").exists()
    assert Image.open(output / "validation" / "0.png").size == (64, 64)
    assert sum(map(len, Plan.load(output / "plan.json").train.values())) == 3
    for wrong, message in [
        (["--blocks", "3", "--memory", "8GiB"], "Give either --blocks or --memory"),
        (["--set", "drows=3"], "Unknown setting of a fine-tuning 'drows'. Did you mean 'draws'?"),
        (["--subject", "dag"], "lacks the subject token 'dag'"),
        (["--blocks", "3", "--rule", "best"], "Unknown rule 'best'"),
    ]:
        code, _, error = skipwise(*command, *wrong)
        assert code == 2
        assert message in error


def test_a_dry_run_needs_no_weights_and_finds_what_fits(skipwise):
    code, shown, error = skipwise("finetune", "sana-1.6b", "--dry-run", "--blocks", "50%", "--patch", "256")
    assert code == 0, error
    assert "estimated peak" in shown
    code, shown, _ = skipwise("finetune", "sana-1.6b", "--dry-run", "--memory", "3GiB")
    assert "fits your 3 GiB card with these settings" in " ".join(shown.split())
    assert skipwise("finetune", "sana-1.6b", "--dry-run", "--memory", "1MiB")[0] == 2


@pytest.mark.parametrize("row", ROWS)
def test_blocks_are_chosen_by_the_subjects_words(row, pipelines, subject):
    name = pipelines(row)
    settings = replace(SETTINGS, text_tokens=77 if row == "sd3" else 32)
    plan = select_blocks(name, 2, "vital", subject, settings)
    assert sum(map(len, plan.train.values())) == 2
    assert plan.made_by.scores
    assert select_blocks(name, 2, "vital", subject, settings) == plan
    middle = select_blocks(name, 2, "middle")
    assert not middle.made_by.scores


KILLED = """
import sys
from pathlib import Path
from tests.test_finetune import SETTINGS, TRAINING, Subject, finetune, plan_of
from tests.tiny_pipelines import PROMPT
name, pictures, output = sys.argv[1:]
subject, tell = Subject(Path(pictures), PROMPT), lambda *how: print(*how, flush=True)
finetune(name, subject, output, plan_of(name), SETTINGS, TRAINING, device="cpu", on_progress=tell)
"""


def test_kill_9_and_resume_equal_an_uninterrupted_run(pipelines, subject, tmp_path):
    """Killed while residuals are made, then while it trains; nothing is left half-written, and the end is the same."""
    name, output = pipelines("flux"), tmp_path / "killed"
    for moment in ("make residuals 2", "train"):
        _kill_at(moment, name, subject, output)
        assert not list(output.glob("*lora*"))
    killed = tensors(finetune(name, subject, output, plan_of(name), SETTINGS, TRAINING, device="cpu"))
    whole = tensors(finetune(name, subject, tmp_path / "whole", plan_of(name), SETTINGS, TRAINING, device="cpu"))
    assert all(killed[key].equal(tensor) for key, tensor in whole.items())


def _kill_at(moment, name, subject, output):
    command = [sys.executable, "-c", KILLED, name, str(subject.images), str(output)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ, cwd=Path(__file__).parents[1]
    )
    for line in process.stdout:
        if line.startswith(moment):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
