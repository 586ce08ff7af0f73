"""The example over gRPC, run as a newcomer runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlib.names.addr import parse_hostport

ROOT = Path(__file__).parent.parent
GREETER = [sys.executable, "-m", "examples.grpc_greeter"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*GREETER, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, stdin=subprocess.DEVNULL)


def test_the_greeters_story_loses_no_call_and_no_stream() -> None:
    done = run()
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    servers = re.findall(r"127\.0\.0\.1:\d+", lines[0])
    assert len(servers) == 3
    assert lines[1].startswith("  Hello, world, from process ")
    assert f"  stopping {servers[0]} gracefully" in lines
    assert "  it has ended with 0, and its streams had been finished before: 3 of 3" in lines
    assert f"  killing {servers[1]} with SIGKILL" in lines
    head = next(i for i, line in enumerate(lines) if "calls" in line and "retried" in line)
    calls, streams, failed = lines[head + 1].split()[:3]
    assert int(calls) > 500
    assert (streams, failed) == ("3", "0")
    rows = [line.split() for line in lines[head + 4 :]]
    assert [row[0] for row in rows] == servers
    assert sum(int(row[2]) for row in rows) == int(calls)
    assert int(rows[2][2]) > 0


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([*GREETER, "--serve", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_the_greeters_halves_run_by_hand(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    assert parse_hostport(address)[1] > 0
    assert run("--connect", address).stdout == f"Hello, world, from process {process.pid}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_greeting_nobody_says_so_without_a_traceback() -> None:
    done = run("--connect", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_stubs_are_what_the_plugin_makes_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpclib_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "examples/protos/greeter.proto"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    made, kept = tmp_path / "examples/protos", ROOT / "examples/protos"
    assert (made / "greeter_grpc.py").read_text() == (kept / "greeter_grpc.py").read_text()
    # Of the messages the descriptor: what is around it changes with protoc. Those that are kept are of an old one, so
    # that they load with every protobuf from 5 on.
    descriptor = re.compile(r"(?m)AddSerializedFile\(.*\)$")
    ours, theirs = (descriptor.search((folder / "greeter_pb2.py").read_text()) for folder in (kept, made))
    assert ours is not None
    assert theirs is not None
    assert ours[0] == theirs[0]
