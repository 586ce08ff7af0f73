"""Certificates for API servers and their clients, made with openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Certificates", "certificates"]


@dataclass(frozen=True)
class Certificates:
    """Files for TLS: an authority, a server's certificate for 127.0.0.1, a client's for the user ``cert-user``."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name


def certificates(folder: Path) -> Certificates:
    """Make them, with openssl."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-days", "2", "-subj", "/CN=tests-ca", "-keyout", "ca.key", "-out", "ca.crt")
    (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1,DNS:kubernetes.default.svc\n")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name, subject in (("server", "/CN=apiserver"), ("client", "/CN=cert-user"), ("client2", "/CN=other-user")):
        openssl("req", *curve, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        ext = "server.ext" if name == "server" else "client.ext"
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", ext)
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.crt")
    return Certificates(folder)
