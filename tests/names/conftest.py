"""One real ZooKeeper for all tests of names, with a path of its own for each; Kubernetes, its double and a real one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from ..kubernetes import ApiServer, RealApiServer, assets
from ..zookeeper import Registry, ZooKeeper, standalone

_numbers = itertools.count()


@pytest.fixture(scope="session")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeper]:
    """A server, shared by all."""
    with standalone(tmp_path_factory.mktemp("zookeeper")) as server:
        yield server


@pytest.fixture
def zk(zookeeper: ZooKeeper) -> Iterator[Registry]:
    """What somebody else does with that server, below a path that nobody else uses."""
    with Registry.at(zookeeper.hosts, f"/test{next(_numbers)}") as registry:
        yield registry


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    """The double of Kubernetes' API server, on plain HTTP; everybody is let in."""
    with ApiServer() as server:
        yield server


@pytest.fixture(scope="session")
def real_api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApiServer]:
    """A real one, shared by all who ask for it: each uses namespaces of its own. Skips where it is not installed."""
    programs = assets()
    if programs is None:
        pytest.skip("no kube-apiserver and etcd in KUBEBUILDER_ASSETS or PATH")
    with RealApiServer(tmp_path_factory.mktemp("kubernetes"), programs, {"reader-token": "reader"}) as server:
        yield server
