"""A certificate for ``users.test``."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ..conftest import missing


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a certificate, which is its own authority, and of its key."""
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
    names = ["-subj", "/CN=users.test", "-addext", "subjectAltName=DNS:users.test"]
    subprocess.run([*command, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files
