"""What a worker of any kind does, and how what goes wrong in it comes back."""

import traceback
from dataclasses import dataclass

from skipwise.errors import UserError
from skipwise.scheduling.trials import OpenWork, Outcome, Trial, Work

ATTEMPTS = 3  # of one trial, before its worker's death is taken for its own doing


@dataclass(frozen=True)
class Failed:
    """An exception inside a trial. is_users: a mistake in what was asked for."""

    message: str
    is_users: bool

    def error(self, trial: Trial) -> Exception:
        """The exception to raise here for the one in the worker."""
        return (
            UserError(self.message) if self.is_users else TrialError(f"{trial} failed in its worker:\n{self.message}")
        )


class TrialError(RuntimeError):
    """An exception inside a trial in another process, with its traceback."""


class Answering:
    """What a worker does: opens the work at its first trial, once, and answers each trial."""

    def __init__(self, work: Work):
        self.work = work
        self.opened: OpenWork | None = None

    def __call__(self, trial: Trial) -> Outcome | Failed:
        """The outcome, or what went wrong."""
        try:
            self.opened = self.opened or self.work.open()
            return self.opened.run(trial)
        except UserError as error:
            return Failed(str(error), True)
        except Exception:
            return Failed(traceback.format_exc(), False)
