"""A certificate for ``users.test``."""

from __future__ import annotations

import pytest

from ..conftest import certificate_for


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a certificate, which is its own authority, and of its key."""
    return certificate_for("users.test", tmp_path_factory.mktemp("tls"))
