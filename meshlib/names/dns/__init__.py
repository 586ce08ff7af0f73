"""DNS: ``dns://host:port`` (A and AAAA records) and ``srv://_name._tcp.domain`` (SRV records).

This room is entered when such a target is used; only then is dnspython imported.
"""

from __future__ import annotations

from .resolver import DnsResolver, SrvResolver

__all__ = ["DnsResolver", "SrvResolver"]
