"""A dry run refuses what a run refuses, with the same line, and both before anything is encoded."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from skipwise.blocks import find_contract
from skipwise.errors import UserError
from skipwise.finetuning import finetune as finetuning
from skipwise.finetuning.families import FAMILIES
from skipwise.finetuning.family import Family
from skipwise.finetuning.finetune import Subject, Work, finetune
from skipwise.finetuning.memory.estimate import Estimator
from skipwise.finetuning.pipelines import load_pipeline
from skipwise.finetuning.prepare import load_family
from skipwise.finetuning.selection import select_blocks
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.train import TrainingSettings
from skipwise.plan import Plan
from tests.tiny_models import IMAGE
from tests.tiny_pipelines import PROMPT, ROWS, pipeline, save

SETTINGS = FinetuneSettings(resolution=32, rank=2, dtype="float32")
TRAINING = TrainingSettings(steps=2, draws=2)
SMALL = ["--resolution", "32", "--steps", "1", "--set", "dtype=float32", "--set", "draws=1", "--set", "rank=2"]
Change = Callable[[Path, dict[str, Any]], None]  # of a pipeline's folder and its model_index.json


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda row: save(row, tmp_path_factory.mktemp(row) / row))


@pytest.fixture
def changed(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str, Change], Path]:
    """A copy of a row's pipeline, with one thing changed."""

    def change(row: str, how: Change) -> Path:
        folder = tmp_path / row
        shutil.copytree(saved(row), folder)
        index = json.loads((folder / "model_index.json").read_text())
        how(folder, index)
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return change


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def nothing(folder: Path, index: dict[str, Any]) -> None:
    """As it is."""


def null(*names: str) -> Change:
    """Saved without these components, as diffusers writes it."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        for name in names:
            index[name] = [None, None]
            shutil.rmtree(folder / name)

    return change


def of_class(name: str) -> Change:
    return lambda folder, index: index.update(_class_name=name)


def transformer(**changes: Any) -> Change:
    """Another transformer of the class, with these changes of its config."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        kind = getattr(diffusers, index["transformer"][1])
        config = {n: v for n, v in kind.load_config(folder / "transformer").items() if not n.startswith("_")}
        torch.manual_seed(0)
        shutil.rmtree(folder / "transformer")
        kind(**config | changes).save_pretrained(folder / "transformer")

    return change


def config(part: str, **changes: Any) -> Change:
    def change(folder: Path, index: dict[str, Any]) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(part: str, how: Callable[[Path], Any]) -> Change:
    return lambda folder, index: how(next((folder / part).glob("*.safetensors")))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def without_first_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def other_transformer(folder: Path, index: dict[str, Any]) -> None:
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    shutil.rmtree(folder / "transformer")
    IMAGE["sd3"]().save_pretrained(folder / "transformer")


