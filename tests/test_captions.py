"""Folders of pictures as people have them: every shape, captions of every trainer, files that are no pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipwise.errors import UserError
from skipwise.finetuning.draws import Example, make_draws
from skipwise.finetuning.images import read_pictures
from skipwise.finetuning.patches import PatchSchedule, crop_pixels
from skipwise.finetuning.residuals import DrawKey
from skipwise.finetuning.subject import Subject

PROMPT = "a photo of sks dog"
WHOLE = PatchSchedule("linear", 1.0, 1.0)


def paint(path: Path, size=(40, 30), mode="RGB", **kwargs) -> Path:
    noise = np.random.default_rng(sum(path.name.encode()))
    Image.fromarray(noise.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path, **kwargs)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures 0.png, 1.jpg and 2.webp."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for name in ("0.png", "1.jpg", "2.webp"):
        paint(folder / name)
    return folder


def prompts(folder: Path, prompt: str = PROMPT, **settings) -> list[str]:
    return [example.prompt for example in Subject(folder, prompt, **settings).examples(32)[0]]


def table(folder: Path, rows, name="metadata.jsonl", newline="\n") -> None:
    text = newline.join(json.dumps(row) if isinstance(row, dict) else row for row in rows)
    (folder / name).write_text(text + newline)


OTHER = {"file_name": "1.jpg", "caption": "a sks dog"}
TABLE = "metadata.csv"
ROW = {"file_name": "1.jpg", "text": "a sks dog"}
WAYS = {
    "NAME.txt": lambda folder: (folder / "1.txt").write_text("a sks dog\n"),
    "NAME.TXT": lambda folder: (folder / "1.TXT").write_text("a sks dog"),
    "NAME.caption": lambda folder: (folder / "1.caption").write_text("a sks dog"),
    "NAME.Caption": lambda folder: (folder / "1.Caption").write_text("a sks dog"),
    "byte order mark": lambda folder: (folder / "1.txt").write_bytes("\ufeffa sks dog\r\n".encode()),
    "trigger": lambda folder: (folder / "1.txt").write_text("a [trigger] dog"),
    "text": lambda folder: table(folder, [ROW]),
    "prompt": lambda folder: table(folder, [{"file_name": "./1.jpg", "prompt": "a [trigger] dog", "label": 3}]),
    "empty rows": lambda folder: table(folder, [{"file_name": "0.png", "text": ""}, "", ROW]),
    "no text for some": lambda folder: table(folder, [{"file_name": "0.png"}, ROW]),
    "columns of each row": lambda folder: table(folder, [{"file_name": "9.png", "text": "x"}, OTHER]),
    "csv": lambda folder: table(folder, ["file_name,text", '1.jpg,"a sks dog"'], TABLE),
    "csv of Windows": lambda folder: table(folder, ["\ufefffile_name,text", "1.jpg,a sks dog"], TABLE, "\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_captions_are_found(folder: Path, way: str) -> None:
    WAYS[way](folder)
    assert prompts(folder) == [PROMPT, "a sks dog", PROMPT]


def test_captions_that_say_the_same_are_one_and_others_are_refused(folder: Path) -> None:
    WAYS["NAME.txt"](folder)
    WAYS["csv"](folder)
    WAYS["NAME.Caption"](folder)
    assert prompts(folder)[1] == "a sks dog"
    (folder / "1.caption").write_text("   ")  # an empty one is none
    assert prompts(folder)[1] == "a sks dog"
    (folder / "1.caption").write_text("sks")
    with pytest.raises(
        UserError, match=r"1.jpg has two captions: 'a sks dog' \(1.Caption\) and 'sks' \(1.caption\); keep"
    ):
        prompts(folder)


WRONG = {
    "None of the 1 captions .* 'a dog'; write it": lambda folder: (folder / "1.txt").write_text("a dog"),
    r"1.txt cannot be read: .* Save it as UTF-8": lambda folder: (folder / "1.txt").write_bytes(b"\xff\xfea\0"),
    "has label, but no file_name and text": lambda folder: table(folder, [{"label": 1}]),
    "has file_name, tags, but no file_name": lambda folder: table(folder, ["file_name,tags", "1.jpg,a"], TABLE),
    "line 2 is not one JSON object a line": lambda folder: table(folder, [ROW, "[1]"]),
    "line 1 is not one JSON object": lambda folder: table(folder, ["[" * 100000]),
    "line 1 has two captions, 'a sks dog' and 'sks'": lambda folder: table(folder, [ROW | {"prompt": "sks"}]),
    "line 1: file_name and text must be strings": lambda folder: table(folder, [ROW | {"text": ["a sks dog"]}]),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_captions_that_cannot_be_right_are_refused(folder: Path, message: str) -> None:
    WRONG[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        prompts(folder)
    assert "\n" not in str(caught.value)


def test_a_caption_may_hold_line_breaks_of_unicode(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps(ROW | {"text": "a\u2028sks dog"}, ensure_ascii=False))
    assert prompts(folder)[1] == "a\u2028sks dog"


def test_a_prompt_is_needed_for_pictures_without_captions_alone(folder: Path) -> None:
    with pytest.raises(UserError, match=r"0.png has no caption; write one beside it, or give --prompt"):
        prompts(folder, prompt="")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"sks number {number}")
    assert prompts(folder, prompt="") == ["sks number 0", "sks number 1", "sks number 2"]
    with pytest.raises(UserError, match="lacks the subject token 'sks'"):
        prompts(folder, prompt="a dog")
    with pytest.raises(UserError, match="The subject token is empty"):
        prompts(folder, prompt="", token=" ")


def test_the_class_has_its_own_captions_without_the_token(folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for name in ("a.png", "b.png"):
        paint(others / name)
    (others / "a.txt").write_text("a brown dog")
    subject = Subject(folder, "a photo of [trigger] dog", class_images=others)
    assert [(e.prompt, e.weight) for e in subject.examples(32, 0.5)[1]] == [
        ("a brown dog", 0.5),
        ("a photo of dog", 0.5),
    ]
    (others / "b.txt").write_text("not the sks dog")
    with pytest.raises(UserError, match="class's prompt 'not the sks dog' has the subject token"):
        subject.examples(32)


def test_every_picture_and_all_that_is_not_used_is_told(folder: Path) -> None:
    (folder / "0.txt").write_text("a\nsks dog")
    (folder / "2.txt").write_text("a dog")
    (folder / "9.txt").write_text("of nothing")
    table(folder, [{"file_name": "gone.jpg", "text": "sks"}])
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "more").mkdir()
    paint(folder / "9.mask.png", mode="L")
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(folder / "3.png", (64, 32), exif=exif)
    Image.new("RGBA", (32, 32)).save(folder / "4.png")
    said: list[str] = []
    small = ("0.png", "1.jpg", "2.webp")
    Subject(folder, PROMPT).examples(32, tell=said.append)
    assert said == [
        "no pictures, passed over: Thumbs.db",
        "captions without a picture: 9.txt, gone.jpg (metadata.jsonl)",
        "masks without a picture: 9.mask.png",
        *(f"{name} has 40 x 30 pixels, fewer than the resolution of 32: it is enlarged" for name in small),
        '0.png: 40 x 30, resized to 42 x 32, random crops of 32 x 32; "a sks dog" (0.txt)',
        '1.jpg: 40 x 30, resized to 42 x 32, random crops of 32 x 32; "a photo of sks dog" (the prompt)',
        '2.webp: 40 x 30, resized to 42 x 32, random crops of 32 x 32; "a dog" (2.txt), '
        "which does not name the subject 'sks'",
        '3.png: 32 x 64, turned as the camera noted, random crops of 32 x 32; "a photo of sks dog" (the prompt)',
        '4.png: 32 x 32, transparent parts on white; "a photo of sks dog" (the prompt)',
    ]  # fmt: skip
    said.clear()
    Subject(folder, PROMPT).examples(32, center_crop=True, tell=said.append)
    assert "0.png: 30 x 30, the centre of 40 x 30, resized to 32 x 32; " in said[6]


def test_pictures_of_every_kind(folder: Path) -> None:
    """Palettes, greys, CMYK, and a phone's JPEG that has its preview with it; a wrong ending does not matter."""
    for name, mode in (("p.gif", "P"), ("q.png", "1"), ("r.jpg", "CMYK"), ("s.tif", "L")):
        paint(folder / name, mode=mode)
    first, preview = (Image.open(paint(folder / name)).copy() for name in ("t.jpg", "u.jpg"))
    first.save(folder / "t.jpg", "MPO", save_all=True, append_images=[preview])
    (folder / "u.jpg").rename(folder / "u.data")
    found = {picture.path.name: picture for picture in read_pictures(folder)}
    assert {"p.gif", "q.png", "r.jpg", "s.tif", "t.jpg", "u.data"} < set(found)
    assert all(picture.pixels().shape == (3, 30, 40) for picture in found.values())
    of_first = torch.from_numpy(np.array(first)).permute(2, 0, 1) / 127.5 - 1
    assert (found["t.jpg"].pixels() - of_first).abs().mean() < 0.1  # the preview is nowhere near


