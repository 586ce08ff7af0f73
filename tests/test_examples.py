"""The examples, run as a newcomer runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.names.addr import parse_hostport

ROOT = Path(__file__).parent.parent
ECHO = [sys.executable, "-m", "examples.echo"]


def run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    stdin: dict[str, Any] = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run([*ECHO, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=50, **stdin)


def test_the_echo_story_loses_no_call() -> None:
    done = run("first line", "second line")
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    servers = re.findall(r"127\.0\.0\.1:\d+", lines[0])
    assert len(servers) == 3
    assert lines[1:3] == ["  first line", "  second line"]
    assert f"  stopping {servers[0]} gracefully" in lines
    assert f"  killing {servers[1]} with SIGKILL" in lines
    head = next(i for i, line in enumerate(lines) if "requests" in line)
    requests, success, failed = lines[head + 1].split()[:3]
    assert int(requests) > 500
    assert (success, failed) == ("100.000%", "0")
    rows = [line.split() for line in lines[head + 4 :]]
    assert [row[0] for row in rows[:3]] == servers
    assert len(rows) == 5
    assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
    assert all(int(row[3]) > 0 for row in rows), "every server, the replacements too, has answered calls"


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([*ECHO, "--serve", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_the_halves_run_by_hand(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    assert parse_hostport(address)[1] > 0
    assert run("--connect", address, "a", "b").stdout == "a\nb\n"
    assert run("--connect", address, text="from\nstandard input\n").stdout == "from\nstandard input\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_connecting_to_nobody_says_so_without_a_traceback() -> None:
    done = run("--connect", "127.0.0.1:1", "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("NoEndpoints: no endpoint of 127.0.0.1:1 is ready: 127.0.0.1:1 (connect: connect fai")
    assert "Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_story_cleanly_and_leaves_no_server_behind() -> None:
    pipe = subprocess.PIPE
    # Shells start what runs in the background deaf to SIGINT, and children inherit that; a handler they do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen([*ECHO, "hello"], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with started as story:
        assert story.stdout is not None
        assert story.stderr is not None
        servers = re.findall(r"127\.0\.0\.1:\d+", story.stdout.readline())
        while "callers" not in story.stdout.readline():
            pass
        time.sleep(0.5)  # a person presses it in the middle of the stream, whenever that is
        os.kill(story.pid, signal.SIGINT)
        assert story.wait(20) == 130
        assert "Traceback" not in story.stderr.read()
    for address in servers:
        assert run("--connect", address, "x").returncode == 1
