"""gRPC's tests: on asyncio alone, since grpclib is; stubs as the real plugins make them; a certificate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ..conftest import BACKENDS, certificate_for
from .protos import generate, generate_better


@pytest.fixture(scope="module", params=[BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """grpclib knows asyncio only, on either of its loops."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def protos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the package ``meshprotos``, on ``sys.path``."""
    folder = generate(tmp_path_factory.mktemp("protos"))
    sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the package ``meshprotos_better``, on ``sys.path``."""
    folder = generate_better(tmp_path_factory.mktemp("better"))
    sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a certificate for ``greeter.test``, which is its own authority, and of its key."""
    return certificate_for("greeter.test", tmp_path_factory.mktemp("tls"))