def animated(path: Path, **kwargs) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **kwargs)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


SPOILT = {
    r"a.gif: it has 2 frames.*save it anew": lambda folder: animated(folder / "a.gif"),
    r"a.webp: it has 2 frames": lambda folder: animated(folder / "a.webp"),
    r"a.png: it has 2 frames": lambda folder: animated(folder / "a.png"),
    r"a.tiff: it has 2 frames": lambda folder: animated(folder / "a.tiff"),
    r"0.png: .*take it out of the folder": lambda folder: cut(folder / "0.png"),
    r"a.heic: it cannot be read as a picture": lambda folder: (folder / "a.heic").write_bytes(b"\0\0\0\x18ftypheic"),
    r"a.svg: it cannot be read as a picture": lambda folder: (folder / "a.svg").write_text("<svg/>"),
    r"a.jpg: it cannot be read as a picture": lambda folder: (folder / "a.jpg").touch(),
    r"a.tif: it has 32 bits a pixel": lambda folder: paint(folder / "a.tif", mode="F"),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOILT)
def test_pictures_that_cannot_be_used_are_named(folder: Path, message: str) -> None:
    SPOILT[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        read_pictures(folder)
    assert "\n" not in str(caught.value)


def test_folders_inside_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "10_sks dog").mkdir()
    with pytest.raises(UserError, match="holds no pictures; folders in it, such as 10_sks dog, are not read"):
        read_pictures(tmp_path)


