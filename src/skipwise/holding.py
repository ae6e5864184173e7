"""Who changes a model: one thread, and in it one asyncio task, at a time."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from skipwise.errors import UserError

_lock = threading.Lock()


@dataclass
class _Holder:
    who: tuple[int, int]
    times: int = 0


_holders: WeakKeyDictionary[nn.Module, _Holder] = WeakKeyDictionary()


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """The model is this thread's and task's to change inside of the `with`, which may be nested.

    Raises UserError while it is another's: a wait could be for ever, as that one may wait for this.
    """
    with _lock:
        holder = _holders.setdefault(model, _Holder(_me()))
        if holder.who != _me():
            raise UserError(
                f"A plan of another thread or task is in force on this {type(model).__name__}; enter plans of one "
                "model one after the other (under a threading.Lock of your own), or load the model once for each."
            )
        holder.times += 1
    try:
        yield
    finally:
        with _lock:
            holder.times -= 1
            if not holder.times:
                _holders.pop(model, None)


def _me() -> tuple[int, int]:
    try:
        task = id(asyncio.current_task())
    except RuntimeError:  # no loop is running
        task = 0
    return threading.get_ident(), task
