"""What determines a zoo model, seed aside: objective, size, data, optimisation."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["masked_diffusion", "autoregressive"]
Corpus = Literal["tasks", "english"]


@dataclass(frozen=True)
class Recipe:
    """All that determines a zoo model. `parent` is the model it goes on from.

    corpus: "tasks" are the generated ones (`skipwise.zoo.tasks`; `share` is each task's part of a batch), "english" is
    running text (`skipwise.zoo.english`) in windows of `length` tokens
    of a vocabulary of `vocabulary`. mlp_width: an MDLM's is 4 times its width.
    stratified: numbers of masks are spread evenly over a batch. autocast: matrix products in bfloat16.
    """

    objective: Objective
    parent: str | None = None
    blocks: int = 24
    width: int = 64
    heads: int = 4
    mlp_width: int = 160
    steps: int = 2400
    batch_size: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    decay_from: float = 0.5
    share: tuple[tuple[str, float], ...] = (("addition", 0.35), ("chain", 0.25), ("sort", 0.25), ("reverse", 0.15))
    corpus: Corpus = "tasks"
    length: int = 16
    vocabulary: int = 2048
    stratified: bool = False
    autocast: bool = False


_TEXT = Recipe(
    "masked_diffusion",
    blocks=12,
    width=96,
    heads=3,
    mlp_width=384,
    steps=4800,
    batch_size=16,
    learning_rate=5e-3,
    corpus="english",
    length=128,
    stratified=True,
    autocast=True,
)

RECIPES = {
    "tiny-dllm": Recipe("masked_diffusion"),
    "tiny-ar": Recipe("autoregressive"),
    # on top of its parent's steps; a third of the learning rate, so that the parent is not forgotten
    "tiny-ar2dllm": Recipe("masked_diffusion", parent="tiny-ar", steps=1200, learning_rate=1e-3),
    "tiny-dllm-light": Recipe("masked_diffusion", blocks=4),
    "tiny-text": _TEXT,
    "tiny-text-light": Recipe(**{**vars(_TEXT), "blocks": 4}),
}
