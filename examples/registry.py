"""Where the servers of an example announce themselves: ZooKeeper where it is installed, else directories of files.

ZooKeeper is Debian's (``apt install zookeeper``): its jars in /usr/share/java, or where ZOOKEEPER_JARS says, and a JVM.
Like a real one it finds out that a process was killed when the process's session ends. With files it is the system that
knows, at once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

JARS = Path(os.environ.get("ZOOKEEPER_JARS", "/usr/share/java"))
START = 15.0
"""Seconds that a JVM may take until it serves."""
CONFIG = """
tickTime=500
minSessionTimeout=1000
maxSessionTimeout=2000
dataDir={folder}
clientPort={port}
clientPortAddress=127.0.0.1
admin.enableServer=false
"""


class Registry:
    """A registry, in a folder that is gone afterwards.

    Args:
        zookeeper: Use ZooKeeper where it is found.

    Attributes:
        kind: What it is, for a person to read.
        folder: Its folder.
    """

    def __init__(self, zookeeper: bool = True) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="meshlib-discovery-")
        self.folder = Path(self._temporary.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.kind = "files"
        if zookeeper and _is_installed():
            self.kind = "ZooKeeper"

    def target(self, name: str) -> str:
        """Where servers of this name announce themselves, and clients look for them."""
        if self._process is not None:
            return f"zk://127.0.0.1:{self._port}/services/{name}"
        return f"file://{self.folder}/services/{name}/"

    def __enter__(self) -> Self:
        if self.kind == "ZooKeeper":
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._temporary.cleanup()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        config = self.folder / "zoo.cfg"
        config.write_text(CONFIG.format(folder=self.folder / "zookeeper", port=self._port))
        quick = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.forceSync=no"]
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        command = ["java", *quick, "-cp", f"{JARS}/*", main, str(config)]
        null = subprocess.DEVNULL
        # A session of its own: Ctrl-C in the terminal is not for it.
        self._process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
        until = time.monotonic() + START
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__(None, None, None)
                raise SystemExit("ZooKeeper did not start; try --files")
            time.sleep(0.05)

    def _serves(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), 1) as connection:
                connection.settimeout(1)
                connection.sendall(b"srvr")
                return b"Mode: standalone" in connection.recv(65536)
        except OSError:
            return False


def _is_installed() -> bool:
    kazoo = importlib.util.find_spec("kazoo")
    return kazoo is not None and shutil.which("java") is not None and any(JARS.glob("zookeeper*.jar"))
