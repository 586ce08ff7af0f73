"""An API server for tests: the part of Kubernetes' API that lists and watches, over real HTTP/1.1, in a thread.

`ApiServer` keeps objects in memory as etcd would: each write has the next resource version, lists are of one version,
and watches begin at one, replay what has happened since, and go on. What its answers look like was taken down from
kube-apiserver 1.34, and `tests/names/test_kubernetes_double.py` holds both against the same questions.

Beyond what a real one does, it misbehaves when told to: forgets its history, falls silent, cuts lines, resets
connections, refuses, is slow, and is stopped and started again on its port.

Its methods may be called from any thread, so from tests on any event loop; each returns when what it says is so.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gzip
import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import h11

from .api import KINDS, KubernetesApi
from .certificates import Certificates
from .query import Key, Query, Refusal, Request, asked, forbidden, not_found

__all__ = ["ApiServer", "Request"]

T = TypeVar("T")
COMPRESSED = 128 * 1024
"""Bytes above which the real server compresses an answer for those who take gzip."""


@dataclass(frozen=True)
class _Stored:
    """An object as it was at one version: as an item of a list, and by itself, which names its kind."""

    version: int
    key: Key
    body: dict[str, Any]
    item: bytes
    text: bytes

    def chosen_by(self, query: Query) -> bool:
        metadata = self.body["metadata"]
        return query.has(self.key) and query.labels(metadata.get("labels", {})) and query.fields(metadata)


@dataclass(frozen=True)
class _Change:
    """A write: what was there, and what is there now (on deletion: its last state, with the version of its end)."""

    version: int
    before: _Stored | None
    after: _Stored
    deleted: bool

    def line(self, query: Query) -> bytes | None:
        """The event that a watch sees of it."""
        was = self.before is not None and self.before.chosen_by(query)
        is_ = not self.deleted and self.after.chosen_by(query)
        if not (was or is_):
            return None
        kind = b"MODIFIED" if was and is_ else b"ADDED" if is_ else b"DELETED"
        return b'{"type":"%s","object":%s}\n' % (kind, self.after.text)


class Dropped(Exception):
    """This connection ends here and now."""


@dataclass(eq=False)
class _Watch:
    """A watch that runs: lines to be sent, and how it is to end, if it is."""

    query: Query
    bookmarks: bool
    lines: deque[bytes] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ending: str = ""
    known: int = 0
    """The version that its client knows of. Bookmarks are for newer ones only, so there are none while all is quiet."""

    def send(self, line: bytes) -> None:
        self.lines.append(line)
        self.news.set()

    def end(self, how: str) -> None:
        self.ending = how
        self.news.set()


class ApiServer(KubernetesApi):
    """The double.

    Args:
        tls: With these certificates; else plain HTTP.
        tokens: Users by bearer token. Without any, and without TLS, everybody is let in.
        history: How many changes are remembered for watches.
        bookmarks: Seconds between them. A real server sends one a minute, and one two seconds before the end.

    Attributes:
        requests: What was asked, in order.
        expired_as: How a watch from a version that is forgotten is told: by an ``event``, as real servers do it most of
            the time, or by ``http`` 410.
        delay: Seconds before each answer.
        exempt: Users whom `forbid` does not concern.
    """

    def __init__(
        self,
        *,
        tls: Certificates | None = None,
        tokens: Mapping[str, str] | None = None,
        history: int = 1000,
        bookmarks: float = 0.2,
    ) -> None:
        self.requests: list[Request] = []
        self.expired_as = "event"
        self.delay = 0.0
        self.bookmarks = bookmarks
        self.port = 0
        self.exempt: set[str] = set()
        self._tls = tls
        self._tokens = dict(tokens or {})
        self._asks_who = bool(tokens or tls)
        self._forbidden: set[tuple[str, str]] = set()
        self._failures: deque[tuple[int, float | None]] = deque()
        self._version = 1000
        self._oldest = 0
        self._objects: dict[Key, _Stored] = {}
        self._history: deque[_Change] = deque()
        self._remembered = history
        self._pages: dict[str, tuple[int, list[_Stored]]] = {}
        self._watches: set[_Watch] = set()
        self._stalled = False
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ApiServer", daemon=True)

    # --- its life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def start(self) -> None:
        """Listen: on a free port the first time, then always on that one."""
        self._await(self._start())

    def stop(self) -> None:
        """Stop listening, and break all connections off. What is stored stays."""
        self._await(self._stop())

    def restart(self, forget: bool = True) -> None:
        """Stop and start. As on a real server, watches cannot go on from versions before its start (``forget``)."""
        self.stop()
        if forget:
            self.compact()
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, **user: Any) -> Path:
        """Write a kubeconfig that leads here, with this user."""
        cluster: dict[str, Any] = {"server": self.url}
        if self._tls:
            cluster["certificate-authority"] = str(self._tls.path("ca.crt"))
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "contexts": [{"name": "tests", "context": {"cluster": "double", "user": "tester"}}],
            "clusters": [{"name": "double", "cluster": cluster}],
            "users": [{"name": "tester", "user": user}],
        }
        path.write_text(json.dumps(content))
        return path

    def environ(self, folder: Path, **user: Any) -> dict[str, str]:
        """An environment from which `meshlib.names.kubernetes.config.find` finds its way here."""
        return {"KUBECONFIG": str(self.kubeconfig(folder / "kubeconfig", **user))}

    # --- what happens in the cluster ----------------------------------------------------------------------------------

    def write(self, resource: str, namespace: str, name: str, content: dict[str, Any]) -> None:
        self._call(partial(self._write, (resource, namespace, name), copy.deepcopy(content)))

    def remove(self, resource: str, namespace: str, name: str) -> None:
        self._call(partial(self._write, (resource, namespace, name), None))

    @property
    def version(self) -> int:
        """The version of the last write."""
        return self._version

    def advance(self, count: int = 1) -> None:
        """Somebody else writes something: versions move, and nothing of what is watched changes."""
        self._call(partial(setattr, self, "_version", self._version + count))

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Forget what has happened: no watch from an older version, no further page of an older list."""

        def forget() -> None:
            self._version += 1
            self._oldest = self._version
            self._history.clear()
            self._pages.clear()

        self._call(forget)

    def expire_watches(self) -> None:
        """End running watches with the ERROR event for a version that is too old."""
        expired = {
            "type": "ERROR",
            "object": Refusal(410, "Expired", f"too old resource version: 1 ({self._version})").body,
        }
        self.say(json.dumps(expired).encode() + b"\n")
        self.drop()

    def say(self, line: bytes) -> None:
        """Send these bytes in every running watch."""
        self._call(lambda: [watch.send(line) for watch in self._watches])

    def stall(self) -> None:
        """From now on watches, old and new, are silent: no events, no bookmarks, no end."""
        self._call(partial(setattr, self, "_stalled", True))

    def resume(self) -> None:
        """Watches speak again, and say what they have held back."""

        def go_on() -> None:
            self._stalled = False
            for watch in self._watches:
                watch.news.set()

        self._call(go_on)

    def drop(self, how: str = "close") -> None:
        """End running watches: ``close`` properly, ``cut`` in the middle of a line, or ``reset`` the connection."""
        assert how in ("close", "cut", "reset")
        self._call(lambda: [watch.end(how) for watch in self._watches])

    def fail(self, count: int, status: int = 503, retry_after: float | None = None) -> None:
        """Answer the next ``count`` requests with this status; 0 is a connection that is reset."""
        self._call(lambda: self._failures.extend([(status, retry_after)] * count))

    def allow(self, token: str, user: str = "tester") -> None:
        """Take this token from now on."""
        self._asks_who = True
        self._tokens[token] = user

    def revoke(self, token: str) -> None:
        """Take this token no longer."""
        del self._tokens[token]

    def forbid(self, verb: str, resource: str) -> None:
        """RBAC does not grant this to anybody, but those who are ``exempt``."""
        self._forbidden.add((verb, resource))

    def permit(self, verb: str, resource: str) -> None:
        """It does again."""
        self._forbidden.discard((verb, resource))

    # --- what can be seen ---------------------------------------------------------------------------------------------

    @property
    def watches(self) -> int:
        """How many watches run."""
        return len(self._watches)

    def wait_for_watches(self, count: int, timeout: float = 5.0) -> None:
        """Wait until so many run. Blocks: call it in a thread."""
        until = time.monotonic() + timeout
        while self.watches != count:
            assert time.monotonic() < until, f"{self.watches} watches run; waited for {count}"
            time.sleep(0.005)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._await(call())

    async def _start(self) -> None:
        context = None
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._tls.path("server.crt"), self._tls.path("server.key"))
            context.load_verify_locations(self._tls.path("ca.crt"))
            context.verify_mode = ssl.CERT_OPTIONAL
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def _write(self, key: Key, content: dict[str, Any] | None) -> None:
        before = self._objects.get(key)
        if content is None and before is None:
            raise KeyError(key)
        self._version += 1
        body = content if content is not None else copy.deepcopy(before.body)  # type: ignore[union-attr]
        version, kind = KINDS[key[0]]
        metadata = body.setdefault("metadata", {})
        metadata |= {"name": key[2], "namespace": key[1], "resourceVersion": str(self._version)}
        metadata.setdefault("uid", before.body["metadata"]["uid"] if before else f"uid-{self._version}")
        item = json.dumps(body, separators=(",", ":")).encode()
        text = b'{"kind":"%s","apiVersion":"%s",' % (kind.encode(), version.encode()) + item[1:]
        after = _Stored(self._version, key, body, item, text)
        change = _Change(self._version, before, after, content is None)
        if content is None:
            del self._objects[key]
        else:
            self._objects[key] = after
        self._history.append(change)
        if len(self._history) > self._remembered:
            self._oldest = self._history.popleft().version
        for watch in self._watches:
            line = change.line(watch.query)
            if line is not None:
                watch.known = self._version
                watch.send(line)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await _Connection(self, reader, writer).run()
        except (OSError, h11.RemoteProtocolError, Dropped, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    def _user(self, request: Request, certificate: Mapping[str, Any] | None) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme == "Bearer" and token in self._tokens:
            return self._tokens[token]
        if certificate and not token:
            return next(value for part in certificate["subject"] for name, value in part if name == "commonName")
        if self._asks_who:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return "tester"

    def _authorize(self, user: str, verb: str, query: Query, name: str) -> None:
        if (verb, query.resource) in self._forbidden and user not in self.exempt:
            raise forbidden(user, verb, query, name)

    def _get(self, query: Query, name: str) -> bytes:
        stored = self._objects.get((query.resource, query.namespace, name))
        if stored is None:
            raise not_found(query, name)
        return stored.text

    def _list(self, query: Query, options: Mapping[str, str]) -> bytes:
        token, wanted = options.get("continue", ""), options.get("resourceVersion", "")
        if token:
            try:
                version, left = self._pages.pop(token)
            except KeyError:
                raise Refusal(410, "Expired", "The provided continue parameter is too old") from None
        else:
            version = self._version
            if wanted.isdigit() and int(wanted) > version:
                causes = {"causes": [{"reason": "ResourceVersionTooLarge"}], "retryAfterSeconds": 1}
                raise Refusal(
                    504, "Timeout", f"Timeout: Too large resource version: {wanted}, current: {version}", causes
                )
            left = sorted((s for s in self._objects.values() if s.chosen_by(query)), key=lambda s: s.key)
        # A list from the cache, which version 0 allows, comes whole whatever its limit.
        limit = 0 if wanted == "0" else int(options.get("limit", "0"))
        page, rest = (left[:limit], left[limit:]) if limit else (left, [])
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if rest:
            following = json.dumps(
                {"v": "meta.k8s.io/v1", "rv": version, "start": page[-1].key[2], "n": len(self.requests)}
            )
            metadata["continue"] = base64.urlsafe_b64encode(following.encode()).decode().rstrip("=")
            metadata["remainingItemCount"] = len(rest)
            self._pages[metadata["continue"]] = version, rest
        api, kind = KINDS[query.resource]
        head = {"kind": f"{kind}List", "apiVersion": api, "metadata": metadata}
        return json.dumps(head).encode()[:-1] + b', "items": [%s]}' % b",".join(stored.item for stored in page)

    def _begin(self, query: Query, options: Mapping[str, str]) -> _Watch:
        watch = _Watch(query, options.get("allowWatchBookmarks") in ("true", "1"))
        since = options.get("resourceVersion", "")
        watch.known = int(since or 0)
        if since in ("", "0"):
            for stored in sorted(self._objects.values(), key=lambda s: s.key):
                if stored.chosen_by(query):
                    watch.send(b'{"type":"ADDED","object":%s}\n' % stored.text)
        elif int(since) < self._oldest:
            refusal = Refusal(410, "Expired", f"too old resource version: {since} ({self._version})")
            if self.expired_as == "http":
                raise refusal
            watch.send(json.dumps({"type": "ERROR", "object": refusal.body}).encode() + b"\n")
            watch.end("close")
        else:
            for change in self._history:
                line = change.line(query) if change.version > int(since) else None
                if line is not None:
                    watch.known = change.version
                    watch.send(line)
        return watch

    def _bookmark(self, query: Query) -> bytes:
        version, kind = KINDS[query.resource]
        body: dict[str, Any] = {
            "kind": kind,
            "apiVersion": version,
            "metadata": {"resourceVersion": str(self._version)},
        }
        if kind == "EndpointSlice":
            body |= {"addressType": "", "endpoints": None, "ports": None}
        return json.dumps({"type": "BOOKMARK", "object": body}, separators=(",", ":")).encode() + b"\n"


class _Connection:
    """One connection: requests one after another, the last of which may be a watch."""

    def __init__(self, api: ApiServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.api, self.reader, self.writer = api, reader, writer
        self.http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        while True:
            request = await self._receive()
            if request is None:
                return
            self.api.requests.append(request)
            try:
                await self._answer(request)
            except Refusal as refusal:
                await self._whole(refusal.code, json.dumps(refusal.body).encode(), request)
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                return
            self.http.start_next_cycle()

    async def _receive(self) -> Request | None:
        request: Request | None = None
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Request):
                parts = urlsplit(event.target.decode())
                headers = {name.decode(): value.decode() for name, value in event.headers}
                query = dict(parse_qsl(parts.query, keep_blank_values=True))
                request = Request(event.method.decode(), unquote(parts.path), query, headers)
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.ConnectionClosed):
                return None

    async def _answer(self, request: Request) -> None:
        api = self.api
        if api.delay:
            await asyncio.sleep(api.delay)
        if api._failures:
            status, after = api._failures.popleft()
            if status == 0:
                self._reset()
            headers = [] if after is None else [("retry-after", f"{after:g}")]
            reason = {429: "TooManyRequests", 503: "ServiceUnavailable", 401: "Unauthorized", 500: "InternalError"}
            body = Refusal(status, reason.get(status, ""), "this was asked for by a test").body
            await self._whole(status, json.dumps(body).encode(), request, headers)
            return
        user = api._user(request, self.writer.get_extra_info("peercert"))
        query, name = asked(request)
        if not name and request.query.get("watch") in ("true", "1"):
            api._authorize(user, "watch", query, "")
            await self._watch(api._begin(query, request.query), request)
            return
        api._authorize(user, "get" if name else "list", query, name)
        found = api._get(query, name) if name else api._list(query, request.query)
        await self._whole(200, found, request)

    async def _whole(self, status: int, body: bytes, request: Request, more: Iterable[tuple[str, str]] = ()) -> None:
        headers = [("content-type", "application/json"), ("cache-control", "no-cache, private"), *more]
        if len(body) > COMPRESSED and "gzip" in request.headers.get("accept-encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers.append(("content-encoding", "gzip"))
        headers.append(("content-length", str(len(body))))
        self._send(h11.Response(status_code=status, headers=headers))
        self._send(h11.Data(data=body))
        self._send(h11.EndOfMessage())
        await self.writer.drain()

    async def _watch(self, watch: _Watch, request: Request) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + float(request.query.get("timeoutSeconds", "1800"))
        self.api._watches.add(watch)  # before anything is awaited: it has been told of all that has happened so far
        self._send(h11.Response(status_code=200, headers=[("content-type", "application/json")]))
        gone = asyncio.ensure_future(self.reader.read(1))
        gone.add_done_callback(lambda _: watch.news.set())
        bookmark = loop.time() + self.api.bookmarks
        try:
            while not gone.done():
                watch.news.clear()
                while watch.lines and not self.api._stalled:
                    self._send(h11.Data(data=watch.lines.popleft()))
                await self.writer.drain()
                if watch.ending in ("cut", "reset"):
                    self._break(watch.ending)
                now = loop.time()
                ends = now >= until and not self.api._stalled
                if watch.bookmarks and not self.api._stalled and now >= bookmark:
                    if self.api._version > watch.known:
                        watch.known = self.api._version
                        self._send(h11.Data(data=self.api._bookmark(watch.query)))
                    bookmark = now + self.api.bookmarks
                if ends or watch.ending == "close":
                    self._send(h11.EndOfMessage())
                    await self.writer.drain()
                    return
                later = min(until, bookmark) if watch.bookmarks else until
                wait = None if self.api._stalled else max(0.0, later - loop.time())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await watch.news.wait()
        finally:
            self.api._watches.discard(watch)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await gone

    def _break(self, how: str) -> None:
        if how == "reset":
            self._reset()
        self._send(h11.Data(data=b'{"type":"MODIFIED","object":{"kind":"Endpoi'))
        self.writer.close()
        raise Dropped

    def _reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Dropped

    def _send(self, event: Any) -> None:
        data = self.http.send(event)
        if data:
            self.writer.write(data)
