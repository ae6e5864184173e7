"""`skipwise schedule`: which model, or which blocks, at which denoising step."""

import typer

from skipwise.cli import importance

app = typer.Typer(help="Which model, or which blocks, at which denoising step.", no_args_is_help=True)
app.command("importance")(importance.command)


@app.callback()
def _keep_the_name() -> None:
    """A Typer app of one command would lose its name otherwise."""
