"""Train tiny-dit from its seed: first the autoencoder, then text encoders and transformer together.

The autoencoder minimises squared errors and, lightly, absolute ones, those of edges and a divergence of its latents.
The transformer learns flow matching: x_t = (1 - t) x_0 + t noise, the target is noise - x_0 (arXiv 2210.02747; t is
logit-normal and shifted as in SD3, arXiv 2403.03206: which colour is where is decided at t above 0.9), with Muon on the
blocks' matrices and AdamW elsewhere. A moving average of the weights is kept. Every step draws its pictures, times and
noise from (seed, step), so that a killed run goes on where it was.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from skipwise.files import write_state
from skipwise.zoo.garments import Split
from skipwise.zoo.pictures import caption, compose, draw_scene
from skipwise.zoo.recipes import PICTURE_RECIPES, PictureRecipe
from skipwise.zoo.text_to_image import TextToImage, build_autoencoder, encode
from skipwise.zoo.train import schedule, update

Report = Callable[[nn.Module], dict[str, float]]

AUTOENCODER, DENOISER, HELD_OUT, MIXED = range(4)  # what a random stream is for


def pictures(
    key: tuple[int, ...], count: int, split: Split = "train", striped: float = 0.2
) -> tuple[Tensor, list[str]]:
    """(count, 3, 64, 64) of -1..1, and their captions, drawn from the key; `striped` of the garments so."""
    random = np.random.default_rng(key)
    scenes = [draw_scene(random, split, striped) for _ in range(count)]
    pixels = np.stack([compose(scene, split).pixels for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, [caption(scene, random) for scene in scenes]


def prompts(count: int) -> list[str]:
    """Whole captions, colours and all, of held-out scenes of one colour, always the same ones."""
    random = np.random.default_rng((0, HELD_OUT))
    scenes = [replace(draw_scene(random, "t10k"), second=None) for _ in range(count)]
    return [caption(scene) for scene in scenes]


def autoencoder_loss(autoencoder: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Errors of the pixels, squared and, lightly, absolute; of their differences to neighbours; and a divergence."""
    posterior = autoencoder.encode(pixels).latent_dist
    found = autoencoder.decode(posterior.sample(generator)).sample
    edges = sum(F.l1_loss(found.diff(dim=dim), pixels.diff(dim=dim)) for dim in (2, 3))
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return 2 * F.mse_loss(found, pixels) + 0.1 * F.l1_loss(found, pixels) + 0.1 * edges + 1e-5 * divergence


def flow_matching_loss(
    model: nn.Module, latents: Tensor, captions: list[str], generator: torch.Generator, shift: float = 1.0
) -> Tensor:
    """Mean squared error of the velocity; the times' quantiles are spread evenly over the batch."""
    quantiles = (torch.rand(len(latents), generator=generator) + torch.arange(len(latents))) / len(latents)
    plain = torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)).sigmoid()
    times = shift * plain / (1 + (shift - 1) * plain)
    noise = torch.randn(latents.shape, generator=generator)
    share = times[:, None, None, None]
    predicted = model((1 - share) * latents + share * noise, times, captions)
    return F.mse_loss(predicted.float(), noise - latents)


