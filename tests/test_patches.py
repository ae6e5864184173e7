"""Crops that grow with the noise, and the folder of pictures they are taken from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipwise.errors import UserError
from skipwise.finetuning.images import check_prompt, read_pictures
from skipwise.finetuning.patches import (
    Patch,
    PatchSchedule,
    Place,
    crop_latents,
    crop_pixels,
    keyed_generator,
    place_in_picture,
    sample_patch,
)

LEVELS = torch.linspace(0, 1, 101).tolist()
SIZE = (300, 200)


@pytest.mark.parametrize("kind", ["linear", "cosine", "step"])
@pytest.mark.parametrize("limits", [(0.25, 1.0), (50, 200), (0.25, 160)])
def test_sides_grow_from_smallest_to_largest(kind, limits):
    schedule = PatchSchedule(kind, *limits)
    sides = [schedule.side(t, SIZE) for t in LEVELS]
    assert sides == sorted(sides)
    assert sides[0] == 50
    assert sides[-1] == (160 if limits[1] == 160 else 200)


def test_kinds_differ_and_meet_in_the_middle():
    at = {kind: PatchSchedule(kind, 100, 200).side for kind in ("linear", "cosine", "step")}
    assert [at[kind](0.25, SIZE) for kind in at] == [125, 115, 100]
    assert at["linear"](0.5, SIZE) == at["cosine"](0.5, SIZE) == 150
    assert at["step"](0.5, SIZE) == 200


def test_no_crop_is_larger_than_the_picture_or_smaller_than_asked():
    schedule = PatchSchedule("linear", 10, 1000)
    assert schedule.side(1, SIZE) == 200
    assert schedule.side(0, SIZE, at_least=64) == 64
    assert PatchSchedule("linear", 1.0, 100).side(0.5, SIZE) == 200  # not falling, where the units cross


@pytest.mark.parametrize("limits", [(0, 1), (0.9, 0.5), (200, 100), (-1, 100), (float("nan"), 1)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(UserError, match="are no range"):
        PatchSchedule("linear", *limits)


def test_unknown_schedule_is_named():
    with pytest.raises(UserError, match=r"'linaer'.*Did you mean 'linear'"):
        PatchSchedule("linaer")  # type: ignore[arg-type]


def patches(count=400, **kwargs):
    return [sample_patch(PatchSchedule("linear", 20, 200), SIZE, 0.4, 7, "a", step, **kwargs) for step in range(count)]


def test_a_patch_depends_on_its_key_alone():
    state = torch.get_rng_state()
    first = patches()
    torch.manual_seed(5)
    torch.rand(3)
    assert patches() == first
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    patches(3)
    assert torch.equal(torch.rand(1), expected)  # the global generator was not touched
    torch.set_rng_state(state)
    keys = [(7, "a", 1), (8, "a", 1), (7, "b", 1), (7, "a", 2), (71, "a"), (7, "1a")]
    drawn = [torch.randint(2**40, (), generator=keyed_generator(*key)).item() for key in keys]
    assert len(set(drawn)) == len(keys)


def test_patches_are_inside_and_reach_every_place():
    drawn = patches()
    assert {patch.side for patch in drawn} == {92}
    lefts, tops = [patch.left for patch in drawn], [patch.top for patch in drawn]
    assert min(lefts) >= 0
    assert max(lefts) <= 300 - 92
    assert max(tops) <= 200 - 92
    quarters = np.histogram(lefts, bins=4, range=(0, 209))[0]
    assert quarters.min() > 70  # of 100: uniform
    assert min(tops) <= 2
    assert max(tops) >= 106


def test_a_mask_draws_the_centre_to_the_subject():
    mask = torch.zeros(200, 300)
    mask[120:140, 40:50] = 1
    for patch in patches(100, mask=mask):
        assert 40 <= patch.left + 46 < 50 or patch.left == 0
        assert patch.top == 108 or 120 <= patch.top + 46 < 140
    assert patches(50, mask=torch.zeros(200, 300)) == patches(50)
    assert len({patch.left for patch in patches(100, mask=mask)}) > 2


def test_a_full_crop_at_its_own_size_is_the_picture():
    picture = torch.rand(3, 32, 32)
    assert torch.equal(crop_pixels(picture, Patch(0, 0, 32), 32), picture)


def test_a_crop_shows_its_window_resized_by_area():
    ramp = torch.arange(64.0).expand(1, 64, 64)
    crop = crop_pixels(ramp, Patch(16, 0, 32), 16)
    assert crop.shape == (1, 16, 16)
    assert torch.allclose(crop[0, 5, 2:-2], ramp[0, 0, 16:48].reshape(16, 2).mean(1)[2:-2], atol=1e-4)
    noise = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
    assert crop_pixels(noise, Patch(0, 0, 128), 16).std() < 0.2  # antialiased: without, the noise would stay at 1


def test_latents_are_cropped_where_pixels_are():
    latents = torch.arange(64.0).expand(2, 4, 48, 64)
    same = crop_latents(latents, Patch(left=80, top=8, side=256), resolution=256, scale=8)
    assert torch.equal(same, latents[..., 1:33, 10:42])
    half = crop_latents(latents, Patch(left=80, top=8, side=256), resolution=128, scale=8)
    assert half.shape == (2, 4, 16, 16)
    edge = crop_latents(latents, Patch(left=509 - 256, top=383 - 256, side=259), resolution=64, scale=8)
    assert edge.shape == (2, 4, 8, 8)
    cut = crop_latents(latents[..., :25, :25], Patch(0, 0, side=206), resolution=200, scale=8)
    assert torch.equal(cut, latents[..., :25, :25])  # of 206 pixels, the VAE kept 25 times 8


def test_places():
    assert place_in_picture(Patch(0, 0, 512), (512, 512), tokens=32, grid=32) == Place()
    detail = place_in_picture(Patch(left=256, top=128, side=256), (640, 512), tokens=16, grid=32)
    assert detail == Place(left=16, top=8, step=1)
    coarse = place_in_picture(Patch(0, 0, 512), (512, 512), tokens=16, grid=32)
    assert coarse == Place(left=0.5, top=0.5, step=2)  # the centre of two tokens


def save(folder: Path, name: str, size=(40, 30), colour=(255, 0, 0), mode="RGB", **kwargs) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(folder / name, **kwargs)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "dog", "a.png")
    save(tmp_path / "dog", "b.jpg", colour=(0, 0, 255))
    return tmp_path / "dog"


def test_a_folder_is_read(folder: Path):
    (folder / "a.txt").write_text("a photo of sks dog\n")
    save(folder, "b.mask.png", mode="L", colour=255)
    (folder / ".hidden").write_text("x")
    first, second = read_pictures(folder, resolution=30)
    assert (first.path.name, first.size, first.caption, first.mask()) == ("a.png", (40, 30), "a photo of sks dog", None)
    assert (second.caption, second.mask().shape) == (None, (30, 40))
    assert second.mask().min() == 1
    pixels = first.pixels()
    assert pixels.shape == (3, 30, 40)
    assert pixels[:, 0, 0].tolist() == [1, -1, -1]
    assert len(first.sha256) == 64 != second.sha256


def test_what_cameras_and_editors_write(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = Image.new("RGB", (40, 30), "black")
    image.paste("white", (0, 0, 20, 30))
    image.save(folder / "c.png", exif=exif)
    save(folder, "d.png", mode="RGBA", colour=(0, 0, 0, 0))
    save(folder, "e.png", mode="L", colour=51)
    Image.fromarray(np.full((30, 40), 51 * 257, dtype=np.uint16)).save(folder / "f.png")
    *_, turned, clear, grey, deep = read_pictures(folder)
    assert turned.size == (30, 40)
    assert turned.pixels()[0, :, 0].tolist() == [1.0] * 20 + [-1.0] * 20
    assert (clear.pixels() == 1).all()
    assert torch.allclose(grey.pixels(), torch.tensor(-0.6))
    assert torch.equal(grey.pixels(), deep.pixels())


def spoil(folder: Path, what: str) -> None:
    """Make one thing wrong with the folder."""
    if what == "one picture only":
        (folder / "b.jpg").write_bytes((folder / "a.png").read_bytes())  # twice the same is one
    elif what == "no pictures":
        (folder / "a.png").unlink()
        (folder / "b.jpg").unlink()
    elif what == "b.jpg":
        (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-200])
    elif what == "a.mask.png is 10 x 10":
        save(folder, "a.mask.png", size=(10, 10), mode="L", colour=1)
    elif what == "a.mask.png marks nothing":
        save(folder, "a.mask.png", mode="L", colour=0)
    elif what == "caption":
        (folder / "a.txt").write_bytes(b"\xff\xfe\xff")


@pytest.mark.parametrize(
    "what",
    [
        "one picture only",
        "no pictures",
        "b.jpg",
        "a.mask.png is 10 x 10",
        "a.mask.png marks nothing",
        "caption",
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder: Path, what: str):
    spoil(folder, what)
    with pytest.raises(UserError, match=what) as caught:
        read_pictures(folder, resolution=30)
    assert "\n" not in str(caught.value)


def test_there_must_be_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        read_pictures(tmp_path / "nowhere")


def test_the_prompt_names_the_subject():
    check_prompt("a photo of sks dog", "sks")
    check_prompt("a photo of <dog>, outside", "<dog>")
    for prompt in ("a photo of a dog", "a photo of sksy dog"):
        with pytest.raises(UserError, match=f"'{prompt}' lacks the subject token 'sks'"):
            check_prompt(prompt, "sks")
    with pytest.raises(UserError, match="empty"):
        check_prompt("a dog", " ")
