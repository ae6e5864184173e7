"""Kill a writer before and after each thing that it does to files, and look at what is left."""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

OPERATIONS = (
    *((os, name) for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "chmod", "close")),
    *((shutil, name) for name in ("copyfile", "move")),
)


def crash_points(prepare: Callable[[], None], write: Callable[[], object]) -> Iterator[int]:
    """Yield after every crash, with its number: `prepare`, then `write` in a process that is killed there.

    The last is a `write` that is let be. A fault of the writer itself ends the test.
    """
    point = 0
    while True:
        point += 1
        prepare()
        status = _forked(write, point)
        yield point
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "the writer failed"
            return


def _forked(write: Callable[[], object], point: int) -> int:
    """The exit status of a child that is killed at a point; with a point that is never reached it ends by itself."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:  # the child: it must not come back into the test
        _arm(point)
        write()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def _arm(point: int) -> None:
    count = 0

    def armed(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            for after in (False, True):
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not after:
                    result = function(*args, **kwargs)
            return result

        return call

    for module, name in OPERATIONS:
        setattr(module, name, armed(getattr(module, name)))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