def variant(*parts: str) -> Change:
    """These components hold the fp16 variant of their weights alone."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        for part in parts:
            for path in (folder / part).glob("*.safetensors"):
                path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))

    return change


# what is wrong -> row, change of the pipeline, more of the command line, what is said
MISTAKES: dict[str, tuple[str, Change, list[str], str]] = {
    "pipeline": ("flux", of_class("FluxFillPipeline"), [], "Unknown pipeline for fine-tuning 'FluxFillPipeline'"),
    "channels": ("flux", transformer(in_channels=96, out_channels=16), [], "96 input channels, where FLUX makes 16"),
    "channels of SD3": ("sd3", transformer(in_channels=9), [], "takes 9 input channels, where SD3 makes 4"),
    "transformer": ("flux", other_transformer, [], "FluxPipeline denoises with a FluxTransformer2DModel"),
    "quantised": ("flux", config("transformer", quantization_config={"quant_method": "bitsandbytes"}), [],
                  "is quantised (bitsandbytes), and fine-tuning"),
    "Sprint": ("sana", transformer(guidance_embeds=True), [], "is SANA-Sprint"),
    "pickle": ("flux", weights("vae", lambda path: path.rename(path.with_suffix(".bin"))), [], "only as pickle"),
    "damaged": ("flux", weights("transformer", cut), [], "damaged or cut short"),
    "tensor": ("flux", weights("transformer", without_first_tensor), [], "lacks "),
    "shape": ("flux", config("transformer", num_attention_heads=1), [], "in shape"),
    "null": ("flux", null("text_encoder_2", "tokenizer_2"), [], "saved without its text_encoder_2, which"),
    "null T5": ("pixart", null("text_encoder", "tokenizer"), [], "saved without its text_encoder, which"),
    "null VAE": ("sana", null("vae"), [], "saved without its vae"),
    "no tokenizer": ("sd3", null("tokenizer_3"), [], "saved without its tokenizer_3"),
    "config": ("flux", lambda folder, index: (folder / "vae" / "config.json").unlink(), [], "has no vae/config.json"),
    "resolution": ("flux", nothing, ["--resolution", "30"], "30 does not suit FLUX; take a multiple of 4: 32"),
    "positions": ("sd3", nothing, ["--resolution", "4096"], "is more than this SD3 has positions for"),
    "patch": ("flux", nothing, ["--patch", "64"], "Patches of 64 px do not fit"),
    "blocks": ("flux", nothing, ["--blocks", "99"], "Cannot train 99 blocks"),
    "rule": ("flux", nothing, ["--blocks", "2", "--rule", "best"], "Unknown rule 'best'"),
    "rule alone": ("flux", nothing, ["--rule", "vital"], "Rule vital chooses some of the blocks; say how many"),
    "plan": ("flux", nothing, ["--plan", "PLAN"], "This plan was made for a model with"),
    "late": ("flux", nothing, ["--blocks", "1", "--rule", "middle", "--set", "late=none"], "trains the last blocks"),
    "targets": ("flux", nothing, ["--set", 'targets=["to_x"]'], "no linear layer that ends in to_x"),
    "place": ("sana", nothing, ["--set", "place=keep"], "cannot be told where a crop lies"),
    "guidance": ("sd3", nothing, ["--set", "guidance=1.0"], "This SD3 is told no guidance scale in training"),
    "schnell": ("flux", transformer(guidance_embeds=False), ["--set", "guidance=2"], "leave guidance=2 out"),
    "no guidance": ("flux", nothing, ["--set", "guidance=NaN"], "guidance is nan; give a number of 0 or more"),
    "setting": ("flux", nothing, ["--set", "guidanse=1"], "Unknown setting of a fine-tuning 'guidanse'. Did you mean"),
    "steps": ("flux", nothing, ["--set", "warmup=1.5"], "warmup is 1.5; give a whole number of 0 or more"),
    "switch": ("flux", nothing, ["--set", "random_flip=yes"], "random_flip is 'yes'; give true or false"),
    "targets as text": ("flux", nothing, ["--set", "targets=to_q"], "LoRA has no targets, which are 'to_q'"),
    "captions": ("flux", nothing, ["--images", "CAPTIONS"], "None of the 2 captions"),
    "prompt": ("flux", nothing, ["--prompt", "a dog"], "lacks the subject token 'sks'"),
    "class": ("flux", nothing, ["--class-images", "PICTURES", "--class-prompt", PROMPT], "class's prompt"),
    "class alone": ("flux", nothing, ["--class-prompt", "a dog"], "has no pictures; give --class-images too"),
    "scheduler": ("flux", lambda _, index: index.update(scheduler=["diffusers", "NoScheduler"]), [], "NoScheduler"),
    "no scheduler": ("flux", lambda folder, index: shutil.rmtree(folder / "scheduler"), [], "cannot be loaded"),
    "index": ("flux", lambda folder, index: index.update(vae=[]), [], "saved without its vae"),
    "pictures": ("flux", nothing, ["--images", "nowhere"], "There is no folder nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_both_refuse_with_the_same_line(what, changed, pictures, tmp_path, skipwise, monkeypatch, capsys) -> None:
    row, change, more, said = MISTAKES[what]
    monkeypatch.setattr(finetuning, "prepare", lambda *args, **kwargs: pytest.fail("something is encoded"))
    captioned = shutil.copytree(pictures, tmp_path / "captions")
    for number in range(2):
        (captioned / f"{number}.txt").write_text("a dog")
    Plan(model=find_contract(IMAGE["sana"]()).shape).save(tmp_path / "plan.json")
    paths = {"PLAN": tmp_path / "plan.json", "CAPTIONS": captioned, "PICTURES": pictures}
    folder = changed(row, change)
    command = ["finetune", folder, "--images", pictures, "--prompt", PROMPT, *SMALL, "-o", tmp_path / "out"]
    command += [paths.get(argument, argument) for argument in more]
    capsys.readouterr()  # of making the pipeline
    (code, _, error), (dry, _, same) = skipwise(*command), skipwise(*command, "--dry-run")
    assert (code, dry) == (2, 2), error + same
    assert said in error
    assert error == same
    assert len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_dry_run_is_of_what_can_be_run(changed, pictures, tmp_path, skipwise, monkeypatch) -> None:
    """It needs no weights, tells of every picture, and what this machine alone lacks it says without an error."""
    bare = changed("flux", lambda folder, index: [path.unlink() for path in folder.rglob("*.safetensors")])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = ["finetune", bare, "--images", pictures, "--prompt", PROMPT, *SMALL, "--set", "optimiser=adamw8bit"]
    code, shown, error = skipwise(*command, "--dry-run", "--blocks", "50%")
    assert code == 0, error
    shown = " ".join(shown.split())
    assert "estimated peak" in shown
    assert (
        'pictures: 1.png: 30 x 40, resized to 32 x 42, random crops of 32 x 32; "a photo of sks dog" (the pr' in shown
    )
    assert "on this machine: Optimiser adamw8bit needs bitsandbytes, which is not installed" in shown
    code, _, error = skipwise(*command, "-o", tmp_path / "out")
    assert code == 2
    assert "no .safetensors weights" in error
    code, _, error = skipwise(*command, "--dry-run", "--blocks", "2", "--rule", "vital")
    assert (code, "Rule vital runs the model, which a dry run does not" in error) == (2, True)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_read_of_configs_is_what_the_pipeline_has(row: str, saved) -> None:
    """No weights are needed to know a family's scale, shift and pipeline."""
    name, stock = str(saved(row)), pipeline(row)
    family = load_family(name)
    assert family.scale == stock.vae_scale_factor
    assert family.pipeline == type(stock).__name__
    assert family.shift == type(family)(stock.scheduler.config).shift
    text = family.encode_prompts(stock, [PROMPT])["encoder_hidden_states"]
    assert Estimator(name).size(SETTINGS).text == family.text_length() == text.shape[1]
    text = family.encode_prompts(stock, [PROMPT], max_length=40)["encoder_hidden_states"]
    assert Estimator(name).size(replace(SETTINGS, text_tokens=40)).text == text.shape[1]


