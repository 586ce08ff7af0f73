"""``meshlib.delegate(path)``: where do calls under this name go, and why?

The name is followed as a client would follow it, every target on the way is resolved, and the answer is a `Delegation`,
which prints as a tree. Nothing is connected to, and nothing is left running.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import anyio

from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConfigurationError, ResolutionError
from ..core.supervisor import Supervisor
from .addr import Addr, Failed, Pending
from .base import BaseDtab
from .dtab import Dtab
from .path import Path
from .target import Target
from .watches import watch_of

if TYPE_CHECKING:
    from .clusters import OpenWatch
    from .delegation import Delegation

__all__ = ["delegate", "look"]

PATIENCE: Final = 3.0
"""Seconds that the targets have to be resolved, as a client's call would wait."""


async def delegate(
    path: str, dtab: str | Dtab | None = None, *, base: str | Dtab | None = None, resolve: bool = True
) -> Delegation:
    """Follow ``path`` to its targets, and tell the whole way: ``print(await meshlib.delegate("/s/users"))``.

    Args:
        path: The logical name.
        dtab: The local Dtab; if it is not given, that of the code that is running.
        base: The base Dtab, its text, or a target to read it from; if it is not given, ``MESHLIB_DTAB`` says.
        resolve: Look as well what each target stands for, for at most 3 s. Without, no share of the calls is known.

    Raises:
        ConfigurationError: ``path`` is no logical path, or ``base`` makes no sense.
        DtabError: A Dtab cannot be read.
        ResolutionError: The base could not be read within 3 s.
    """
    from .interpreter import follow  # 10 ms, which those who only import it are spared

    name = _path(path)
    local = Dtab.of_pairs(VAR.get().dtab)[0] if dtab is None else dtab if isinstance(dtab, Dtab) else Dtab(dtab)
    table = await _read(BaseDtab(base))
    found = follow(table + local, name, len(table))
    return await look(found, watch_of) if resolve else found


def _path(path: str) -> Path:
    target = Target.parse(path)
    if target.scheme != "path":
        raise ConfigurationError(f"delegate({path!r}): give a logical path, such as '/s/users'; this is bound already")
    return Path.parse(target.rest)


async def _read(base: BaseDtab) -> Dtab:
    env = Env(supervisor=Supervisor("delegate"))
    try:
        base.start(env)
        with anyio.move_on_after(PATIENCE):
            await base.current.wait_for(lambda table: table is not None)
    finally:
        await _close(env)
    if base.current.value is None:
        problem = base.problem or f"nothing was read from it within {PATIENCE:g} s"
        raise ResolutionError(f"there is no base Dtab: {base.target}: {problem}")
    return base.current.value


async def look(
    found: Delegation, open_watch: OpenWatch, known: Callable[[Target], Addr | None] = lambda _: None
) -> Delegation:
    """``found``, with what its targets stand for.

    Args:
        found: Where it leads.
        open_watch: Makes a watch for a target.
        known: What a target stands for, if that is known already.
    """
    env = Env(supervisor=Supervisor("delegate"))
    states: dict[Target, Addr] = {}
    watches = {}
    try:
        for target in found.targets():
            state = known(target)
            if state is not None and not isinstance(state, Pending):
                states[target] = state
                continue
            try:
                watches[target] = open_watch(target, env)
            except ConfigurationError as error:
                states[target] = Failed(error.message)
        for watch in watches.values():
            watch.start()
        with anyio.move_on_after(PATIENCE):
            for watch in watches.values():
                await watch.addr.wait_for(lambda state: not isinstance(state, Pending))
        states |= {target: watch.addr.value for target, watch in watches.items()}
    finally:
        for watch in watches.values():
            watch.close()  # others may share it, so it is not ended by ending what is ours
        await _close(env)
    return found.resolved(states.get)


async def _close(env: Env) -> None:
    with anyio.CancelScope(shield=True):
        await env.supervisor.aclose()
