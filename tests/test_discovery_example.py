"""The example of discovery, run as a newcomer runs it: with ZooKeeper where it is installed, else with files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DISCOVERY = [sys.executable, "-m", "examples.discovery"]
ADDRESS = r"127\.0\.0\.1:\d+"


def endpoints(line: str) -> set[str]:
    return set(re.findall(ADDRESS, line))


def test_the_story_loses_no_call() -> None:
    done = subprocess.run(DISCOVERY, cwd=ROOT, capture_output=True, text=True, timeout=55, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"servers announce themselves in (files, at file:///|ZooKeeper, at zk://)", lines[0])

    def only(start: str) -> int:
        (at,) = (n for n, line in enumerate(lines) if line.startswith(start))
        return at

    first = endpoints(lines[only("three servers of version 1: ")])
    (killed,) = endpoints(lines[only("killing ")])
    (added,) = endpoints(lines[only("adding ")])
    (stopped,) = endpoints(lines[only("stopping ")])
    second = only("two servers of version 2: ")
    # What the client has seen at the end of each act is the truth.
    acts = [only("killing "), only("adding "), only("stopping "), second]
    truth = [first, first - {killed}, first - {killed} | {added}, first - {killed, stopped} | {added}]
    for end, expected in zip(acts, truth, strict=True):
        seen = [line for line in lines[:end] if line.startswith("  version 1 is now at ")]
        assert endpoints(seen[-1]) == expected

    shares = dict(re.findall(r"^(\d+) % to version 2: .*\n  answered by (.*)", done.stdout, re.MULTILINE))
    assert list(shares) == ["0", "10", "50", "100"]
    assert shares["0"] == "v1: 100.0%"
    assert shares["100"] == "v2: 100.0%"
    for share in ("10", "50"):
        part = re.search(r"v2: ([\d.]+)%", shares[share])
        assert part is not None
        assert float(part[1]) == pytest.approx(float(share), abs=6)
    assert any("/s/greeter => 90 * /v1 & 10 * /v2" in line and "base" in line for line in lines), "the delegation"
    assert lines[-2].split() == ["calls", "failures", "version", "1", "version", "2"]
    calls, failures, *parts = lines[-1].split()
    assert int(calls) > 500
    assert failures == "0"
    assert sum(float(part.rstrip("%")) for part in parts) == pytest.approx(100, abs=0.2)


def test_the_halves_run_by_hand(tmp_path: Path) -> None:
    target = f"file://{tmp_path}/greeter/"
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    serve = [*DISCOVERY, "--serve", "v7", "--at", target]
    with (
        subprocess.Popen(serve, cwd=ROOT, stdout=pipe, text=True, env=env) as server,
        subprocess.Popen([*DISCOVERY, "--watch", target], cwd=ROOT, stdout=pipe, text=True, env=env) as watcher,
    ):
        try:
            assert server.stdout is not None
            assert watcher.stdout is not None
            address = server.stdout.readline().strip()
            assert re.fullmatch(ADDRESS, address)
            while watcher.stdout.readline().strip() != address:
                pass  # "no such name", if it looked before the server was there
            server.send_signal(signal.SIGTERM)
            assert address not in watcher.stdout.readline()
            assert server.wait(10) == 0
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait(10) == 130
        finally:
            server.kill()
            watcher.kill()


def test_serve_needs_a_place() -> None:
    done = subprocess.run([*DISCOVERY, "--serve", "v1"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "--serve and --at go together" in done.stderr
    done = subprocess.run([*DISCOVERY, "--watch", "nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigurationError: ")
