"""One session with an ensemble: kazoo's threads on one side, an event loop on the other, and neither waits.

kazoo works in threads of its own: one that connects, one for watches, one for completions. All that happens there is
*posted* to the event loop (``call_soon_threadsafe``, or trio's equal), which never blocks the thread; when the loop has
ended, it goes nowhere. The loop's side only puts requests into kazoo's queue, and awaits an event.

`shared` gives the session of an ensemble to all in one event loop who ask for it. When the last has left, it lingers,
so that a watch that is started again finds its session; then a thread closes it.

A session that expires is replaced by kazoo, with a new `id`. A client whose connection thread has died, which kazoo
leaves as it is, is replaced here. Watches do not survive any of it: whoever follows a path reads again when `state`
becomes usable. Threads do not survive a fork: in a child process all of this refuses to work.
"""

from __future__ import annotations

import enum
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import anyio.lowlevel
from kazoo.client import KazooClient
from kazoo.exceptions import ConnectionLoss
from kazoo.protocol.states import KazooState, KeeperState
from kazoo.retry import KazooRetry

from ...core.errors import ServiceClosed
from ...core.var import Var
from .handler import Handler, Secret, quiet_logger
from .place import Ensemble
from .reads import Reads

__all__ = ["Session", "State", "shared"]

logger = logging.getLogger("meshlib.names.zookeeper")

LINGER = 10.0
"""Seconds that a session which nobody needs stays open: as long as Finagle's session timeout."""
RETRY_FIRST, RETRY_LAST = 0.05, 0.5
"""Seconds between rounds of attempts to connect, doubling, jittered by 40 %. ZooKeeper's own client waits up to 1 s.
Clients go on without ZooKeeper, but what they know ages: 2 s after an ensemble is back they are to know the truth."""
REVIVE: Final = 1.0
"""Seconds until a client whose threads have died is replaced."""


class State(enum.Enum):
    """What a session is good for."""

    CONNECTING = "connecting"
    """It has never been connected."""
    CONNECTED = "connected"
    """It reads and writes."""
    READ_ONLY = "read-only"
    """It reads what one server knows that is cut off from the others."""
    SUSPENDED = "suspended"
    """The connection is lost. The session, and its ephemeral nodes, may still be alive."""
    LOST = "lost"
    """The session has ended, and its ephemeral nodes with it. A new one is on its way."""

    @property
    def usable(self) -> bool:
        """Can it read?"""
        return self in (State.CONNECTED, State.READ_ONLY)


