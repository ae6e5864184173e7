"""The engine: runs trials in this process, in local worker processes or on a Ray cluster, with equal outcomes.

    with open_engine(work, "processes", workers=2) as engine:
        for trial, outcome in engine.run(trials): ...

A worker that dies (killed, out of memory) loses the trial it was at, which another one runs again; an exception inside
a trial is a mistake that would come again, and is raised here.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from skipwise.errors import UserError, unknown
from skipwise.scheduling.cluster import Cluster
from skipwise.scheduling.processes import Processes
from skipwise.scheduling.trials import OpenWork, Outcome, Trial, Work
from skipwise.scheduling.workers import ATTEMPTS, Failed

ENGINES = ("inline", "processes", "ray")

Finished = tuple[Trial, Outcome]


class Engine(Protocol):
    """What runs trials."""

    def run(self, trials: Iterable[Trial]) -> Iterator[Finished]:
        """Trials with their outcomes, in the order in which they finish."""
        ...

    def close(self) -> None:
        """End whatever was started."""
        ...


class Pool(Protocol):
    """A kind of workers. A worker is whatever `start` returns, and can be hashed."""

    def start(self) -> Any:
        """A fresh worker."""
        ...

    def give(self, worker: Any, trial: Trial) -> None:
        """Let an idle worker run a trial; a worker that is dead by now is found by `wait`."""
        ...

    def wait(self, workers: Sequence[Any]) -> tuple[Any, Outcome | Failed | None]:
        """The next of these workers to answer, and its answer; None when it died."""
        ...

    def stop(self, worker: Any) -> None:
        """End a worker, whatever it is at."""
        ...

    def close(self) -> None:
        """End all that was started."""
        ...


class Inline:
    """Trials in this process."""

    def __init__(self, work: Work):
        self.work = work
        self.opened: OpenWork | None = None

    def run(self, trials: Iterable[Trial]) -> Iterator[Finished]:
        """Trials with their outcomes, in order."""
        for trial in trials:
            self.opened = self.opened or self.work.open()
            yield trial, self.opened.run(trial)

    def close(self) -> None:
        """Let the models go."""
        self.opened = None


class Workers:
    """Trials on the workers of a pool, each of which stays for as long as the engine is open."""

    def __init__(self, pool: Pool, count: int):
        self.pool, self.count = pool, count
        self.idle: list[Any] = []

    def run(self, trials: Iterable[Trial]) -> Iterator[Finished]:
        """Trials with their outcomes, in the order in which they finish."""
        waiting = deque((trial, 1) for trial in trials)
        running: dict[Any, tuple[Trial, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.count:
                    worker = self.idle.pop() if self.idle else self.pool.start()
                    running[worker] = waiting.popleft()
                    self.pool.give(worker, running[worker][0])
                worker, answer = self.pool.wait(list(running))
                trial, attempt = running.pop(worker)
                if answer is None:
                    self.pool.stop(worker)
                    waiting.appendleft((trial, _next_attempt(trial, attempt)))
                    continue
                self.idle.append(worker)
                if isinstance(answer, Failed):
                    raise answer.error(trial)
                yield trial, answer
        finally:
            for worker in running:  # the caller wants no more: these are in the middle of something
                self.pool.stop(worker)

    def close(self) -> None:
        """End all workers."""
        self.idle.clear()
        self.pool.close()


def _next_attempt(trial: Trial, attempt: int) -> int:
    if attempt == ATTEMPTS:
        raise UserError(
            f"The worker died {ATTEMPTS} times at {trial}; it may need more memory than there is: use fewer workers or "
            "smaller batches."
        )
    return attempt + 1


@contextmanager
def open_engine(work: Work, engine: str = "inline", workers: int = 2, address: str | None = None) -> Iterator[Engine]:
    """An engine for the trials of a work, closed at the end of the `with`, also on an exception.

    engine: "inline", this process; "processes", local ones (started anew, so a script that asks for them guards its
    main part with `if __name__ == "__main__"`); "ray", actors on the cluster at `address`, or a local one that is
    started and ended here. Raises UserError for another one, for no workers, and when Ray is not there.
    """
    if workers < 1:
        raise UserError(f"workers={workers}; at least one is needed.")
    opened = _open(work, engine, workers, address)
    try:
        yield opened
    finally:
        opened.close()


def _open(work: Work, engine: str, workers: int, address: str | None) -> Engine:
    if engine == "inline":
        return Inline(work)
    if engine == "processes":
        return Workers(Processes(work), workers)
    if engine == "ray":
        cluster = Cluster(work, workers, address)
        return Workers(cluster, cluster.workers)
    raise unknown("engine", engine, ENGINES)


def run(
    work: Work,
    trials: Iterable[Trial],
    engine: str = "inline",
    workers: int = 2,
    address: str | None = None,
    on_result: Callable[[Trial, Outcome], None] | None = None,
) -> Iterator[Finished]:
    """Trials with their outcomes as they finish, on an engine that is opened for them alone (see `open_engine`)."""
    with open_engine(work, engine, workers, address) as opened:
        for trial, outcome in opened.run(trials):
            if on_result:
                on_result(trial, outcome)
            yield trial, outcome
