"""List and watch: a collection of the API server, followed.

`Follower.events` gives the whole collection (`Listed`), then each change (`Changed`), for as long as one likes. It is
client-go's reflector with its rules, each of which is somebody's outage:

- The first list may come from the API server's cache (``resourceVersion=0``); later ones must not be older than what is
  known already, or the past would come back. Lists are read in pages, and given when they are complete.
- A watch goes on from the list's version, not from that of its last item; bookmarks and events move it on.
- It ends after about five minutes, by agreement. That and a broken connection lose nothing: the next one goes on from
  the last version, at once the first time, then after jittered waits, which are reported (`Trouble`, `Resumed`).
- 410, as an answer or in an event, means that the version is forgotten there: the list is read anew.
- A connection that says nothing is not taken for a name that does not change, although it may be: bookmarks come every
  minute, but only where something else has changed. After a minute and a half of silence the watch is opened anew, and
  when that is silent too, the list is read anew.
- In any case it is read anew every half hour or so.

What cannot pass by itself, and what does not pass within about half a minute, is raised; whoever watches the watch (see
`meshlib.names.watch`) starts all over then, with the configuration and the authority's certificate read again.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import anyio
import anyio.to_thread
import httpx
import msgspec

from .answers import Refused, Status, of_status, pieces_of, refusal, whole

__all__ = ["Changed", "Collection", "Event", "Follower", "Gone", "Listed", "Resumed", "Trouble"]

T = TypeVar("T")

HOLD: Final = 280.0
"""Seconds for which a watch is asked for, give or take a tenth: 252 to 308. Proxies that cut after five minutes seldom
do so first, and a watch that they cut goes on from where it was all the same."""
IDLE: Final = 90.0
"""Seconds of silence that are believed: 1.5 of kube-apiserver's bookmark intervals (a minute, cacher.go)."""
RELIST: Final = 1800.0
"""Seconds after which the list is read anew at the end of a watch, jittered by a fifth."""
PAGE: Final = 500
"""Items on a page, as client-go's."""
MOST_ITEMS: Final = 100_000
LONGEST_LINE: Final = 8 * 1024 * 1024
"""Bytes of an event. An object in etcd has 1.5 MiB at most."""
LARGE: Final = 128 * 1024
"""Bytes of a page from which on it is read in a thread: 128 KiB take the loop about a millisecond."""
RETRY_FIRST, RETRY_LAST, TRIES = 0.1, 5.0, 10
"""Seconds before the watch is tried again, doubling, jittered by half; and how often. In all about 20 s."""
BRIEF: Final = 1.0
"""Seconds: a watch that ends sooner, without an event, has failed."""