class Session:
    """A session. Get one from `shared`; all methods belong to that event loop.

    Attributes:
        ensemble: With whom.
        state: What it is good for now.
        id: ZooKeeper's number of the session, as in a node's ``ephemeralOwner``; 0 before there is one.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.state: Var[State] = Var(State.CONNECTING)
        self.id = 0
        self._pid = os.getpid()
        native: Any = anyio.lowlevel.current_token().native_token
        self._soon: Callable[..., Any] = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        self._followers: dict[str, list[tuple[Callable[[], None], Callable[[str], None] | None]]] = {}
        self._waiting: set[_Answer] = set()
        self._closing = False
        self._leases = 0
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._open()

    # --- for users: the event loop's side ---

    @property
    def problem(self) -> str:
        """Why there is no connection; empty when there is one, or nothing is known."""
        return "" if self.state.value.usable else self._handler.problem

    async def ready(self, writing: bool = False) -> None:
        """Wait until it can be used, for writing as well if so told."""
        self._check()
        good = (State.CONNECTED,) if writing else (State.CONNECTED, State.READ_ONLY)
        await self.state.wait_for(lambda state: state in good)

    async def call(self, operation: str, *args: Any, **options: Any) -> Any:
        """Do what kazoo's client does in its method ``operation``, such as ``get`` or ``create``, once connected.

        When cancelled, the operation may still be done.

        Raises:
            kazoo.exceptions.KazooException: It failed. `ConnectionLoss` and `SessionExpiredError` do not tell whether
                it was done.
        """
        await self.ready()
        answer = _Answer(self)
        getattr(self._client, f"{operation}_async")(*args, **options).rawlink(answer.arrived)
        return await answer.wait()

    async def read(self, nodes: Iterable[tuple[str, Any]], parse: Callable[[str, bytes], Any]) -> dict[str, Any]:
        """Read many nodes; see `Reads`. When the connection is lost, those that were not read are left out.

        Args:
            nodes: What to read: pairs of a path and a watch.
            parse: What to make of a path and its data. Runs in a thread; what it raises is that node's outcome.
        """
        await self.ready()
        answer = _Answer(self)
        reads = Reads(self._client, nodes, parse, lambda outcomes: self.post(answer.settle, outcomes, None))
        try:
            reads.pump()
            outcomes: dict[str, Any] = await answer.wait()
            return outcomes
        finally:
            reads.stop()

    @contextmanager
    def follow(
        self, path: str, changed: Callable[[], None], child: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        """Call ``changed``, in the loop, when a watch on ``path`` fires, and ``child`` with the name of a node in it
        when one on that does. Set watches with ``watch=session.fired``.

        ZooKeeper's watches fire once, and are forgotten when the connection is lost; see `state` for that.
        """
        entry = (changed, child)
        self._followers.setdefault(path, []).append(entry)
        try:
            yield
        finally:
            self._followers[path].remove(entry)
            if not self._followers[path]:
                del self._followers[path]

    def fired(self, event: Any) -> None:
        """The one watch function of this session, so that a watch which is set twice is one for kazoo."""
        if event.path:
            self.post(self._tell, event.path)

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run ``function`` in the event loop, soon. Never waits; may be called from any thread."""
        try:
            self._soon(function, *args)
        except RuntimeError:  # the loop has ended, and all who would want to know with it
            logger.debug("%s: its event loop has ended", self.ensemble)

    def __repr__(self) -> str:
        problem = f", {self.problem}" if self.problem else ""
        return f"<Session {self.ensemble}: {self.state.value.value}, id {self.id:#x}{problem}>"

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ServiceClosed(
                f"{self.ensemble}: this session belongs to the process {self._pid}, of which this one is a fork: "
                "threads do not survive a fork; make clients and servers after it"
            )

    def _tell(self, path: str) -> None:
        for changed, _ in tuple(self._followers.get(path, ())):
            changed()
        parent, _, name = path.rpartition("/")
        for _, child in tuple(self._followers.get(parent, ())):
            if child is not None:
                child(name)

    def _entered(self, state: State, identity: int) -> None:
        if state.usable:
            if self.state.value is not State.CONNECTING:
                logger.info("%s: connected again%s", self.ensemble, "" if identity == self.id else ", new session")
            self.id = identity
        elif state is not self.state.value:
            logger.info("%s: %s", self.ensemble, "connection lost" if state is State.SUSPENDED else "session lost")
        if state is not self.state.value:
            self.state.set(state)

    def _fail_all(self) -> None:
        for answer in tuple(self._waiting):
            answer.settle(None, ConnectionLoss("the client was replaced"))

    # --- kazoo's threads ---

    def _open(self) -> None:
        self._handler = Handler(self.ensemble)
        tls = self.ensemble
        client = KazooClient(
            hosts=self.ensemble.connect_string,
            timeout=self.ensemble.timeout,
            handler=self._handler,
            auth_data=[("digest", Secret(tls.secret))] if tls.secret else None,
            read_only=True,
            connection_retry=KazooRetry(max_tries=-1, delay=RETRY_FIRST, max_delay=RETRY_LAST, max_jitter=0.4),
            logger=quiet_logger(),
            use_ssl=tls.tls,
        )
        self._client = client
        client.add_listener(lambda state: self._listen(client, state))
        client.start_async()

    def _listen(self, client: Any, state: str) -> None:
        """Runs in the connection thread, where any call that waits for ZooKeeper would wait for ever."""
        if self._closing or client is not self._client:
            return
        keeper = client.client_state
        if state == KazooState.CONNECTED:
            usable = State.READ_ONLY if keeper == KeeperState.CONNECTED_RO else State.CONNECTED
            self.post(self._entered, usable, client.client_id[0] if client.client_id else 0)
            return
        self.post(self._entered, State.SUSPENDED if state == KazooState.SUSPENDED else State.LOST, 0)
        if keeper in (KeeperState.CLOSED, KeeperState.AUTH_FAILED):
            # Nobody has closed it: its thread has died of an error, or was refused. kazoo would stay like this.
            _later(REVIVE, self._revive, client)

    def _revive(self, dead: Any) -> None:
        _stop(dead)
        self.post(self._fail_all)  # what its threads have not answered, they never will
        with self._lock:
            if not self._closing:
                self._open()

    # --- leases ---

    def _acquire(self) -> bool:
        with self._lock:
            if self._closing or self._pid != os.getpid():
                return False
            self._leases += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return True

    def _release(self) -> None:
        with self._lock:
            self._leases -= 1
            if not self._leases and os.getpid() == self._pid:
                self._timer = _later(LINGER, self._close)

    def _close(self) -> None:
        with self._lock:
            if self._leases:
                return
            self._closing = True
        _stop(self._client)


class _Answer:
    """What an operation came to, once kazoo says so, in the event loop."""

    __slots__ = ("_event", "_session", "error", "value")

    def __init__(self, session: Session) -> None:
        self._event = anyio.Event()
        self._session = session
        self.value: Any = None
        self.error: BaseException | None = None

    async def wait(self) -> Any:
        self._session._waiting.add(self)
        try:
            await self._event.wait()
        finally:
            self._session._waiting.discard(self)
        if self.error is not None:
            raise self.error
        return self.value

    def arrived(self, result: Any) -> None:
        """Runs in kazoo's completion thread."""
        self._session.post(self.settle, result.value, result.exception)

    def settle(self, value: Any, error: BaseException | None) -> None:
        if not self._event.is_set():
            self.value, self.error = value, error
            self._event.set()


def _later(seconds: float, function: Callable[..., None], *args: Any) -> threading.Timer:
    """Run ``function`` in a thread, which does not keep the process alive. kazoo's `stop` waits for its own threads."""
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    timer.name = "meshlib zookeeper"
    timer.start()
    return timer


def _stop(client: Any) -> None:
    try:
        client.stop()
        client.close()
    except Exception:
        logger.debug("closing a ZooKeeper client", exc_info=True)


_SESSIONS: anyio.lowlevel.RunVar[dict[Ensemble, Session]] = anyio.lowlevel.RunVar("meshlib zookeeper sessions")


@contextmanager
def shared(ensemble: Ensemble) -> Iterator[Session]:
    """The session with ``ensemble`` of the event loop that runs now; it is connected in the background."""
    sessions = _SESSIONS.get({})
    _SESSIONS.set(sessions)
    session = sessions.get(ensemble)
    if session is None or not session._acquire():
        session = sessions[ensemble] = Session(ensemble)
        session._acquire()
    try:
        yield session
    finally:
        session._release()
