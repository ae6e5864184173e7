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


@dataclass(frozen=True)
class PictureRecipe:
    """All that determines a text-to-image model of the zoo: a FLUX with its text encoders, and its autoencoder.

    double_blocks, single_blocks, heads, head_width: of the transformer. text_width, text_blocks: of both text encoders,
    of which each reads `length` tokens. vae_widths: channels at 64, 32 and 16 pixels. The autoencoder is trained
    first, `vae_steps` batches of `vae_batch`. shift: of the noise levels that are trained and sampled, above 1 more of
    high ones (arXiv 2403.03206, eq. 23). mixed_steps: at the end, at a third of the learning rate, every other one of
    crops at half of the resolution, so that the model knows more than one, as large ones do. dropout: share of captions
    that are emptied, so that guidance works.
    average: decay of the moving average of the weights, which is what is kept.
    """

    double_blocks: int = 4
    single_blocks: int = 8
    heads: int = 4
    head_width: int = 32
    text_width: int = 64
    text_blocks: int = 2
    length: int = 16
    latent_channels: int = 16
    vae_widths: tuple[int, ...] = (16, 32, 64)
    vae_steps: int = 8000
    vae_batch: int = 4
    vae_learning_rate: float = 3e-3
    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: int = 100
    decay_from: float = 0.6
    shift: float = 3.0
    mixed_steps: int = 1200
    dropout: float = 0.1
    average: float = 0.999

    @property
    def width(self) -> int:
        """Of the transformer."""
        return self.heads * self.head_width


PICTURE_RECIPES = {"tiny-dit": PictureRecipe()}
