"""`skipwise lm-eval`: lm-eval's command line, with the model `skipwise` in its table."""

import importlib
import sys

import typer

from skipwise.errors import require

# every argument is lm-eval's, --help too
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def command(context: typer.Context) -> None:
    """Run lm-eval, which then knows the model `skipwise`; all arguments are lm-eval's own.

    Example: skipwise lm-eval --model skipwise --model_args pretrained=tiny-dllm,plan=plan.json --tasks gsm8k
    On several GPUs: accelerate launch -m skipwise lm-eval ...
    """
    require("lm_eval", "eval")
    importlib.import_module("skipwise.evaluation.harness")  # registers the model
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
