"""Workers on a Ray cluster (extra `ray`): actors, each a process that keeps its models."""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from skipwise.errors import UserError, require
from skipwise.scheduling.processes import ENVIRONMENT, environment
from skipwise.scheduling.trials import Outcome, Trial, Work
from skipwise.scheduling.workers import ATTEMPTS, Answering, Failed

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "600",  # on a busy machine torch alone takes a minute to load
}


class Cluster:
    """A pool of Ray actors. `workers`: how many there can be, no more than were asked for.

    Raises UserError when Ray is not installed, or there is no cluster at `address`.
    """

    def __init__(self, work: Work, workers: int, address: str | None = None):
        path = os.pathsep.join(path for path in sys.path if path)  # workers import what this process does
        with environment(SETTINGS | ENVIRONMENT | {"PYTHONPATH": path}):
            self.ray: Any = require("ray", "ray")
            self.own = not self.ray.is_initialized()
            if self.own:
                self._connect(workers, address)
        self.work = self.ray.put(work)
        self.actor = self._actor(work, workers)
        self.workers = self._fitting(workers)
        self.running: dict[Any, Any] = {}  # worker -> the answer that it owes

    def _connect(self, workers: int, address: str | None) -> None:
        if address:
            _check_address(address)
        # Ray gives a local cluster 30 seconds to start, which a busy machine may not hold: try again
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        for _ in range(1 if address else ATTEMPTS):
            try:
                self.ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
                return
            except Exception as error:  # Ray has no class of its own for this
                self.ray.shutdown()
                reason = str(error).strip().partition("\n")[0]
        where = f"reached at {address}" if address else "started here"
        raise UserError(f"Ray could not be {where}: {reason} Use another address, or --engine processes.")

    def _actor(self, work: Work, workers: int) -> Any:
        """The actor class: one core each, and a share of the GPUs where the work is on them."""
        gpus = self.ray.cluster_resources().get("GPU", 0.0) if (work.device or "").startswith("cuda") else 0.0
        remote = self.ray.remote(
            num_cpus=1,
            num_gpus=min(1.0, gpus / workers),
            max_restarts=0,  # a fresh one is started here, and what was lost is known
            runtime_env=None if self.own else {"env_vars": ENVIRONMENT},
        )
        return remote(_Actor)

    def _fitting(self, workers: int) -> int:
        cores = int(self.ray.cluster_resources().get("CPU", 0))
        if cores < 1:
            raise UserError("The Ray cluster has no CPU core to run workers on; add a node.")
        return min(workers, cores)

    def start(self) -> Any:
        """A fresh actor."""
        return self.actor.remote(self.work, os.getcwd())

    def give(self, worker: Any, trial: Trial) -> None:
        """Send a trial."""
        self.running[worker] = worker.answer.remote(trial)

    def wait(self, workers: Sequence[Any]) -> tuple[Any, Outcome | Failed | None]:
        """The next of these to answer, and its answer; None when it died."""
        ready, _ = self.ray.wait([self.running[worker] for worker in workers], num_returns=1)
        worker = next(worker for worker in workers if self.running[worker] == ready[0])
        del self.running[worker]
        try:
            return worker, self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError:
            raise  # a mistake of this module: a trial's own exceptions are answers
        except self.ray.exceptions.RayError:
            return worker, None  # killed, out of memory, its node lost, never started

    def stop(self, worker: Any) -> None:
        """Kill an actor."""
        self.running.pop(worker, None)
        self.ray.kill(worker)

    def close(self) -> None:
        """End the cluster that was started here; of another one, the actors end as nobody holds them any more."""
        self.running.clear()
        if self.own:
            self.ray.shutdown()


class _Actor:
    """A worker. folder: where the search was started, as models may be named by relative paths."""

    def __init__(self, work: Work, folder: str):
        if os.path.isdir(folder):
            os.chdir(folder)
        self._answer = Answering(work)

    def answer(self, trial: Trial) -> Outcome | Failed:
        return self._answer(trial)


def _check_address(address: str) -> None:
    """Raise UserError when nobody answers at HOST:PORT; Ray itself would try for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return  # such as "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"There is no Ray cluster at {address} ({error.strerror or error}); start one with `ray start --head`, or "
            "leave the address out for a local one."
        ) from error
