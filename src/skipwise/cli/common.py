"""What subcommands share: the console, progress bars, quiet libraries."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.models import ArgumentInfo, ParameterInfo

from skipwise.calibration import Calibration
from skipwise.errors import UserError
from skipwise.evaluation import calibration_texts
from skipwise.loading import dtype_name, load, read_device
from skipwise.plan import Plan

# a file or a pipe has no width of its own; rich would take 80 columns and cut
console = Console(width=None if sys.stdout.isatty() else 110)

ModelName = Annotated[
    str, typer.Argument(help="An embedded name (tiny-dllm), a folder, a hub id (org/name) or one file of weights.")
]


def _checked_device(device: str | None) -> str | None:
    """As given, where this machine has it: said before anything is loaded."""
    read_device(device)
    return device


Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.", callback=dtype_name),
]
JudgeDtype = Annotated[
    str,
    typer.Option(
        help="Of the judge's weights: float32, or bfloat16, which reads faster and rounds.", callback=dtype_name
    ),
]
WouldBeDtype = Annotated[
    str,
    typer.Option(
        help="What the weights would be held in: float32, bfloat16 or float16.",
        callback=lambda dtype: dtype_name(dtype) or "bfloat16",
    ),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda.", callback=_checked_device)]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Another tokenizer than the model's own: a folder, a hub id or a model's name."),
]


@contextmanager
def progress_bar() -> Iterator[Callable[..., None]]:
    """A function (what, done, total, detail="") that draws one bar for each thing that is going on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int, detail: str = "") -> None:
        bars.start()  # not before there is something to show: an error that comes first is one line
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], description=f"{what} {detail}".rstrip(), completed=done, total=total)

    try:
        yield tell
    finally:
        if tasks:
            bars.stop()


def calibrate(
    model: str,
    texts: Path | None,
    count: int,
    dtype: str | None,
    device: str | None,
    batch_size: int,
    tokenizer_name: str | None = None,
) -> Calibration:
    """The model loaded, with calibration texts from a file or built in."""
    network, tokenizer = load(model, dtype=dtype, device=device, tokenizer=tokenizer_name)
    chosen = read_lines(texts) if texts else calibration_texts(tokenizer, count)
    return Calibration.of(network, tokenizer, chosen, batch_size=batch_size)


def read_light(name: str) -> str | Plan:
    """What is light: a model's name as it is, or the plan of a .json file."""
    return Plan.load(name) if name.endswith(".json") else name


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file, each one text. Raises UserError for a file that cannot be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}. Give a file with one text a line.") from error


def settings_from(pairs: list[str], command: Callable[..., None], not_these: Iterable[str] = ()) -> dict[str, Any]:
    """`["seed=3", "forbid_neighbours=true"]` -> a dictionary; values are JSON, or else strings.

    command: whose option `--set` is. not_these: names that are no settings. Raises UserError for one of them, for what
    the command has an option for, and for a name that is given twice.
    """
    settings: dict[str, Any] = {}
    own = signature(command).parameters
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair} has no value; write --set {pair}=VALUE.")
        if key in own:
            raise UserError(f"--set {pair}: {key} is given by {_how(own[key])}, and not by --set.")
        if key in settings or key in not_these:
            raise UserError(
                f"--set {pair}: {key} is {'given twice' if key in settings else 'no setting'}; leave it out."
            )
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def _how(parameter: Parameter) -> str:
    """What a user types for a parameter of a command."""
    option = next(part for part in parameter.annotation.__metadata__ if isinstance(part, ParameterInfo))
    if isinstance(option, ArgumentInfo):
        return f"the argument {parameter.name.upper()}"
    return (option.param_decls or [f"--{parameter.name.replace('_', '-')}"])[0]
