"""ZooKeeper over TLS: who is trusted, by which name, and what is said when it is not. And when nobody is there."""

import logging
import shutil
import subprocess

import anyio
import pytest

from meshlib.names.addr import Failed
from meshlib.names.zookeeper import session as sessions

from ..conftest import missing
from ..zookeeper import Registry, Watching, free_ports, standalone


@pytest.fixture(scope="module")
def anyio_backend():
    """All of it happens in threads, for every event loop alike."""
    return "asyncio"


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch):
    monkeypatch.setattr(sessions, "LINGER", 0.0)


def openssl(*words):
    if shutil.which("openssl") is None:
        missing("the tests of TLS make certificates with openssl")
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, another one, and a server's and a client's certificate of the first."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        uses = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        files = ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
        openssl(*new, "-subj", f"/CN={name}", *uses, *files)
    for name, san in (("server", "DNS:localhost"), ("client", "DNS:client")):
        openssl(*["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"], "-subj", f"/CN={name}",
                "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.csr")  # fmt: skip
        (folder / "ext").write_text(f"subjectAltName={san}\nkeyUsage=digitalSignature\nauthorityKeyIdentifier=keyid\n")
        sign = f"x509 -req -CA {folder}/ca.pem -CAkey {folder}/ca.key -CAcreateserial -days 2".split()
        openssl(*sign, "-in", f"{folder}/{name}.csr", "-extfile", f"{folder}/ext", "-out", f"{folder}/{name}.pem")
        both = (folder / f"{name}.key").read_text() + (folder / f"{name}.pem").read_text()
        (folder / f"{name}-both.pem").write_text(both)
    return folder


async def test_tls(certificates, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "meshlib.names.zookeeper")
    (secure,) = free_ports(1)
    lines = [
        "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory",
        f"secureClientPort={secure}",
        f"ssl.keyStore.location={certificates}/server-both.pem",
        f"ssl.trustStore.location={certificates}/ca.pem",
    ]
    ca, both = f"ca={certificates}/ca.pem", f"cert={certificates}/client-both.pem"
    with standalone(tmp_path, *lines) as server:
        target = f"zk://localhost:{secure}/s?{ca}&{both}"
        with Registry.at(server.hosts, "/s") as registry:
            registry.put("h:80")
        async with Watching(target) as watching:
            await watching.until("h:80")
        async with anyio.create_task_group() as tasks:
            elsewhere = target.replace("localhost", "127.0.0.1")
            tasks.start_soon(refused, elsewhere, "IP address mismatch")
            tasks.start_soon(refused, target.replace("/ca.pem", "/other.pem"), "certificate verify failed")
            tasks.start_soon(refused, target.replace(ca, "tls=true"), "certificate verify failed")


async def refused(target, complaint):
    async with Watching(target) as watching:
        assert complaint in str(await watching.until(lambda state: True))


async def test_nobody_there(caplog):
    caplog.set_level(logging.CRITICAL, "meshlib.names.zookeeper")
    async with Watching(f"zk://127.0.0.1:{free_ports(1)[0]}/x") as watching:
        state = await watching.until(lambda state: True)
        assert isinstance(state, Failed)
        assert "refused" in state.cause
