"""``file:///directory/``: members of a service on one machine, each a file that its process holds.

A member is a file ``host:port.member`` in the directory, with an entry such as a JSON endpoint file has. It is locked
(flock) for as long as the process that announced it lives: the system takes the lock away even from a process that is
killed, so that a member whose lock can be had is dead. Thus one machine needs no registry to have what ZooKeeper calls
ephemeral nodes. Files appear whole, since they are written and locked under another name first.

Network file systems and systems without flock (Windows) have no such locks.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import anyio
import anyio.to_thread

from ..core.errors import ConfigurationError
from .addr import Addr, Address, Bound, Neg
from .file import parse_endpoints, path_of
from .target import Target

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileAnnouncer", "read_members"]

SUFFIX: Final = ".member"
LARGEST: Final = 64 * 1024
"""Bytes of a member's file; one that is announced here has some hundred."""
MOST: Final = 10_000
"""Members of a directory."""
CHECK: Final = 1.0
"""Seconds from one look whether the file is still there to the next; somebody may tidy up."""


class FileAnnouncer:
    """Announces in a directory."""

    def check(self, target: Target) -> None:
        """Raises `ConfigurationError` for what is no directory, or where there are no locks."""
        if not path_of(target).endswith("/"):
            raise ConfigurationError(
                f"announce={target.text!r}: a file is written by whoever keeps it; announce in a directory, with a "
                f"slash at the end: {target.text}/"
            )
        if fcntl is None:
            raise ConfigurationError(f"announce={target.text!r}: this system has no flock, by which members are known")

    async def announce(self, target: Target, address: Address) -> AsyncGenerator[None, None]:
        """Keep a file in the directory, and hold its lock."""
        directory = Path(path_of(target))
        held: int | None = None
        file = directory / f"{quote(str(address), safe=':[].')}{SUFFIX}"
        try:
            while True:
                if held is None or not await anyio.to_thread.run_sync(_same, file, held):
                    fresh = await anyio.to_thread.run_sync(_put, directory, file, address)
                    if held is not None:
                        os.close(held)
                    held = fresh
                    yield
                await anyio.sleep(CHECK)
        finally:
            if held is not None:
                # Two system calls on a local file, without which it would be there until this process ends.
                if _same(file, held):
                    with contextlib.suppress(OSError):
                        file.unlink()
                os.close(held)


def _put(directory: Path, file: Path, address: Address) -> int:
    """Write and lock the file, and give what holds the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    entry: dict[str, Any] = dict(address.metadata)
    if address.path:
        entry["address"] = str(address)
    else:
        entry |= {"host": address.host, "port": address.port}
    if address.weight != 1:
        entry["weight"] = address.weight
    new = directory / f".{os.getpid()}-{os.urandom(4).hex()}.new"
    assert fcntl is not None  # noqa: S101 - `check` was there first
    held = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.write(held, json.dumps(entry).encode())
        new.replace(file)
    except BaseException:
        os.close(held)
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    return held


def _same(file: Path, held: int) -> bool:
    """Is this file the one that is held, and not one that somebody has put in its place?"""
    try:
        there, here = file.stat(), os.fstat(held)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def read_members(directory: Path) -> tuple[Addr, list[str]]:
    """The living members of a directory, and what is wrong with others. Removes the dead. Blocks.

    Raises:
        OSError: The directory cannot be read.
    """
    if fcntl is None:
        raise ConfigurationError(f"{directory}: this system has no flock, by which members are known")
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return Neg(f"there is no directory {directory}"), []
    found: list[Address] = []
    problems: list[str] = []
    for name in names[:MOST]:
        file = directory / name
        try:
            there = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                problems.append(f"{file}: {error.strerror}")
            continue
        try:
            fcntl.flock(there, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                text = os.read(there, LARGEST + 1)
                if len(text) > LARGEST:
                    raise ConfigurationError(f"{file} is larger than {LARGEST} bytes")
                found += _entry(text.decode("utf-8"), str(file))
            except (OSError, ValueError) as error:
                problems.append(str(error))
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
        else:
            if _same(file, there):  # and not announced anew meanwhile
                with contextlib.suppress(OSError):  # somebody else's directory is only read
                    file.unlink()
        finally:
            os.close(there)
    return Bound.of(found), problems


def _entry(text: str, source: str) -> list[Address]:
    said = json.loads(text)
    if isinstance(said, dict) and isinstance(said.get("address"), str):
        return [Address.parse(said["address"])]
    return parse_endpoints(json.dumps([said]), source)