@pytest.mark.parametrize("size", [(640, 480), (33, 100), (48, 48)])
def test_a_whole_centre_crop_is_that_of_the_dreambooth_scripts(tmp_path: Path, size: tuple[int, int]) -> None:
    """torchvision's Resize (shorter side) and CenterCrop, as Pillow does them, but for rounding at the edges."""
    side = 32
    gradient = np.zeros((size[1], size[0], 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, size[0])[None]
    gradient[..., 1] = np.linspace(0, 255, size[1])[:, None]
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient).save(tmp_path / name)
        gradient[..., 2] = 9
    picture = read_pictures(tmp_path)[0].squared()
    (draw,) = make_draws([Example(picture, PROMPT)], 1, lambda n, g: torch.rand(n, generator=g), WHOLE)
    ours = draw.crop(side)
    short = min(size)
    resized = Image.open(tmp_path / "a.png").resize(
        (side * size[0] // short, side * size[1] // short), Image.Resampling.BILINEAR
    )
    left, top = ((length - side) // 2 for length in resized.size)
    theirs = np.array(resized.crop((left, top, left + side, top + side)))
    assert (ours - (torch.from_numpy(theirs).permute(2, 0, 1) / 127.5 - 1)).abs().max() < 0.04


def test_mirrored_draws(folder: Path) -> None:
    """Half of them; the crop is of the mirrored picture, and so is the subject's place; their records are others."""
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 4, 4))
    mask.save(folder / "0.mask.png")
    picture = read_pictures(folder)[0]
    schedule = PatchSchedule("linear", 0.3, 0.3)
    settings = {"count": 64, "times": lambda n, g: torch.rand(n, generator=g), "schedule": schedule}
    draws = make_draws([Example(picture, PROMPT)], **settings, random_flip=True)
    flipped = [draw for draw in draws if draw.flip]
    assert 16 < len(flipped) < 48
    draw = flipped[0]
    assert draw.patch.left + draw.patch.side > 36  # where the mask is in the mirrored picture
    assert draw.mask(9).max() == 1
    assert draw.crop(9).equal(crop_pixels(picture.pixels().flip(-1), draw.patch, 9))
    plain = make_draws([Example(picture, PROMPT)], **settings)
    assert not any(draw.flip for draw in plain)
    squared = make_draws([Example(picture.squared(), PROMPT)], **settings)
    keys = [DrawKey.of(draw).digest for draw in (*draws, *(d for d in plain if d not in draws), *squared)]
    assert len(set(keys)) == len(keys)


def test_a_picture_that_is_no_file_of_its_own(folder: Path) -> None:
    """A link is what it leads to."""
    if sys.platform != "win32":
        (folder / "3.png").symlink_to(folder / "0.png")
        assert len(read_pictures(folder)) == 4
