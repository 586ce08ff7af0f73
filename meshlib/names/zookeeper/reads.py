"""Many nodes read at once, without the event loop: kazoo's completion thread asks for the next when one has come.

A listing of 10,000 members is 10,000 reads. Through the event loop each would wake it; here it is woken once, when all
have been read and understood. A window bounds what is in flight, as Finagle's does.

The first sign of a lost connection ends it: what has been read counts, the rest is left for later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

from kazoo.exceptions import ConnectionClosedError, ConnectionLoss, NoNodeError, SessionExpiredError

__all__ = ["Reads"]

WINDOW: Final = 100
"""Reads in flight (Finagle: ServiceDiscoverer.scala)."""


class Reads:
    """Reads nodes and hands over what became of each: what ``parse`` made of it, ``None`` for a node that is not there,
    or the exception.

    Args:
        client: kazoo's.
        jobs: Each node's path, and the watch to set on it.
        parse: What to make of a path and its data. Runs in kazoo's thread; may raise.
        done: Told the outcomes by path, once, in kazoo's thread.
    """

    def __init__(
        self,
        client: Any,
        jobs: Iterable[tuple[str, Any]],
        parse: Callable[[str, bytes], Any],
        done: Callable[[dict[str, Any]], None],
    ) -> None:
        self._client = client
        self._jobs: Iterator[tuple[str, Any]] = iter(jobs)
        self._parse = parse
        self._done = done
        self._outcomes: dict[str, Any] = {}
        self._flying = 0
        self._pumping = False
        self._ended = False
        self._lock = threading.Lock()

    def pump(self) -> None:
        """Ask for as many as the window allows. Never recursive: a client that is closed answers from within."""
        with self._lock:
            if self._pumping:
                return
            self._pumping = True
        while True:
            with self._lock:
                job = next(self._jobs, None) if self._flying < WINDOW else None
                if job is None:
                    self._pumping = False
                    ended = not self._flying and not self._ended
                    self._ended |= ended
                    break
                self._flying += 1
            self._client.get_async(job[0], watch=job[1]).rawlink(partial(self._arrived, job[0]))
        if ended:
            self._done(self._outcomes)

    def stop(self) -> None:
        """Ask for no more."""
        with self._lock:
            self._jobs = iter(())

    def _arrived(self, path: str, result: Any) -> None:
        error = result.exception
        try:
            if error is None:
                outcome = self._parse(path, result.value[0])
            else:
                outcome = None if isinstance(error, NoNodeError) else error
        except Exception as wrong:
            outcome = wrong
        with self._lock:
            self._outcomes[path] = outcome
            self._flying -= 1
        if isinstance(error, ConnectionLoss | ConnectionClosedError | SessionExpiredError):
            self.stop()
        self.pump()
