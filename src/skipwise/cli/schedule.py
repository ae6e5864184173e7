"""`skipwise schedule`: which model, which blocks, at which step."""

import typer

from skipwise.cli import front

app = typer.Typer(help="Schedules: what steps are worth, and the search for plans with phases.", no_args_is_help=True)
app.command("front")(front.command)
