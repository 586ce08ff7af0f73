"""What the Service itself says, where its EndpointSlices do not: is there one at all, and which port has which number?

A number in a target is the Service's, as in ``http://users.shop:80``; slices know ports by their names and by the pods'
numbers. So the Service is asked, once, for the port's name. Where it may not be asked, or has no such port, the number
is taken for the pods'.
"""

from __future__ import annotations

import logging

import httpx
import msgspec

from ...core.errors import ConfigurationError
from ..addr import Addr, Bound, Failed, Neg
from .answers import Refused, refusal, whole
from .place import Place

__all__ = ["Services"]

logger = logging.getLogger("meshlib.names")

_LARGEST = 4 * 1024 * 1024


class _Port(msgspec.Struct):
    port: int
    name: str | None = None
    protocol: str | None = None


class _Spec(msgspec.Struct, rename="camel"):
    type: str = ""
    external_name: str = ""
    ports: list[_Port] | None = None


class Service(msgspec.Struct):
    """``Service`` of ``v1``."""

    spec: _Spec


class Services:
    """Asks for one Service.

    Args:
        client: Speaks to the API server.
        namespace: The Service's.
        place: The target.
    """

    def __init__(self, client: httpx.AsyncClient, namespace: str, place: Place) -> None:
        self._client, self._namespace, self._place = client, namespace, place
        self._path = f"/api/v1/namespaces/{namespace}/services/{place.name}"
        self._warned = False

    async def port_name(self) -> str | None:
        """The name of the port whose number the target has; empty if the port has none, ``None`` if it is unknown."""
        service = await self._get()
        if not isinstance(service, Service):
            return None
        for port in service.spec.ports or []:
            if port.port == self._place.number and port.protocol in (None, "", "TCP"):
                return port.name or ""
        return None

    async def without_slices(self) -> Addr:
        """What it means that there are no slices."""
        service = await self._get()
        where = f"Service {self._place.name!r} in namespace {self._namespace!r}"
        if service is None:
            return Neg(f"there is no {where}")
        if isinstance(service, Service) and service.spec.type == "ExternalName":
            other = f"dns://{service.spec.external_name}:{self._place.number or 'PORT'}"
            return Failed(f"{where} is only another name for a host: use {other} instead")
        return Bound(())

    async def _get(self) -> Service | str | None:
        """It; ``None`` if there is none; a text if it may not be asked for.

        Raises:
            httpx.TransportError: The API server cannot be reached.
            Refused: It does not answer.
        """
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with self._client.stream("GET", self._path, headers=headers) as response:
            if response.status_code == 404:
                return None
            if response.status_code != 200:
                error = await refusal(response, "get", "services", self._namespace)
                if response.status_code != 403 or not isinstance(error, ConfigurationError):
                    raise error
                if not self._warned:
                    self._warned = True
                    logger.warning("%s: whether there is such a Service cannot be told: %s", self._place, error)
                return "forbidden"
            try:
                return msgspec.json.decode(await whole(response, _LARGEST), type=Service)
            except msgspec.DecodeError as error:
                raise Refused(f"the Service {self._place.name!r} cannot be read: {error}", 200) from error
