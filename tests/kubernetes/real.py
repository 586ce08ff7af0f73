"""The real thing: kube-apiserver with etcd, where they are installed.

They are looked for in ``KUBEBUILDER_ASSETS`` (where ``setup-envtest`` puts them) and in ``PATH``. There are no
nodes and no controllers: tests write EndpointSlices themselves, and create namespaces and service accounts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx

from .api import KINDS, KubernetesApi
from .certificates import Certificates, certificates

__all__ = ["RealApiServer", "assets"]

START = 40.0
"""Seconds until it is ready; on a quiet machine it takes two."""
ADMIN = "admin-token"


def assets() -> tuple[str, str] | None:
    """Where etcd and kube-apiserver are."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PATH", "")]))
    etcd, server = shutil.which("etcd", path=path), shutil.which("kube-apiserver", path=path)
    return (etcd, server) if etcd and server else None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class RealApiServer(KubernetesApi):
    """A cluster of its own, with RBAC. The token ``admin-token`` may do everything, others what they are granted.

    Args:
        folder: For its data, logs and certificates.
        programs: Where etcd and kube-apiserver are; see `assets`.
        tokens: Users by bearer token, beside the admin's.
    """

    def __init__(self, folder: Path, programs: tuple[str, str], tokens: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port, self._etcd_port, peer_port = _free_ports(3)
        self.url = f"https://127.0.0.1:{self.port}"
        self.certificates: Certificates = certificates(folder)
        command = ["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        users = {ADMIN: "admin", **(tokens or {})}
        lines = [
            f'{token},{user},{user},"{"system:masters" if user == "admin" else ""}"' for token, user in users.items()
        ]
        (folder / "tokens.csv").write_text("\n".join(lines) + "\n")
        etcd = f"http://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{peer_port}"
        self._etcd = [programs[0], f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd}"]
        self._etcd += [f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}", "--unsafe-no-fsync"]
        self._etcd += [f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"]
        at = self.certificates.path
        self._server = [programs[1], f"--etcd-servers={etcd}", f"--secure-port={self.port}", "--bind-address=127.0.0.1"]
        self._server += [f"--tls-cert-file={at('server.crt')}", f"--tls-private-key-file={at('server.key')}"]
        self._server += [f"--client-ca-file={at('ca.crt')}", f"--token-auth-file={folder / 'tokens.csv'}"]
        self._server += [f"--service-account-key-file={at('sa.key')}", "--authorization-mode=RBAC"]
        self._server += [f"--service-account-signing-key-file={at('sa.key')}", "--watch-cache=true"]
        self._server += ["--service-account-issuer=https://kubernetes.default.svc", f"--cert-dir={folder}"]
        self._server += ["--service-cluster-ip-range=10.99.0.0/24", "--disable-admission-plugins=ServiceAccount"]
        self._server += ["--endpoint-reconciler-type=none", "--shutdown-delay-duration=0s"]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: set[str] = set()
        self._http = httpx.Client(
            base_url=self.url, verify=False, headers={"authorization": f"Bearer {ADMIN}"}, trust_env=False, timeout=20
        )

    def __enter__(self) -> Self:
        self._spawn("etcd", self._etcd)
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait(20)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def start(self) -> None:
        """Start the API server, and wait until it is ready."""
        self._spawn("kube-apiserver", self._server)
        until = time.monotonic() + START
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self._http.get("/readyz").status_code == 200:
                    return
            if self._processes["kube-apiserver"].poll() is not None or time.monotonic() > until:
                log = (self.folder / "kube-apiserver.log").read_text()[-2000:]
                raise RuntimeError(f"kube-apiserver does not start: {log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill the API server; etcd goes on."""
        process = self._processes["kube-apiserver"]
        process.kill()
        process.wait(20)

    def restart(self) -> None:
        """Kill and start it. Watches from versions before that are answered with 410, for its cache is new."""
        self.stop()
        self.start()

    def stall(self) -> None:
        """Stop the process without ending it: connections stay open and silent."""
        self._processes["kube-apiserver"].send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._processes["kube-apiserver"].send_signal(signal.SIGCONT)

    # --- what is in it ------------------------------------------------------------------------------------------------

    def apply(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """Create an object by its path, or put this in its place (server-side apply)."""
        query = {"fieldManager": "tests", "force": "true"}
        headers = {"content-type": "application/apply-patch+yaml"}
        answer = self._http.patch(path, params=query, headers=headers, content=json.dumps(content))
        if answer.status_code >= 300:
            raise RuntimeError(f"{path}: {answer.text}")
        return answer.json()

    def namespace(self, name: str) -> None:
        """See to it that it is there."""
        if name not in self._namespaces:
            self.apply(
                f"/api/v1/namespaces/{name}", {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}}
            )
            self._namespaces.add(name)

    def write(self, resource: str, namespace: str, name: str, content: dict[str, Any]) -> None:
        self.namespace(namespace)
        version, kind = KINDS[resource]
        metadata = content.get("metadata", {}) | {"name": name}
        whole = {**content, "apiVersion": version, "kind": kind, "metadata": metadata}
        self.apply(_path(resource, namespace, name), whole)

    def remove(self, resource: str, namespace: str, name: str) -> None:
        answer = self._http.delete(_path(resource, namespace, name))
        if answer.status_code == 404:
            raise KeyError(name)
        answer.raise_for_status()

    def role(self, namespace: str, rules: list[dict[str, Any]], subject: dict[str, str], name: str = "tests") -> None:
        """Let ``subject`` do this, and no more than this, in a namespace."""
        self.namespace(namespace)
        base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        api = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name}}
        self.apply(f"{base}/roles/{name}", api | {"kind": "Role", "rules": rules})
        ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        self.apply(f"{base}/rolebindings/{name}", api | {"kind": "RoleBinding", "subjects": [subject], "roleRef": ref})

    def service_account_token(self, namespace: str, name: str) -> str:
        """A token as the kubelet gives it to pods, for a service account that is made if need be."""
        self.namespace(namespace)
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}"
        self.apply(path, {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": name}})
        request = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": {"expirationSeconds": 600}}
        answer = self._http.post(f"{path}/token", json=request)
        answer.raise_for_status()
        token: str = answer.json()["status"]["token"]
        return token

    def kubeconfig(self, path: Path, **user: Any) -> Path:
        """Write a kubeconfig that leads here, with this user; by default the admin."""
        cluster = {"server": self.url, "certificate-authority": str(self.certificates.path("ca.crt"))}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "contexts": [{"name": "tests", "context": {"cluster": "real", "user": "tester"}}],
            "clusters": [{"name": "real", "cluster": cluster}],
            "users": [{"name": "tester", "user": user or {"token": ADMIN}}],
        }
        path.write_text(json.dumps(content))
        return path

    def environ(self, folder: Path, **user: Any) -> dict[str, str]:
        """An environment from which `meshlib.names.kubernetes.config.find` finds its way here."""
        return {"KUBECONFIG": str(self.kubeconfig(folder / "kubeconfig", **user))}


def _path(resource: str, namespace: str, name: str) -> str:
    version = KINDS[resource][0]
    return f"{'/apis' if '/' in version else '/api'}/{version}/namespaces/{namespace}/{resource}/{name}"