def test_text_of_unknown_length_is_asked_for() -> None:
    own = Estimator(IMAGE["aura_flow"]())
    with pytest.raises(UserError, match=r"How many text tokens AuraFlowTransformer2DModel takes .* text_tokens=512"):
        own.estimate(SETTINGS)
    assert own.size(replace(SETTINGS, text_tokens=9)).text == 9


def test_sd3_without_t5(changed, pictures, tmp_path) -> None:
    """As the stock pipeline reads it: zeros stand in for T5. It trains, is estimated and its words are found."""
    name = str(changed("sd3", null("text_encoder_3", "tokenizer_3")))
    stock = diffusers.DiffusionPipeline.from_pretrained(name, text_encoder_3=None, tokenizer_3=None)
    expected = stock.encode_prompt(PROMPT, None, None, max_sequence_length=256)
    subject = Subject(pictures, PROMPT)
    work = Work.begin(name, subject, tmp_path / "out", None, SETTINGS, TRAINING, "cpu", None)
    text = work.prepared().texts[PROMPT]
    torch.testing.assert_close(text["encoder_hidden_states"], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text["pooled_projections"], expected[2], atol=1e-5, rtol=0)
    assert not text["encoder_hidden_states"][:, 77:].any()
    assert set(Estimator(name).estimate(SETTINGS).text_encoders) == {"text_encoder", "text_encoder_2"}
    assert finetune(name, subject, tmp_path / "out", None, SETTINGS, TRAINING, device="cpu").exists()
    assert select_blocks(name, 1, "vital", subject, SETTINGS).train
    loaded = load_pipeline(name)
    assert loaded.text_encoder_3 is None
    assert loaded(PROMPT, height=32, width=32, num_inference_steps=1, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("parts", [("transformer", "vae", "text_encoder", "text_encoder_2"), ("vae",)])
def test_a_variant_alone_is_read(parts, changed, pictures, tmp_path) -> None:
    name = str(changed("flux", variant(*parts)))
    adapter = finetune(name, Subject(pictures, PROMPT), tmp_path / "out", None, SETTINGS, TRAINING, device="cpu")
    assert adapter.exists()
    expected, found = pipeline("flux"), load_pipeline(name)
    for part in parts:
        state = getattr(expected, part).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in getattr(found, part).state_dict().items()), part


