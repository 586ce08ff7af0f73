"""The one place where background tasks live.

A client or server owns a `Supervisor`, and everything that runs on its behalf (sessions, pings, watches, handlers)
runs in it. Each job is a task of its own that no caller's cancel scope encloses. That is what lets an object be opened
in one task and closed in another, with ``async with`` or bare: a task group held open across ``__aenter__`` and
``__aexit__`` could not be, and would die with the task that opened it.

anyio has no task without a parent, so here, and only here, we ask the event loop itself: asyncio's ``create_task`` or
trio's ``spawn_system_task``. Inside a job all is anyio's structured concurrency again.

A job that fails is logged and ends alone; its siblings live. `aclose` cancels what is left and waits for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio

from .errors import ServiceClosed

__all__ = ["Job", "Supervisor", "running_trio", "soon"]

logger = logging.getLogger("meshlib")


class Job:
    """One background task: its cancel scope, and the name it has in logs."""

    __slots__ = ("name", "scope", "task")

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope = anyio.CancelScope()
        self.task: Any = None

    def cancel(self) -> None:
        """Ask the job to stop. Does not wait."""
        self.scope.cancel()

    def __repr__(self) -> str:
        return f"<Job {self.name}>"


class Supervisor:
    """Owns background tasks.

    Args:
        name: Whose tasks these are, for logs.
    """

    __slots__ = ("_closed", "_idle", "_jobs", "_loop", "_trio", "name")

    def __init__(self, name: str = "meshlib") -> None:
        self.name = name
        self._jobs: set[Job] = set()
        self._closed = False
        self._idle: anyio.Event | None = None
        self._trio: Any = None
        self._loop: Any = None

    @property
    def jobs(self) -> int:
        """How many jobs are alive."""
        return len(self._jobs)

    @property
    def closed(self) -> bool:
        """Has `aclose` been called?"""
        return self._closed

    def start(
        self,
        function: Callable[..., Awaitable[Any]],
        *args: Any,
        name: str = "",
        context: contextvars.Context | None = None,
    ) -> Job:
        """Run ``function(*args)`` in the background.

        Args:
            function: What to run.
            args: Its arguments.
            name: For logs.
            context: The context variables it sees. By default none: background work outlives the call that happened
                to start it, and must not carry that call's deadline, trace or Dtab (Finagle clears them as well).

        Raises:
            ServiceClosed: The supervisor has been closed.
        """
        job = Job(name or getattr(function, "__qualname__", "job"))
        self.launch(job, function, args, contextvars.Context() if context is None else context)
        return job

    def launch(
        self, job: Job, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], context: contextvars.Context
    ) -> None:
        """As `start`, with a job that the caller has made, and may have told others of, before it runs.

        Raises:
            ServiceClosed: The supervisor has been closed.
        """
        if self._closed:
            raise ServiceClosed(f"{self.name} is closed")
        if self._trio is None:
            self._trio = running_trio()
            self._loop = _running_loop()
        loop = None if self._trio else asyncio.get_running_loop()
        self._jobs.add(job)
        if loop is None:
            spawn = self._trio.lowlevel.spawn_system_task
            job.task = spawn(self._run, job, function, args, name=job.name, context=context)
        else:
            job.task = loop.create_task(self._run(job, function, args), name=job.name, context=context)

    async def _run(self, job: Job, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        try:
            with job.scope:
                await function(*args)
        except Exception:
            logger.exception("%s: background job %s failed", self.name, job.name)
        finally:
            self._jobs.discard(job)
            job.task = None
            if self._idle is not None:
                self._idle.set()

    @property
    def elsewhere(self) -> bool:
        """Did its tasks run on an event loop that is not the one that runs now?"""
        return self._loop is not None and self._loop is not _running_loop()

    async def aclose(self) -> None:
        """Cancel every job and wait until it has ended. May be called in any task, one of its own jobs included."""
        self._closed = True
        await self._end()

    async def stop(self) -> None:
        """Cancel every job and wait until it has ended. More may be started afterwards, on another event loop too."""
        await self._end()
        self._trio = self._loop = None

    async def _end(self) -> None:
        if self.elsewhere:
            self._jobs.clear()  # their event loop has ended, and all tasks with it; there is nobody left to wait for
            return
        for job in tuple(self._jobs):
            if not _is_current(job):
                job.cancel()
        await self.join()

    async def join(self) -> None:
        """Wait until no job is left but the one that calls."""
        while any(not _is_current(job) for job in self._jobs):
            if self._idle is None or self._idle.is_set():
                self._idle = anyio.Event()
            await self._idle.wait()

    def __repr__(self) -> str:
        return f"<Supervisor of {self.name}: {len(self._jobs)} jobs{', closed' if self._closed else ''}>"


def soon() -> Callable[[Callable[[], Any]], None]:
    """What runs a function in the event loop that runs now, from anywhere: a signal handler, or another thread.

    It runs in a task, since anyio's scopes and events can be made nowhere else. Raises `RuntimeError` once the event
    loop has ended.
    """
    trio = running_trio()
    if trio:
        token = trio.lowlevel.current_trio_token()
        return lambda function: token.run_sync_soon(trio.lowlevel.spawn_system_task, _call, function)
    loop = asyncio.get_running_loop()

    def start(function: Callable[[], Any]) -> None:
        task = loop.create_task(_call(function))
        _CALLING.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(_CALLING.discard)

    def in_asyncio(function: Callable[[], Any]) -> None:
        loop.call_soon_threadsafe(start, function)

    return in_asyncio


async def _call(function: Callable[[], Any]) -> None:
    function()


_CALLING: Final[set[Any]] = set()


def _is_current(job: Job) -> bool:
    if job.task is None:
        return False
    trio = running_trio()
    return bool(job.task is (trio.lowlevel.current_task() if trio else asyncio.current_task()))


def _running_loop() -> Any:
    """The event loop that runs now, as something to compare; ``None`` without one."""
    trio = running_trio()
    if trio:
        return trio.lowlevel.current_trio_token()
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def running_trio() -> Any:
    """The module trio, if it runs the current task, else ``False``. Never imports it."""
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_run() else False
