"""`skipwise finetune`: personalise an image DiT with LoRA, on a small GPU."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipwise.blocks import find_contract
from skipwise.cli.common import Device, console, progress_bar, settings_from
from skipwise.errors import UserError, unknown
from skipwise.loading import load_skeleton
from skipwise.plan import Plan, Provenance

if TYPE_CHECKING:
    from skipwise.finetuning.settings import FinetuneSettings
    from skipwise.finetuning.subject import Subject
    from skipwise.finetuning.train import TrainingSettings

RULE_HELP = "Which blocks: last (the default), middle (that of late=residual), or by the subject's words: vital, paper."
SET_HELP = (
    "Any other setting, name=value, such as late=residual, checkpointing=true, draws=16, center_crop=true, "
    "random_flip=true, guidance=1.0. Repeatable."
)
IMAGES_HELP = (
    "Folder of pictures of the subject, of any size: the shorter side is resized to --resolution, and crops are taken. "
    "Captions: NAME.txt, NAME.caption, or metadata.jsonl or .csv with file_name and text; "
    "\\[trigger] in them stands for --subject. See docs/finetuning.md."
)


def command(
    model: Annotated[str, typer.Argument(help="A diffusers pipeline: FLUX.1, SD3, SANA or PixArt; folder or hub id.")],
    images: Annotated[Path | None, typer.Option(help=IMAGES_HELP)] = None,
    prompt: Annotated[str, typer.Option(help='Of pictures without a caption: "a photo of sks dog".')] = "",
    subject: Annotated[str, typer.Option(help="The token that comes to name the subject.")] = "sks",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("runs/finetune"),
    plan: Annotated[Path | None, typer.Option(help="A plan whose `train` names the blocks.")] = None,
    blocks: Annotated[str, typer.Option(help="Train all, a number, a share of their bytes (50%), or 8GiB.")] = "all",
    rule: Annotated[str | None, typer.Option(help=RULE_HELP)] = None,
    memory: Annotated[str | None, typer.Option(help="Choose blocks and settings that fit, such as 8GiB.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the adapter (500).", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak (1e-4).")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of pictures in pixels (512).", min=1)] = None,
    patch: Annotated[int | None, typer.Option(help="Side of the crops that the model sees; none: whole ones.")] = None,
    class_images: Annotated[Path | None, typer.Option(help="Other things of its kind: prior preservation.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help="For these; the prompt without the token.")] = None,
    validate: Annotated[list[str] | None, typer.Option(help="Draw this prompt when done. Repeatable.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the adapter, the crops and the noise.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, and say how much memory it takes.")] = False,
    device: Device = None,
) -> None:
    """Train a LoRA that stock pipelines load, holding in memory only the blocks that are trained.

    Blocks that are not trained are left out of training, and what they would add is made beforehand, block by block,
    and stored. A run that was killed goes on when it is started again.

    Examples: skipwise finetune flux.1-dev --memory 12GiB --dry-run    |
    skipwise finetune FOLDER --images dog/ --prompt "a photo of sks dog" --blocks 50% --patch 256
    """
    given = {"steps": steps, "learning_rate": learning_rate, "resolution": resolution, "patch": patch, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None} | settings_from(
        settings or [], command
    )
    memory_settings, training = _split(changes)
    choice = Choice(model, plan, blocks, rule, memory, device)
    if images is None and not dry_run:
        raise UserError("Give --images, a folder of pictures of the subject, or --dry-run.")
    from skipwise.finetuning.checks import check
    from skipwise.finetuning.finetune import finetune
    from skipwise.finetuning.subject import Subject
    from skipwise.finetuning.validation import draw_pictures

    learnt = Subject(images, prompt, subject, class_images, class_prompt) if images else None
    check(model, memory_settings, training, subject=learnt, plan=choice.given(), weights=not dry_run)
    if dry_run or learnt is None:
        return _dry_run(choice, memory_settings, training, learnt)
    with progress_bar() as tell:
        chosen, memory_settings = choice.make(memory_settings, learnt, training.seed)
        adapter = finetune(
            model, learnt, output, chosen, memory_settings, training, device=device, on_progress=_shown(tell)
        )
    console.print(f"adapter: {adapter}", highlight=False)
    if (output / "residuals").exists():
        console.print(f"{output / 'residuals'} is kept for another run from the same draws; delete it to free the disk")
    for path in draw_pictures(
        model, output, validate or [], output / "validation", side=memory_settings.resolution,
        dtype=memory_settings.dtype, device=device, seed=training.seed,
    ):  # fmt: skip
        console.print(f"picture: {path}", highlight=False)


@dataclass(frozen=True)
class Choice:
    """How the command line says which blocks are trained."""

    model: str
    plan: Path | None = None
    blocks: str = "all"
    rule: str | None = None
    memory: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        given = {"--blocks": self.blocks != "all", "--memory": self.memory, "--plan": self.plan}
        named = [option for option, value in given.items() if value]
        if len(named) > 1:
            raise UserError(f"Give either {named[0]} or {named[1]}; each of them chooses the blocks.")
        if self.rule and self.blocks == "all":
            raise UserError(f"Rule {self.rule} chooses some of the blocks; say how many with --blocks, such as 50%.")

    def given(self) -> Plan | None:
        """The plan that is given as a file."""
        return Plan.load(self.plan) if self.plan else None

    def make(
        self, settings: "FinetuneSettings", subject: "Subject | None" = None, seed: int = 0
    ) -> "tuple[Plan | None, FinetuneSettings]":
        """The plan, None for all blocks, and the settings, which --memory may make cheaper."""
        from skipwise.finetuning.memory.fitting import cheapest
        from skipwise.finetuning.selection import select_blocks
        from skipwise.planners.vital import SCORED

        if self.memory:
            fit = cheapest(self.model, self.memory, settings)
            console.print(fit.sentence(), highlight=False)
            shape = find_contract(load_skeleton(self.model)).shape
            made_by = Provenance(method="memory", settings={"memory": self.memory})
            return Plan(model=shape, train={s: tuple(n) for s, n in fit.train.items()}, made_by=made_by), fit.settings
        if self.plan:
            return self.given(), settings
        if self.blocks == "all":
            return None, settings
        rule = self.rule or settings.rule
        if rule in SCORED and subject is None:
            raise UserError(f"Rule {rule} runs the model, which a dry run does not; leave --rule out, or say last.")
        return select_blocks(self.model, self.blocks, rule, subject, settings, device=self.device, seed=seed), settings


def _dry_run(
    choice: Choice, settings: "FinetuneSettings", training: "TrainingSettings", subject: "Subject | None"
) -> None:
    """Say what a run would do with the pictures, what it takes, and what this machine lacks for it."""
    from skipwise.finetuning.checks import check, check_machine

    plan, settings = choice.make(settings)
    tell = _shown(lambda *_: None)
    check(
        choice.model, settings, training, subject=subject, plan=plan, weights=False,
        tell=lambda line: tell("pictures", 0, 0, line),
    )  # fmt: skip
    print_estimate(choice, settings, plan)
    try:
        check_machine(settings, choice.device)
    except UserError as error:  # the run may be planned for another one
        console.print(f"on this machine: {error}", highlight=False, markup=False)


def print_estimate(choice: Choice, settings: "FinetuneSettings", plan: Plan | None) -> None:
    """What a fine-tuning takes, by part, from the config alone. plan: None trains all blocks."""
    from skipwise.finetuning.memory.estimate import estimate_memory
    from skipwise.report.memory import memory_notes, memory_table

    estimate = estimate_memory(choice.model, settings, plan.train if plan else None)
    console.print(memory_table(estimate))
    for line in memory_notes(estimate):
        console.print(line, highlight=False)


def _shown(tell: Callable[..., None]) -> Callable[[str, int, int, str], None]:
    """Bars; what has no end is announced in a line."""

    def show(what: str, done: int, total: int, detail: str) -> None:
        if total:
            tell(what, done, total, detail)
        else:
            console.print(f"{what}: {detail}", highlight=False, markup=False)  # a caption may have brackets

    return show


def _split(changes: dict[str, Any]) -> "tuple[FinetuneSettings, TrainingSettings]":
    """What is said of memory and what of training, each as its settings. Raises UserError for what is neither."""
    from skipwise.finetuning.settings import FinetuneSettings
    from skipwise.finetuning.train import TrainingSettings

    memory = FinetuneSettings(**_taken(changes, FinetuneSettings))
    training = TrainingSettings(**_taken(changes, TrainingSettings))
    if changes:
        legal = [field.name for kind in (FinetuneSettings, TrainingSettings) for field in fields(kind)]
        raise unknown("setting of a fine-tuning", next(iter(changes)), legal)
    return memory, training


def _taken(changes: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Those of the changes that are fields of `kind`, taken out of them."""
    names = {field.name for field in fields(kind)} - {"schedule"}
    return {name: changes.pop(name) for name in list(changes) if name in names}
