"""Worker processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from skipwise.scheduling.trials import Outcome, Trial, Work
from skipwise.scheduling.workers import Answering, Failed

# Torch's pool of threads is made when it is loaded; one that is larger than what is used only costs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Worker:
    """A process and this end of its pipe."""

    process: SpawnProcess
    connection: Connection

    def __hash__(self) -> int:
        return id(self)


class Processes:
    """A pool of spawned processes: forked ones would inherit the locks of torch's threads."""

    def __init__(self, work: Work):
        self.work = work
        self.context = multiprocessing.get_context("spawn")
        self.workers: set[Worker] = set()

    def start(self) -> Worker:
        """A fresh process, a daemon: it ends when this one does."""
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, self.work), daemon=True)
        with environment(ENVIRONMENT):
            process.start()
        theirs.close()  # else its death would leave the pipe open
        worker = Worker(process, mine)
        self.workers.add(worker)
        return worker

    def give(self, worker: Worker, trial: Trial) -> None:
        """Send a trial."""
        with suppress(OSError):  # it is dead: `wait` reads the end of its pipe
            worker.connection.send(trial)

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Outcome | Failed | None]:
        """The next of these to answer, and its answer; None when it died."""
        ready = wait([worker.connection for worker in workers])
        worker = next(worker for worker in workers if worker.connection in ready)
        try:
            return worker, worker.connection.recv()
        except (EOFError, OSError):
            return worker, None

    def stop(self, worker: Worker) -> None:
        """Kill a process and wait for its end."""
        self.workers.discard(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def close(self) -> None:
        """Kill all: a worker holds nothing that could be lost."""
        for worker in list(self.workers):
            self.stop(worker)


def serve(connection: Connection, work: Work) -> None:
    """The life of a worker: answer trials until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    threading.Thread(target=_die_with_parent, daemon=True).start()
    answer = Answering(work)
    with suppress(EOFError, OSError):
        while True:
            connection.send(answer(connection.recv()))


def _die_with_parent() -> None:
    """A parent that was killed ends no child; a long trial should not go on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started within, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