def test_guidance_is_what_the_model_is_told(saved, pictures, tmp_path) -> None:
    """In training and when records are made; records of another guidance are not taken."""
    told: dict[float | None, dict[str, torch.Tensor]] = {}
    name = str(saved("flux"))
    plan_of = select_blocks(name, 2, "last")
    for guidance in (None, 3.5, 1.0):
        training = replace(TRAINING, guidance=guidance, learning_rate=1e-2)
        work = Work.begin(
            str(saved("flux")),
            Subject(pictures, PROMPT),
            tmp_path / str(guidance),
            plan_of,
            SETTINGS,
            training,
            "cpu",
            None,
        )
        assert work.family.guidance == (3.5 if guidance is None else guidance)
        told[guidance] = load_file(work.run(None))
    assert all(told[None][key].equal(tensor) for key, tensor in told[3.5].items())
    assert any(not told[1.0][key].equal(tensor) for key, tensor in told[3.5].items())


def test_a_family_that_does_not_say_where_words_are() -> None:
    """A new family has a rule of its own, or the general one: nothing is looked up by its name."""

    class Other(Family):
        name = "Other"
        pipelines = ("PixArtSigmaPipeline",)
        transformer = "PixArtTransformer2DModel"

    stock = pipeline("pixart")
    found = Other().subject_positions(stock, PROMPT, "sks", 32)
    assert found
    assert found == FAMILIES[-1]().subject_positions(stock, PROMPT, "sks", 32)


def test_blocks_are_scored_under_every_pictures_own_caption(saved, pictures) -> None:
    """The subject's words are looked for in each caption; a caption without them says nothing of the subject."""
    (pictures / "0.txt").write_text("on the grass there is sks")
    shutil.copy(pictures / "0.png", pictures / "2.png")
    (pictures / "2.txt").write_text("nothing at all")
    settings = replace(SETTINGS, text_tokens=32)
    scored = select_blocks(str(saved("flux")), 2, "vital", Subject(pictures, PROMPT), settings)
    (pictures / "2.png").unlink()
    (pictures / "2.txt").unlink()
    assert scored == select_blocks(str(saved("flux")), 2, "vital", Subject(pictures, PROMPT), settings)
    (pictures / "0.txt").unlink()
    assert (
        scored.made_by.scores
        != select_blocks(str(saved("flux")), 2, "vital", Subject(pictures, PROMPT), settings).made_by.scores
    )


def test_help_says_what_is_read(skipwise) -> None:
    code, shown, _ = skipwise("finetune", "--help")
    assert code == 0
    for word in ("NAME.caption", "metadata.jsonl", "[trigger]", "center_crop", "guidance"):
        assert word in shown
