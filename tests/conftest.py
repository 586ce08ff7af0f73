"""What every test of the house shares: three event loops, a check that nothing is left running, skips that tell."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
import trio
from hypothesis import HealthCheck, settings

CI = bool(os.environ.get("CI"))

# Chance stays chance: a failure prints the blob that repeats it.
settings.register_profile("house", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

BACKENDS = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
GRACE = 2.0
"""Seconds for background tasks to end after a test. Only a test that fails waits that long."""


def missing(reason: str) -> NoReturn:
    """Skip a test whose surroundings are not here; on CI, where they must be, fail it."""
    if CI:
        pytest.fail(f"must be there on CI: {reason}", pytrace=False)
    pytest.skip(reason)


def certificate_for(name: str, folder: Path) -> tuple[str, str]:
    """The files of a certificate for ``name``, which is its own authority, and of its key."""
    if shutil.which("openssl") is None:
        missing("the tests of TLS make certificates with openssl")
    files = (f"{folder}/cert.pem", f"{folder}/key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture(scope="module", params=list(BACKENDS.values()), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every async test runs on each of these; a module that needs but one overrides the fixture."""
    return request.param


@pytest.fixture
async def no_task_left(anyio_backend: Any) -> AsyncIterator[None]:
    """Fail an async test that leaves tasks running. It is set up before, and torn down after, all other fixtures."""
    before = _tasks()
    yield
    with anyio.move_on_after(GRACE):
        while _tasks() - before:  # noqa: ASYNC110 - tasks end without telling anybody
            await anyio.sleep(0.001)
    left = _tasks() - before
    assert not left, f"tasks were left running: {left}"


def _tasks() -> set[Any]:
    if anyio.get_current_task().__class__.__module__.endswith("_trio"):
        return _below(trio.lowlevel.current_root_task()) - {trio.lowlevel.current_task()}
    # pytest's own runner waits in a task of its own for each coroutine that it was given.
    return {task for task in asyncio.all_tasks() if not task.get_coro().__qualname__.startswith("TestRunner.")}


def _below(task: Any) -> set[Any]:
    children = {child for nursery in task.child_nurseries for child in nursery.child_tasks}
    return children.union(*map(_below, children))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every async test the check; plain functions have no event loop to check."""
    for item in items:
        if isinstance(item, pytest.Function) and "anyio_backend" in item.fixturenames:
            item.fixturenames.insert(0, "no_task_left")
