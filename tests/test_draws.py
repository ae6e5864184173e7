"""Draws follow from what they are of, not from when they are asked for."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from skipwise.finetuning.draws import Example, batch_of, make_draws
from skipwise.finetuning.images import read_pictures
from skipwise.finetuning.patches import PatchSchedule

SCHEDULE = PatchSchedule("linear", 0.25, 1.0)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    for number in range(3):
        Image.new("RGB", (96, 64), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    mask = Image.new("L", (96, 64))
    mask.putpixel((90, 5), 255)
    mask.save(tmp_path / "2.mask.png")
    return [Example(picture, f"a photo of sks {n}") for n, picture in enumerate(read_pictures(tmp_path))]


def logit_normal(count, generator):
    return torch.randn(count, generator=generator).sigmoid()


def draws(examples, count=8, seed=0):
    return make_draws(examples, count, logit_normal, SCHEDULE, seed)


def test_a_draw_does_not_depend_on_the_others(examples):
    together, alone = draws(examples), draws(examples[1:2])
    assert together[8:16] == alone
    assert draws(examples) == together
    assert draws(examples, seed=1) != together
    assert len({draw.noise_seed for draw in together}) == 24


def test_noise_levels_are_stratified_and_crops_grow_with_them(examples):
    levels = torch.tensor([draw.t for draw in draws(examples[:1], count=64)])
    quantiles = levels.sort().values.logit()
    middle = torch.special.ndtri((torch.arange(64) + 0.5) / 64)
    assert (quantiles - middle)[4:-4].abs().max() < 0.3  # a plain sample of 64 strays by about 0.5
    assert not levels.equal(levels.sort().values)
    by_level = sorted(draws(examples[:1], count=64), key=lambda draw: draw.t)
    sides = [draw.patch.side for draw in by_level]
    assert sides == sorted(sides)
    assert sides[0] < 32 < sides[-1]


def test_a_mask_draws_the_crop_to_the_subject(examples):
    for draw in draws(examples[2:], count=16):
        assert draw.patch.left <= 90 < draw.patch.left + draw.patch.side
        assert draw.patch.top <= 5 < draw.patch.top + draw.patch.side


def test_noise_is_the_same_wherever_it_is_asked_for(examples):
    first, second = draws(examples[:1], count=2)
    torch.manual_seed(5)
    assert first.noise((2, 3)).equal(first.noise((2, 3)))
    assert not first.noise((2, 3)).equal(second.noise((2, 3)))


def test_batches_go_through_all_draws_and_know_no_before(examples):
    pool = draws(examples, count=2)
    steps = [batch_of(pool, step, 4, seed=0) for step in range(6)]
    seen = [draw for batch in steps for draw in batch]
    assert Counter(draw.noise_seed for draw in seen).most_common() == [
        (d, 4) for d in dict.fromkeys(s.noise_seed for s in seen)
    ]
    assert {draw.noise_seed for draw in seen[:6]} == {draw.noise_seed for draw in pool}
    assert seen[:6] != seen[6:12]
    assert batch_of(pool, 5, 4, seed=0) == steps[5]  # a resumed run asks for the sixth first
    assert batch_of(pool, 0, 4, seed=1) != steps[0]
