"""What a host knows of the thread that it runs in: the open call, pauses, and the generation under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from geohooks.call import Call, Generation

__all__ = ["Current", "silent"]


class Current(threading.local):
    """One host's state in the calling thread; each thread sees its own."""

    call: Call | None = None
    paused: int = 0
    recomputing: bool = False
    generation: Generation | None = None

    def __init__(self) -> None:
        super().__init__()
        _live.add(self)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is heard inside, in this thread."""
        call, self.call = self.call, None
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
            self.call = call

    @contextmanager
    def recompute(self, call: Call) -> Iterator[None]:
        """Inside, what a checkpoint recomputes belongs to `call`, also in another thread than it began in."""
        before = self.call, self.recomputing
        self.call, self.recomputing = call, True
        try:
            yield
        finally:
            self.call, self.recomputing = before


_live: weakref.WeakSet[Current] = weakref.WeakSet()


@contextmanager
def silent() -> Iterator[None]:
    """No host hears anything inside, in this thread: a reference answers, or a weight is read."""
    with ExitStack() as stack:
        for current in tuple(_live):
            stack.enter_context(current.pause())
        yield
