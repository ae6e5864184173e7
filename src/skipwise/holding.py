"""Who changes a model: one thread, and in it one asyncio task, at a time, with what these have started meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from skipwise.errors import UserError

_lock = threading.RLock()  # a generator that is collected meanwhile may leave a claim


@dataclass(eq=False)
class _Claim:
    times: int = 0


_claims: WeakKeyDictionary[nn.Module, _Claim] = WeakKeyDictionary()
# the claims that this thread or task is inside of; what a task starts takes them along (contextvars), a new thread none
_inside: ContextVar[frozenset[_Claim]] = ContextVar("claims", default=frozenset())


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """The model is this thread's and task's to change inside of the `with`, which may be nested.

    Raises UserError while it is another's: a wait could be for ever, as that one may wait for this.
    """
    with _lock:
        claim = _claims.setdefault(model, _Claim())
        if claim.times and claim not in _inside.get():
            raise UserError(
                f"A plan of another thread or task is in force on this {type(model).__name__}; enter plans of one "
                "model one after the other (under a threading.Lock of your own), or load the model once for each."
            )
        claim.times += 1
    before = _inside.set(_inside.get() | {claim})
    try:
        yield
    finally:
        with suppress(ValueError):  # left in another task than it was entered in
            _inside.reset(before)
        with _lock:
            claim.times -= 1
            if not claim.times:
                _claims.pop(model, None)
