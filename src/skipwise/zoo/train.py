"""Train a zoo model from its seed: `skipwise zoo train NAME`.

Masked diffusion: mask exactly k of the n answer tokens, k uniform in 1..n, and weigh the cross-entropy by 1/k (LLaDA's
likelihood bound, arXiv 2502.09992 eq. 6, which has the expectation of the 1/t loss and less variance).
Autoregressive: cross-entropy of the answer tokens. Everything else is the same for both kinds: data, blocks, width,
optimizer, number of sequences. A recipe with a parent goes on from that autoregressive model with the masked-diffusion
objective, as Dream did from Qwen2.5 (arXiv 2508.15487): attention looks both ways, position p is still predicted from
the state at p - 1.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from skipwise.files import write_state
from skipwise.zoo.build import ZooModel, blocks_of, build_model
from skipwise.zoo.losses import LOSSES, Batch, data
from skipwise.zoo.recipes import RECIPES, PictureRecipe, Recipe


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head, norms and modulations."""
    inside = {
        id(p) for name, p in blocks_of(model).named_parameters() if p.ndim == 2 and "adaLN_modulation" not in name
    }
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(recipe: Recipe | PictureRecipe, step: int) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to 2%."""
    remaining = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min(1.0, (step + 1) / recipe.warmup) * max(0.02, min(1.0, remaining))


@dataclass
class Progress:
    """What a log line says besides the accuracies."""

    step: int
    sequences: int
    loss: float
    seconds: float


def train(
    name: str,
    output: Path,
    seed: int = 0,
    compile_blocks: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 100,
    recipe: Recipe | None = None,
    stop_after: int | None = None,
    parent: str | None = None,
) -> ZooModel:
    """Train the zoo model `name`, logging to `output`/train.jsonl; a killed run goes on from `output`/state.pt.

    stop_after: end early, at this step, as if killed after it; parent: see `build_model`.
    """
    recipe = recipe or RECIPES[name]
    model = build_model(recipe, seed, parent)
    optimizers = build_optimizers(model, recipe)
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed + 1)
    _, stream = data(recipe, seed)
    output.mkdir(parents=True, exist_ok=True)
    first, elapsed = resume(output, model, optimizers, generator, stream)
    if compile_blocks:
        for block in blocks_of(model):
            block.compile()
    with open(output / "train.jsonl", "a", encoding="utf-8") as log:
        if first == 0:
            log.write(
                json.dumps({"name": name, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__}) + "\n"
            )
        total, steps, began = 0.0, 0, time.monotonic()
        for step in range(first, stop_after or recipe.steps):
            with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
                loss = LOSSES[recipe.objective](model, next(stream), generator, recipe.stratified)
            total, steps = total + update(model, loss, optimizers, base, schedule(recipe, step)), steps + 1
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                seconds = elapsed + time.monotonic() - began
                progress = Progress(
                    step + 1, (step + 1) * recipe.batch_size, round(total / steps, 5), round(seconds, 1)
                )
                log.write(json.dumps(asdict(progress) | _accuracies(model, evaluate)) + "\n")
                log.flush()
                save_state(output, step + 1, seconds, model, optimizers, generator)
                total, steps = 0.0, 0
    return model.eval()


def update(
    model: nn.Module, loss: Tensor, optimizers: list[torch.optim.Optimizer], base: list[float], factor: float
) -> float:
    """One optimizer step at `factor` times the base learning rates; returns the loss."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, base, strict=True):
        group["lr"] = rate * factor
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _accuracies(model: nn.Module, evaluate: Callable[[nn.Module], dict[str, float]] | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # decoding has other shapes than training; not worth compiling
        accuracies = evaluate(model)
    model.train()
    return accuracies


def save_state(
    output: Path,
    step: int,
    seconds: float,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
) -> None:
    """Checkpoint for `resume`; written whole or not at all."""
    state = {
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
    }
    write_state(output / "state.pt", state)


def resume(
    output: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    stream: Iterator[Batch],
) -> tuple[int, float]:
    """(step to go on from, seconds spent so far). The data stream is wound forward to where the run had been."""
    if not (output / "state.pt").exists():
        return 0, 0.0
    state = torch.load(output / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(state["generator"])
    for _ in range(state["step"]):
        next(stream)
    return state["step"], state["seconds"]