@dataclass(frozen=True)
class Collection(Generic[T]):
    """What to follow.

    Attributes:
        path: Its path at the API server.
        resource: Its name with its group, for messages.
        namespace: Where.
        selector: Parameters that choose some of it: ``labelSelector``, ``fieldSelector``.
        decode: Reads one object; called in a thread for large lists. Raises msgspec's errors.
    """

    path: str
    resource: str
    namespace: str
    selector: tuple[tuple[str, str], ...]
    decode: Callable[[msgspec.Raw], T]


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """This is all of it."""

    items: tuple[T, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """The object of this name is deleted."""

    name: str


@dataclass(frozen=True, slots=True)
class Changed(Generic[T]):
    """What has come in one piece: objects that are new or have changed, and names of deleted ones, in order."""

    changes: tuple[T | Gone, ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """The watch is broken, and is being tried again."""

    cause: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """It works again, and nothing was lost."""


Event = Listed[T] | Changed[T] | Trouble | Resumed


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Meta(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""


class _Named(msgspec.Struct):
    metadata: _Meta


class _Change(msgspec.Struct):
    type: str
    object: msgspec.Raw


class Follower(Generic[T]):
    """Follows a collection.

    Args:
        client: Speaks to the API server. Not closed here.
        collection: What to follow.
        rng: Chance, for jitter.
        idle: Seconds of silence that are believed.
    """

    def __init__(
        self, client: httpx.AsyncClient, collection: Collection[T], rng: random.Random, idle: float = IDLE
    ) -> None:
        self._client, self._collection, self._rng = client, collection, rng
        self._timeout = httpx.Timeout(connect=5.0, read=idle, write=10.0, pool=10.0)
        self._version = "0"
        self._fresh = False  # does `version` belong to what was given out?
        self._tries = 0
        self._silences = 0
        self._troubled = False

    async def events(self) -> AsyncGenerator[Event[T], None]:
        """The collection, then what becomes of it.

        Raises:
            ConfigurationError: The API server does not let us; the message says what to do.
            ResolutionError: It does not answer as it should.
            httpx.TransportError: It cannot be reached.
        """
        ever = False
        relist = 0.0
        while True:
            began = anyio.current_time()
            try:
                if not self._fresh:
                    items = await self._list()
                    ever, self._fresh, self._troubled = True, True, False
                    relist = anyio.current_time() + RELIST * self._rng.uniform(0.8, 1.2)
                    yield Listed(items)
                    began = anyio.current_time()
                async with aclosing(self._watch()) as events:
                    async for event in events:
                        yield event
                self._fresh = anyio.current_time() < relist
                if anyio.current_time() - began >= BRIEF:
                    self._tries = 0
                    continue
                problem: Exception = Refused(f"watches of {self._collection.resource} end at once", 200)
            except Refused as error:
                problem = error
                if error.stale:
                    # The second time without anything between: only what is certainly the latest will do.
                    self._version = "" if not self._fresh else self._version
                    self._fresh = False
                    if self._tries == 0:
                        self._tries = 1
                        continue
            except httpx.ReadTimeout as error:
                problem = error
                self._silences += 1
                if self._fresh:
                    self._fresh = self._silences < 2
                    self._silences %= 2
                    continue
            except httpx.TransportError as error:
                problem = error
            except msgspec.DecodeError as error:
                problem = Refused(f"{self._collection.resource}: the API server's answer cannot be read: {error}", 200)
                self._fresh = False
            self._tries += 1
            asked_to_wait = isinstance(problem, Refused) and problem.rest > 0
            if self._tries > TRIES or not (ever or asked_to_wait):
                raise problem
            if self._tries > 1:
                self._troubled = True
                yield Trouble(f"{type(problem).__name__}: {problem}")
            await anyio.sleep(self._wait(problem))

    def _wait(self, problem: Exception) -> float:
        if isinstance(problem, Refused) and problem.rest:
            return problem.rest * self._rng.uniform(1.0, 1.5)
        return min(RETRY_LAST, RETRY_FIRST * 2.0 ** (self._tries - 1)) * self._rng.uniform(0.5, 1.0)

    # --- list ---------------------------------------------------------------------------------------------------------

    async def _list(self) -> tuple[T, ...]:
        items: list[T] = []
        token = ""
        while True:
            options = {"limit": str(PAGE)}
            if token:
                options["continue"] = token
            elif self._version:
                options["resourceVersion"] = self._version
                if self._version != "0":
                    options["resourceVersionMatch"] = "NotOlderThan"
            async with self._request("list", options) as response:
                body = await whole(response)
            if len(body) < LARGE:
                page, read = self._read(body)
            else:
                page, read = await anyio.to_thread.run_sync(self._read, body)
            items += read
            if len(items) > MOST_ITEMS:
                raise Refused(f"there are more than {MOST_ITEMS} {self._collection.resource}", 200)
            token = page.continue_
            if not token:
                if not page.resource_version:
                    raise Refused(f"the list of {self._collection.resource} has no resourceVersion", 200)
                self._version = page.resource_version
                return tuple(items)

    def _read(self, body: bytes) -> tuple[_ListMeta, list[T]]:
        # Item by item: other threads get their turn between two of them, the loop's in particular.
        page = msgspec.json.decode(body, type=_Page)
        return page.metadata, [self._collection.decode(item) for item in page.items or []]

    # --- watch --------------------------------------------------------------------------------------------------------

    async def _watch(self) -> AsyncGenerator[Event[T], None]:
        hold = HOLD * self._rng.uniform(0.9, 1.1)
        options = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(hold)),
            "resourceVersion": self._version,
        }
        async with self._request("watch", options) as response:
            if self._troubled:
                self._troubled = False
                yield Resumed()
            rest = b""
            async with pieces_of(response) as pieces:
                async for piece in pieces:
                    *lines, rest = (rest + piece).split(b"\n")
                    if len(rest) > LONGEST_LINE:
                        raise Refused(f"an event has more than {LONGEST_LINE} bytes", 200)
                    changes: list[T | Gone] = []
                    error: Exception | None = None
                    for line in filter(bytes.strip, lines):
                        try:
                            changes += self._change(line)
                        except Exception as caught:  # what came before it has moved the version on, so it must be told
                            error = caught
                            break
                        self._tries = self._silences = 0
                    if changes:
                        yield Changed(tuple(changes))
                    if error is not None:
                        raise error

    def _change(self, line: bytes) -> Iterator[T | Gone]:
        change = msgspec.json.decode(line, type=_Change)
        if change.type == "ERROR":
            status = msgspec.json.decode(change.object, type=Status)
            raise of_status(status, "watch", self._collection.resource, self._collection.namespace)
        meta = msgspec.json.decode(change.object, type=_Named).metadata
        if change.type in ("ADDED", "MODIFIED"):
            yield self._collection.decode(change.object)
        elif change.type == "DELETED":
            yield Gone(meta.name)
        self._version = meta.resource_version or self._version

    def _request(self, verb: str, options: dict[str, str]) -> _Answer:
        collection = self._collection
        request = self._client.build_request(
            "GET",
            collection.path,
            params={**dict(collection.selector), **options},
            # Not compressed: nothing small comes out large then, and it is the cheaper way within a data centre.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=self._timeout if verb == "watch" else httpx.USE_CLIENT_DEFAULT,
        )
        return _Answer(self._client, request, verb, collection.resource, collection.namespace)


class _Answer:
    """A good answer, to be read; closed at the end."""

    def __init__(self, client: httpx.AsyncClient, request: httpx.Request, verb: str, resource: str, where: str) -> None:
        self._client, self._request, self._words = client, request, (verb, resource, where)
        self._response: httpx.Response | None = None

    async def __aenter__(self) -> httpx.Response:
        self._response = await self._client.send(self._request, stream=True)
        if self._response.status_code == 200:
            return self._response
        try:
            raise await refusal(self._response, *self._words)
        finally:
            await self._response.aclose()

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            await self._response.aclose()
