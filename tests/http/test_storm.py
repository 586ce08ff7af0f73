"""Cancelled requests over HTTP/1.1 and TLS leave nothing behind; see ``storm.py``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest

from .processes import Worker, workers
from .storm import SHARES, weather

WAYS = [way for way in SHARES if way[0] in ("h1", "tls")]


def test_it_is_ten_thousand():
    assert sum(SHARES.values()) == 10_000


@pytest.fixture(scope="module")
async def servers(anyio_backend: Any, certificate: tuple[str, str]) -> AsyncIterator[dict[str, int]]:
    plain, tls = (Worker("uvicorn", "plain", out=subprocess.DEVNULL) for _ in range(2))
    async with workers(plain, tls.with_tls(certificate)):
        yield {"h1": plain.port, "tls": tls.port}


# httpx leaves the generators below its own unclosed, stock or not, of which trio warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open sockets are counted in /proc")  # noqa: PTH112
@pytest.mark.parametrize(("way", "name"), WAYS, ids=map("-".join, WAYS))
async def test_a_storm_of_cancelled_requests_leaves_nothing_behind(way, name, servers, certificate, request):
    loop = request.node.callspec.id.partition("-")[0]
    await weather(way, name, servers[way], certificate, loop)