class Stage:
    """One network being trained, its optimizers and the file that a killed run goes on from."""

    def __init__(self, name: str, output: Path, model: nn.Module, recipe: PictureRecipe, optimizers: list[Any]):
        self.name, self.output, self.model, self.recipe, self.optimizers = name, output, model, recipe, optimizers
        self.base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        self.step, self.seconds = 0, 0.0
        if self.state_file.exists():
            self._restore(torch.load(self.state_file, weights_only=True))

    @property
    def state_file(self) -> Path:
        """Where the state of an unfinished or finished stage is."""
        return self.output / f"{self.name}.pt"

    def fit(self, loss: Callable[[int], Tensor], every: int, stop_after: int | None, report: Report) -> None:
        """Train up to the recipe's steps, or `stop_after`; every so often write the state and a line of the log."""
        total, count, began = 0.0, 0, time.monotonic()
        for step in range(self.step, stop_after or self.recipe.steps):
            total += update(self.model, loss(step), self.optimizers, self.base, schedule(self.recipe, step))
            self.average.update_parameters(self.model)
            self.step, count = step + 1, count + 1
            if self.step % every == 0 or self.step == self.recipe.steps:
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                line = {"stage": self.name, "step": self.step, "loss": round(total / count, 5)}
                write_line(self.output, line | {"seconds": round(self.seconds, 1)} | report(self.average.module))
                self._save()
                total, count = 0.0, 0

    def _save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict()}
        state |= {"average": self.average.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers]}
        write_state(self.state_file, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def write_line(output: Path, line: dict[str, Any]) -> None:
    """Append a line to the log of a run."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "train.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def train_autoencoder(
    output: Path, seed: int, recipe: PictureRecipe, every: int = 200, stop_after: int | None = None
) -> Any:
    """The trained autoencoder, whose config says how its latents are brought to mean 0 and deviation 1."""
    torch.manual_seed(seed)
    autoencoder = build_autoencoder(recipe)
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=recipe.vae_learning_rate, betas=(0.9, 0.98), weight_decay=0
    )
    own = replace(recipe, steps=recipe.vae_steps, average=0.99)
    stage = Stage("autoencoder", output, autoencoder, own, [optimizer])

    def loss(step: int) -> Tensor:
        # stripes and turns, because what has most detail takes longest to learn
        pixels, _ = pictures((seed, AUTOENCODER, step), recipe.vae_batch, striped=0.7)
        return autoencoder_loss(autoencoder, pixels.rot90(step % 4, (2, 3)), torch.Generator().manual_seed(step))

    stage.fit(loss, every, stop_after, lambda average: {"held_out_psnr": fidelity(average)})
    trained: Any = stage.average.module.eval().requires_grad_(False)
    latents = trained.encode(pictures((seed, HELD_OUT), 256)[0]).latent_dist.mean
    trained.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return trained


@torch.no_grad()
def fidelity(autoencoder: Any) -> float:
    """Peak signal-to-noise ratio, in dB, of 64 held-out pictures encoded and decoded."""
    pixels, _ = pictures((0, HELD_OUT), 64, "t10k")
    found = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return round(float(10 * torch.log10(4 / F.mse_loss(found, pixels))), 2)


def build_optimizers(model: TextToImage, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest: modulations, embeddings, text encoders."""
    inside = {
        id(parameter)
        for block in transformer_blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and not name.startswith("norm")
    }
    matrices = [parameter for parameter in model.parameters() if id(parameter) in inside]
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def transformer_blocks(model: TextToImage) -> list[nn.Module]:
    """The blocks of its transformer, double-stream ones first."""
    return [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]


def crops(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Squares of half the side to all of it, at random places, made half as large as the pictures."""
    whole = pixels.shape[-1]
    found = []
    for picture in pixels:
        side = int(torch.randint(whole // 2, whole + 1, (), generator=generator))
        top, left = (int(torch.randint(whole - side + 1, (), generator=generator)) for _ in range(2))
        window = picture[None, :, top : top + side, left : left + side]
        found.append(F.interpolate(window, (whole // 2, whole // 2), mode="bilinear", antialias=True))
    return torch.cat(found)


def train_denoiser(
    output: Path,
    seed: int,
    recipe: PictureRecipe,
    autoencoder: Any,
    compile_blocks: bool = False,
    evaluate: Report | None = None,
    every: int = 200,
    stop_after: int | None = None,
) -> TextToImage:
    """The trained text encoders and transformer: the moving average of their weights, at full resolution alone, and
    then with crops.
    """
    torch.manual_seed(seed)
    model = TextToImage(recipe)
    if compile_blocks:
        for block in transformer_blocks(model):
            block.compile()

    def fit(name: str, stream: int, own: PictureRecipe, mixed: bool) -> Stage:
        def loss(step: int) -> Tensor:
            pixels, captions = pictures((seed, stream, step), own.batch_size)
            generator = torch.Generator().manual_seed(step)
            kept = torch.rand(len(captions), generator=generator) >= own.dropout
            captions = [text if keep else "" for text, keep in zip(captions, kept, strict=True)]
            if mixed and step % 2:
                pixels = crops(pixels, generator)
            with torch.autocast("cpu", torch.bfloat16):
                return flow_matching_loss(model, encode(autoencoder, pixels).float(), captions, generator, own.shift)

        stage = Stage(name, output, model, own, build_optimizers(model, own.learning_rate))
        stage.fit(loss, every, stop_after, report)
        return stage

    def report(average: nn.Module) -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):
            held_out = held_out_loss(average, autoencoder, recipe.shift)
            return {"held_out_loss": held_out} | (evaluate(average) if evaluate else {})

    stage = fit("denoiser", DENOISER, recipe, mixed=False)
    if stage.step >= recipe.steps and recipe.mixed_steps:
        model.load_state_dict(stage.average.module.state_dict())
        rate = recipe.learning_rate / 3
        own = replace(recipe, steps=recipe.mixed_steps, learning_rate=rate, decay_from=0.4)
        stage = fit("mixed", MIXED, own, mixed=True)
    return cast(TextToImage, stage.average.module.eval())


@torch.no_grad()
def held_out_loss(model: nn.Module, autoencoder: Any, shift: float, count: int = 128) -> float:
    """Loss on pictures of held-out garments, always the same times and noise."""
    pixels, captions = pictures((0, HELD_OUT), count, "t10k")
    generator = torch.Generator().manual_seed(0)
    return round(float(flow_matching_loss(model, encode(autoencoder, pixels), captions, generator, shift)), 5)


def train_pictures(
    name: str,
    output: Path,
    seed: int = 0,
    compile_blocks: bool = False,
    evaluate: Callable[[TextToImage, Any], dict[str, float]] | None = None,
    every: int = 200,
    recipe: PictureRecipe | None = None,
    stop_after: int | None = None,
) -> tuple[TextToImage, Any]:
    """Train the text-to-image model `name` and its autoencoder; a killed run goes on from the states in `output`.

    Logs to `output`/train.jsonl. evaluate: of the model as it is and its autoencoder, for the log. stop_after: end
    the denoiser early, at this step, as if killed after it.
    """
    recipe = recipe or PICTURE_RECIPES[name]
    if not (output / "train.jsonl").exists():
        head = {"name": name, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__}
        write_line(output, head)
    autoencoder = train_autoencoder(output, seed, recipe, every)

    def report(model: nn.Module) -> dict[str, float]:
        return evaluate(cast(TextToImage, model), autoencoder) if evaluate else {}

    return train_denoiser(output, seed, recipe, autoencoder, compile_blocks, report, every, stop_after), autoencoder
