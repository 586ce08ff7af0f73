"""gRPC's tests: on asyncio alone, since grpclib is; stubs as the real plugins make them; a certificate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..conftest import BACKENDS, missing
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
    if shutil.which("openssl") is None:
        missing("the tests of TLS make certificates with openssl")
    folder = tmp_path_factory.mktemp("tls")
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
    names = ["-subj", "/CN=greeter.test", "-addext", "subjectAltName=DNS:greeter.test"]
    subprocess.run([*command, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files
