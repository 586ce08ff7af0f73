"""TLS to an API server: its certificates verified as Go does it, and a client certificate out of memory.

Go and OpenSSL differ in what they ask of certificates, and clusters are made for Go:

* Python 3.13 turns on OpenSSL's strict mode, which refuses authorities without an Authority Key Identifier. Those of
  many clusters that were made years ago, and of managed ones, have none. Go does not ask for it, nor do we.
* Go takes any certificate that it is given for an anchor; OpenSSL wants a self-signed one, unless it is told otherwise.

Python loads client certificates from files only. What comes from memory is written to a folder that only this user can
enter, loaded, and removed at once.
"""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from ...core.errors import ConfigurationError
from .entries import Cluster

__all__ = ["ApiContext", "present", "verifying"]


class ApiContext(ssl.SSLContext):
    """A client's TLS settings, in which one may say which name the server's certificate bears."""

    server_name = ""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """As its parent, with this name instead of the URL's host. Through a proxy too, where httpx has no way."""
        name = self.server_name or server_hostname
        return super().wrap_bio(incoming, outgoing, server_side, name, session)


def verifying(cluster: Cluster, where: str) -> ApiContext:
    """How to verify ``cluster``. Blocks: for worker threads.

    Raises:
        ConfigurationError: Its authority is not a certificate.
    """
    context = ApiContext(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = cluster.server_name
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if cluster.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif cluster.authority is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        try:
            context.load_verify_locations(cadata=cluster.authority.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigurationError(f"{where}: certificate-authority: no certificates in PEM: {error}") from error
    return context


def present(context: ssl.SSLContext, certificate: bytes, key: bytes, where: str) -> None:
    """Show this client certificate from now on.

    It takes a millisecond, and is to be called where the context is used: OpenSSL does not let one thread change what
    another begins a handshake with.

    Raises:
        ConfigurationError: They are not a certificate and its key, or the key is encrypted.
    """

    def password() -> str:
        raise ConfigurationError(f"{where}: client-key: it is encrypted, and nobody is here to ask for the password")

    with tempfile.TemporaryDirectory(prefix="meshlib-") as folder:  # mode 0700
        files = []
        for name, pem in (("certificate", certificate), ("key", key)):
            path = Path(folder, name)
            path.touch(0o600, exist_ok=False)
            path.write_bytes(pem)
            files.append(path)
        try:
            context.load_cert_chain(files[0], files[1], password)
        except ssl.SSLError as error:
            raise ConfigurationError(f"{where}: client-certificate, client-key: {error}") from error
