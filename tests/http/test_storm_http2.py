"""Cancelled requests over HTTP/2 leave nothing behind; see ``storm.py``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest

from .processes import Worker, workers
from .storm import SHARES, weather

WAYS = [way for way in SHARES if way[0] == "h2"]


@pytest.fixture(scope="module")
async def servers(anyio_backend: Any, certificate: tuple[str, str]) -> AsyncIterator[dict[str, int]]:
    async with workers(Worker("hypercorn", "plain", out=subprocess.DEVNULL)) as (worker,):
        yield {"h2": worker.port}


# httpx leaves the generators below its own unclosed, stock or not, of which trio warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open sockets are counted in /proc")  # noqa: PTH112
@pytest.mark.parametrize(("way", "name"), WAYS, ids=map("-".join, WAYS))
async def test_a_storm_of_cancelled_requests_leaves_nothing_behind(way, name, servers, certificate, request):
    loop = request.node.callspec.id.partition("-")[0]
    await weather(way, name, servers[way], certificate, loop)
