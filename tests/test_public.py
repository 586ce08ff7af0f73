"""The public face: a name that appears or goes is a change that somebody has to mean."""

import inspect
import tomllib
from pathlib import Path

import pytest

import meshlib
from meshlib import mux

NAMES = [
    "Attempt",
    "AttemptTimeout",
    "Call",
    "CircuitOpen",
    "Clock",
    "ConfigurationError",
    "ConnectError",
    "ConnectionLost",
    "Context",
    "DeadlineExceeded",
    "Dtab",
    "DtabError",
    "Filter",
    "InvalidArgument",
    "InvalidReply",
    "Layer",
    "MeshError",
    "NoEndpoints",
    "ProtocolError",
    "Rejected",
    "RemoteError",
    "ResolutionError",
    "ResponseClass",
    "Service",
    "ServiceClosed",
    "ServiceFactory",
    "Session",
    "Stack",
    "Status",
    "TraceId",
    "TypedClient",
    "UnknownMethod",
    "UnknownService",
    "adaptive",
    "announce",
    "aperture",
    "asgi",
    "balance",
    "base_dtab",
    "circuit_breaker",
    "classifier",
    "classify",
    "client",
    "concurrency_limit",
    "current",
    "deadline",
    "delegate",
    "dtab",
    "failfast",
    "failure_accrual",
    "fault",
    "filter",
    "grpc",
    "heap",
    "hedge",
    "http",
    "least_loaded",
    "mux",
    "outlier_detection",
    "p2c",
    "peak_ewma",
    "priority",
    "rate_limit",
    "remaining",
    "resolve",
    "retry",
    "retry_budget",
    "retry_connection_losses",
    "retry_server_errors",
    "retry_timeouts",
    "round_robin",
    "rpc",
    "serve",
    "shadow",
    "throttle",
    "timeout",
    "use",
]
MUX_NAMES = ["Limits", "MuxError", "Request", "Response", "client", "serve"]
FACES = [(meshlib, NAMES), (mux, MUX_NAMES)]


@pytest.mark.parametrize(("face", "names"), FACES, ids=["meshlib", "mux"])
def test_the_public_names_are_these_in_order(face, names):
    assert face.__all__ == names == sorted(names)


@pytest.mark.parametrize("name", [*NAMES, *(f"mux.{name}" for name in MUX_NAMES)])
def test_every_public_name_is_there_and_is_explained(name):
    thing = meshlib
    for part in name.split("."):
        thing = getattr(thing, part)
    assert inspect.getdoc(thing)


@pytest.mark.parametrize(("face", "names"), FACES, ids=["meshlib", "mux"])
def test_nothing_else_looks_public_but_modules(face, names):
    others = {name for name in vars(face) if not name.startswith("_")} - set(names)
    assert {name for name in others if not inspect.ismodule(getattr(face, name))} == set()


@pytest.mark.parametrize(
    "kind",
    [getattr(meshlib, name) for name in NAMES if inspect.isclass(getattr(meshlib, name))],
    ids=lambda k: k.__name__,
)
def test_every_public_method_of_a_public_class_is_explained(kind):
    for name, member in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property | classmethod)):
            assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert meshlib.__version__ == project["version"]
