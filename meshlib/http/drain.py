"""SIGTERM: the app drains before the server that runs it is told to stop.

Servers close their door at once. Then a client with a kept connection may be in the middle of sending on it, and one
that has not heard yet finds nobody. So for `LINGER` the app goes on, not ready any more, and ends each connection with
its next answer; after that the server gets the signal that it would have got, and what it had in place for it happens.
A second SIGTERM is passed on at once. Where nobody listened before, to pass it on is to end the process: there it is
passed on once nothing is under way.
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


class Link:
    """One watcher's place in the chain of those who listen for SIGTERM. Called as the signal's handler.

    A watcher that has ended may stay in the chain, if another took the place after it: what it hears then goes on to
    whoever listened before.

    Args:
        heard: Called with the signal, until `heard` is taken away.
        previous: Who listened before.
    """

    def __init__(self, heard: Callable[[], Any], previous: Any) -> None:
        self.heard: Callable[[], Any] | None = heard
        self.previous: Any = signal.SIG_DFL if previous is None else previous

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        if self.heard is not None:
            self.heard()
        elif callable(self.previous):
            self.previous(number, frame)
        elif self.previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class SignalWatch:
    """Hears SIGTERM before whoever listened for it.

    Args:
        told: Called in the event loop with the first; it calls `pass_on` when it is done.
    """

    def __init__(self, told: Callable[[], Any]) -> None:
        self._told = told
        self._link: Link | None = None
        self._heard = False
        self._soon: Callable[[Callable[[], Any]], Any] | None = None

    @property
    def watching(self) -> bool:
        """Is it in place?"""
        return self._link is not None

    @property
    def alone(self) -> bool:
        """Does nobody else listen, so that to pass the signal on is to end the process at once?"""
        listener: Any = self._link
        while isinstance(listener, Link):
            listener = listener.previous
        return bool(listener == signal.SIG_DFL)

    def start(self) -> None:
        """Take the place. Only the main thread can; elsewhere nothing happens, as no signal comes there."""
        if self.watching or threading.current_thread() is not threading.main_thread():
            return
        self._soon, self._heard = soon(), False
        self._link = Link(self._hear, _living(signal.getsignal(signal.SIGTERM)))
        signal.signal(signal.SIGTERM, self._link)

    def _hear(self) -> None:
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
        link: Any = self._link
        if link is None:
            return False
        self._link = self._soon = None
        link.heard = None
        in_place: Any = signal.getsignal(signal.SIGTERM)
        if in_place is link and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _living(link.previous))
        return True


def _living(listener: Any) -> Any:
    """Whoever it is that hears what ``listener`` is told."""
    while isinstance(listener, Link) and listener.heard is None:
        listener = listener.previous
    return listener
