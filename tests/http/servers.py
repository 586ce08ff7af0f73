"""A real uvicorn for tests, in a thread of its own, and the application that most of them ask."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import anyio
import uvicorn

__all__ = ["application", "serving"]


class Quick(uvicorn.Server):
    """Looks more often than every 0.1 s whether it should end: tests start hundreds."""

    async def main_loop(self) -> None:
        while not self.should_exit:  # noqa: ASYNC110 - it is set by another thread
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """Serve ``app``; gives ``http://127.0.0.1:port``, or with TLS ``https://localhost:port``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="critical", lifespan="off", access_log=False, **options)
        server = Quick(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield f"https://localhost:{port}" if "ssl_certfile" in options else f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


async def read_body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def digest_fits(method: str, given: str) -> bool:
    """RFC 7616 3.4.1, for user and pass."""
    parts = dict(re.findall(r'(\w+)="?([^",]*)"?', given.removeprefix("Digest ")))

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    if not given.startswith("Digest "):
        return False
    first, second = md5("user:house:pass"), md5(f"{method}:{parts['uri']}")
    return parts["response"] == md5(f"{first}:7:{parts['nc']}:{parts['cnonce']}:auth:{second}")


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Does what the path says."""
    path = scope["path"]
    query = parse_qs(scope["query_string"].decode())
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    async def answer(status: int, body: bytes = b"", *more: tuple[bytes, bytes]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length, *more]})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    if path == "/echo":
        told = {"method": scope["method"], "query": query, "headers": headers}
        told["body"] = (await read_body(receive)).decode("latin-1")
        await answer(200, json.dumps(told).encode(), (b"content-type", b"application/json"))
    elif path.startswith("/status/"):
        await answer(int(path[8:]), b"status")
    elif path == "/redirect":
        await answer(302, b"", (b"location", b"/echo?moved=1"))
    elif path == "/cookie":
        await answer(200, b"", (b"set-cookie", b"taste=sweet; Path=/"))
    elif path == "/basic":
        given = dict(headers).get("authorization")
        await answer(200 if given == "Basic dXNlcjpwYXNz" else 401, b"", (b"www-authenticate", b"Basic"))
    elif path == "/digest":
        given = dict(headers).get("authorization", "")
        challenge = b'Digest realm="house", nonce="7", qop="auth", algorithm=MD5'
        await answer(200 if digest_fits(scope["method"], given) else 401, b"", (b"www-authenticate", challenge))
    elif path == "/ticket":
        given = dict(headers).get("x-ticket")
        await answer(200 if given == "42" else 401, b"42")
    elif path == "/gzip":
        await answer(200, gzip.compress(b"unzipped " * 1000), (b"content-encoding", b"gzip"))
    elif path == "/not-gzip":
        await answer(200, b"not zipped at all", (b"content-encoding", b"gzip"))
    elif path == "/around":
        await answer(302, b"", (b"location", b"/around"))
    elif path == "/size":
        await answer(200, b"%d" % len(await read_body(receive)))
    elif path == "/slow":
        await anyio.sleep(float(query["s"][0]))
        await answer(200, b"late")
    elif path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for n in range(int(query["n"][0])):
            await send({"type": "http.response.body", "body": b"%d," % n, "more_body": True})
            await anyio.sleep(float(query.get("s", ["0"])[0]))
        await send({"type": "http.response.body", "body": b"end"})
    elif path == "/large":
        await answer(200, b"x" * int(query["n"][0]))
    elif path == "/break":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        raise RuntimeError("in the middle of it")
    else:
        await answer(404, b"nothing here")
