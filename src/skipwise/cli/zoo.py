"""`skipwise zoo`: the embedded models and how they were made."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from skipwise.cli.common import console
from skipwise.errors import UserError, unknown
from skipwise.evaluation.tasks import build_task
from skipwise.evaluation.texts import documents
from skipwise.files import check_writable
from skipwise.loading import embedded_names
from skipwise.sampling import Denoiser
from skipwise.zoo.build import save_model
from skipwise.zoo.losses import data, held_out_loss
from skipwise.zoo.recipes import PICTURE_RECIPES, RECIPES
from skipwise.zoo.tasks import TASKS
from skipwise.zoo.train import train

app = typer.Typer(help="The embedded models: list them, or train one from its seed.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """Print the embedded models."""
    for name in embedded_names():
        if name in PICTURE_RECIPES:
            drawn = PICTURE_RECIPES[name]
            kind, blocks, width = "text to image", drawn.double_blocks + drawn.single_blocks, drawn.width
        else:
            recipe = RECIPES[name]
            kind, blocks, width = recipe.objective.replace("_", " "), recipe.blocks, recipe.width
        console.print(f"{name}: {kind}, {blocks} blocks, width {width}", highlight=False)


@app.command("train")
def train_model(
    name: Annotated[str, typer.Argument(help="Which recipe, such as tiny-dllm.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and model.")] = Path(
        "runs/zoo"
    ),
    seed: Annotated[int, typer.Option(help="Of initialisation, data and noise; the shipped models have 0.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; the shipped models were trained with 1.", min=1)] = 1,
    parent: Annotated[
        str | None, typer.Option(help="Autoregressive zoo model to go on from (tiny-ar2dllm; tiny-ar by default).")
    ] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile every block.")] = True,
) -> None:
    """Train a zoo model anew (about 25 minutes of one core, tiny-dit an hour); a killed run goes on where it was.

    Example: skipwise zoo train tiny-dllm -o runs/tiny-dllm
    """
    if name not in {**RECIPES, **PICTURE_RECIPES}:
        raise unknown("recipe", name, [*RECIPES, *PICTURE_RECIPES])
    if parent and not (name in RECIPES and RECIPES[name].parent):
        raise UserError(f"{name} starts from nothing; leave out --parent {parent}.")
    check_writable(output)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    train_one = _train_pictures if name in PICTURE_RECIPES else _train_language
    written = train_one(name, output, seed, compile_blocks, parent)
    console.print(f"trained {name}; written to {written}", highlight=False)


def _train_language(name: str, output: Path, seed: int, compile_blocks: bool, parent: str | None) -> Path:
    recipe = RECIPES[name]
    tokenizer, _ = data(recipe, seed)

    def scores(model: nn.Module) -> dict[str, float]:
        if recipe.corpus == "english":
            return {"held_out_loss": held_out_loss(model, tokenizer, documents("calibration").values(), recipe.length)}
        tasks = [build_task(task, "calibration", 128, 0, 128) for task in TASKS]
        return {task.name: task.run(Denoiser(model), tokenizer)[0].value for task in tasks}

    model = train(name, output, seed, compile_blocks, scores, every=200, parent=parent)
    return save_model(model, name, seed, output, recipe, tokenizer)


def _train_pictures(name: str, output: Path, seed: int, compile_blocks: bool, _: str | None) -> Path:
    # the text encoders' classes take seconds to import
    from skipwise.evaluation.pictures import prompt_fidelity
    from skipwise.zoo.text_to_image import TextToImage, build_pipeline, paint, save_pipeline
    from skipwise.zoo.train_pictures import prompts, train_pictures

    recipe = PICTURE_RECIPES[name]

    def scores(model: TextToImage, autoencoder: Any) -> dict[str, float]:
        asked = prompts(32)
        painted = paint(build_pipeline(model, autoencoder, recipe.shift), asked, seed=0)
        return {"prompt_fidelity": prompt_fidelity([painted], asked).value}

    model, autoencoder = train_pictures(name, output, seed, compile_blocks, scores)
    return save_pipeline(model, autoencoder, name, seed, output, recipe)
