"""The FastAPI example, run as a newcomer runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = [sys.executable, "-m", "examples.fastapi_app"]
ROW = re.compile(r"(before|after): .*? (\d+) +([\d.]+)% +(\d+) +\d+ ms +\d+ ms")


def test_the_story() -> None:
    done = subprocess.run(
        EXAMPLE, cwd=ROOT, capture_output=True, text=True, timeout=55, stdin=subprocess.DEVNULL, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    replicas = re.findall(r"127\.0\.0\.1:\d+", done.stdout.splitlines()[0])
    assert len(replicas) == 3
    assert f"  killing {replicas[0]}" in done.stdout
    assert f"  {replicas[1]} now takes" in done.stdout
    rows = {name: (int(orders), float(share), int(failed)) for name, orders, share, failed in ROW.findall(done.stdout)}
    orders = rows["before"][0]
    assert rows["after"] == (orders, 100.0, 0)
    assert rows["before"][2] > orders / 10, "a third of what is drawn at random is a replica that is gone"
    assert rows["before"][1] < 90


@pytest.mark.parametrize("half", [["--users"], ["--shop", "127.0.0.1:1"], ["--before", "127.0.0.1:1"]])
def test_the_halves_run_by_hand(half: list[str]) -> None:
    with subprocess.Popen(
        [*EXAMPLE, *half], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        assert one.stderr is not None
        try:
            assert re.fullmatch(r"127\.0\.0\.1:\d+\n", one.stdout.readline())
            one.terminate()
            one.wait(20)
            assert one.stderr.read() == ""
        finally:
            one.kill()
