"""ZooKeeper: ``zk://host[,host]/path[!endpoint]``, read (serversets and plain members) and announced to.

This room is entered when a ``zk://`` target is used; only then is kazoo imported.
"""

from __future__ import annotations

from .announcer import ZooKeeperAnnouncer
from .resolver import ZooKeeperResolver
from .texts import ZooKeeperTexts

__all__ = ["ZooKeeperAnnouncer", "ZooKeeperResolver", "ZooKeeperTexts"]
