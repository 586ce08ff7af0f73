"""``k8s://namespace/name[:part]``: which object, and what of it. Pure.

The object is a Service and the part one of its ports, by name or by number; or it is a ConfigMap and the part a key.
Without a namespace, ``k8s:///name``, it is the pod's own, or that of the kubeconfig's context.

Names go into URLs and selectors, so nothing but what Kubernetes itself takes for a name is let through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ...core.errors import ConfigurationError
from ..target import Target

__all__ = ["Place"]

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""RFC 1123's label, as Kubernetes reads it: namespaces, services, and the names of ports."""
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")


@dataclass(frozen=True, slots=True)
class Place:
    """An object of a namespace.

    Attributes:
        namespace: Empty for one's own.
        name: The object's.
        part: A port's name or number, or a key; empty where there is only one.
        text: The target, for messages.
    """

    namespace: str
    name: str
    part: str
    text: str

    @classmethod
    def service(cls, target: Target) -> Place:
        """A Service, and one of its ports.

        Raises:
            ConfigurationError: It is malformed.
        """
        place = cls._split(target, "service:port")
        place._check(place.name, _LABEL, "service")
        if place.part.isdigit():
            if not (len(place.part) <= 5 and 0 < int(place.part) < 65536):
                raise ConfigurationError(f"target {target.text!r}: a port has a number from 1 to 65535")
        elif place.part:
            place._check(place.part, _LABEL, "port")
        return place

    @classmethod
    def config_map(cls, target: Target) -> Place:
        """A ConfigMap, and one of its keys.

        Raises:
            ConfigurationError: It is malformed.
        """
        place = cls._split(target, "configmap:key")
        place._check(place.name, _SUBDOMAIN, "ConfigMap")
        if place.part:
            place._check(place.part, _KEY, "key")
        return place

    @classmethod
    def _split(cls, target: Target, form: str) -> Place:
        namespace, slash, rest = target.rest.partition("/")
        name, colon, part = rest.partition(":")
        if not (slash and name) or "/" in rest or (colon and not part):
            raise ConfigurationError(f"target {target.text!r}: expected k8s://namespace/{form}")
        place = cls(namespace, name, part, target.text)
        if namespace:
            place._check(namespace, _LABEL, "namespace")
        return place

    def _check(self, name: str, form: re.Pattern[str], what: str) -> None:
        if not form.fullmatch(name):
            raise ConfigurationError(f"target {self.text!r}: {name!r} is no name that a {what} can have in Kubernetes")

    @property
    def number(self) -> int | None:
        """The port's number, if that is what was given."""
        return int(self.part) if self.part.isdigit() else None

    def __str__(self) -> str:
        return self.text
