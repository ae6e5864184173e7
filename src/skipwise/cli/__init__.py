"""The command line: one small file a subcommand, each a thin call of one public function."""

import os

# Before torch is loaded: threads that wait by spinning make a small model 40 times slower on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before diffusers is: what it warns of (casts on the meta device, adapters without text encoders) is meant.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import typer

from skipwise.cli import (
    analyze,
    bench,
    demo,
    evaluate,
    export,
    finetune,
    generate,
    heal,
    inspect,
    judge,
    lm_eval,
    plan,
    report,
    schedule,
    zoo,
)
from skipwise.errors import as_one_line

app = typer.Typer(
    help="Find the computation that a diffusion transformer does not need, skip it, and know what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.command)
app.command("analyze")(analyze.command)
app.command("plan")(plan.command)
app.command("heal")(heal.command)
app.command("finetune")(finetune.command)
app.command("generate")(generate.command)
app.command("eval")(evaluate.command)
app.command("bench")(bench.command)
app.command("judge")(judge.command)
app.command("export")(export.command)
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.command)
app.command("report")(report.command)
app.command("demo")(demo.command)
app.add_typer(schedule.app, name="schedule")
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    with as_one_line():
        app()
