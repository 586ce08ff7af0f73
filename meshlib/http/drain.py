"""SIGTERM: the app drains before the server that runs it is told to stop.

Servers close their door at once. Then a client with a kept connection may be in the middle of sending on it, and one
that has not heard yet finds nobody. So for `LINGER` the app goes on, not ready any more, and ends each connection with
its next answer; after that the server gets the signal that it would have got, and what it had in place for it happens.
A second SIGTERM is passed on at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, Final

from ..core.supervisor import soon

__all__ = ["LINGER", "SignalWatch"]

LINGER: Final = 1.0
"""Seconds from SIGTERM until the server is told: a connection that is used at least once a second ends with an answer,
and registries have been heard by then. Short beside the 30 s that Kubernetes allows."""


class SignalWatch:
    """Hears SIGTERM before whoever listened for it.

    Args:
        told: Called in the event loop with the first; it calls `pass_on` when it is done.
    """

    def __init__(self, told: Callable[[], Any]) -> None:
        self._told = told
        self._previous: Any = None
        self._heard = False
        self._soon: Callable[[Callable[[], Any]], Any] | None = None

    @property
    def watching(self) -> bool:
        """Is it in place?"""
        return self._soon is not None

    def start(self) -> None:
        """Take the place. Only the main thread can; elsewhere nothing happens, as no signal comes there."""
        if self.watching or threading.current_thread() is not threading.main_thread():
            return
        self._soon, self._heard = soon(), False
        self._previous = signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        if self._heard or self._soon is None:
            self.pass_on()
            return
        self._heard = True
        try:
            self._soon(self._told)
        except RuntimeError:  # the loop has ended
            self.pass_on()

    def pass_on(self) -> None:
        """Give the signal to whoever listened before."""
        if self.stop():
            signal.raise_signal(signal.SIGTERM)

    def stop(self) -> bool:
        """Give the place back; ``False`` if it was not in place."""
        if not self.watching:
            return False
        self._soon = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == self._hear:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
        return True
