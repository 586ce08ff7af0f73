"""Endpoints without a network: sessions and factories that do as they are told."""

import random

import anyio

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.health import Health
from meshlib.core.service import ServiceFactory
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Address
from meshlib.telemetry.metrics import Registry


class Session:
    """What a connector gives: answers at once with its number, until it leaves."""

    def __init__(self, number):
        self.number = number
        self.on_leave = None
        self.retired = 0
        self.requests = []

    async def __call__(self, request):
        self.requests.append(request)
        await anyio.lowlevel.checkpoint()
        return self.number

    def release(self):
        raise AssertionError("a shared session is not released by those who use it")

    def retire(self):
        self.retired += 1
        self.leave()

    def leave(self):
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()


class Factory(ServiceFactory):
    """Makes sessions, or fails: ``script`` says how each connect ends; afterwards all succeed.

    A step is an exception, or an event to wait for first, or ``None``.
    """

    def __init__(self, *script, takes=0.0):
        self.script = list(script)
        self.takes = takes
        self.times, self.sessions, self.contexts, self.cancelled = [], [], [], 0

    async def acquire(self):
        self.times.append(anyio.current_time())
        self.contexts.append(meshlib.current())
        step = self.script.pop(0) if self.script else None
        try:
            await anyio.sleep(self.takes)
            if isinstance(step, anyio.Event):
                await step.wait()
        except BaseException:
            self.cancelled += 1
            raise
        if isinstance(step, BaseException):
            raise step
        session = Session(len(self.sessions) + 1)
        self.sessions.append(session)
        return session


def make_env(seed=1, **more):
    """An endpoint's surroundings, with everything that can be looked at."""
    return Env(
        label="shop",
        name="the shops",
        clock=Clock(),
        rng=random.Random(seed),
        metrics=Registry(),
        supervisor=Supervisor("shop"),
        address=Address("h", 1),
        health=Health(),
        closers=[],
        **more,
    )
