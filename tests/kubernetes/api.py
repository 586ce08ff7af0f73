"""What tests do to a cluster, whichever it is: write slices, services and config maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["KINDS", "SERVICE_NAME", "KubernetesApi", "endpoint"]

KINDS = {
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice"),
    "services": ("v1", "Service"),
    "configmaps": ("v1", "ConfigMap"),
}
SERVICE_NAME = "kubernetes.io/service-name"


def endpoint(address: str, *, ready: bool = True, serving: bool | None = None, terminating: bool = False, **more: Any):
    """One endpoint of a slice, as the endpoint slice controller writes it."""
    conditions = {"ready": ready, "serving": ready if serving is None else serving, "terminating": terminating}
    return {"addresses": [address], "conditions": conditions, **more}


class KubernetesApi:
    """What a test may do to a cluster, the double's or a real one's."""

    def write(self, resource: str, namespace: str, name: str, content: dict[str, Any]) -> None:
        """Create an object, or put this in its place."""
        raise NotImplementedError

    def remove(self, resource: str, namespace: str, name: str) -> None:
        """Delete an object that is there."""
        raise NotImplementedError

    def put_slice(
        self,
        namespace: str,
        service: str,
        name: str,
        endpoints: Iterable[str | dict[str, Any]],
        ports: Mapping[str, int] | list[dict[str, Any]],
        address_type: str = "IPv4",
    ) -> None:
        """Write an EndpointSlice. Endpoints are addresses, or made by `endpoint`; ports are by name, or whole."""
        named = (
            [{"name": n, "port": p, "protocol": "TCP"} for n, p in ports.items()] if isinstance(ports, dict) else ports
        )
        listed = [endpoint(e) if isinstance(e, str) else e for e in endpoints]
        content = {"addressType": address_type, "endpoints": listed, "ports": named}
        content["metadata"] = {"labels": {SERVICE_NAME: service}}
        self.write("endpointslices", namespace, name, content)

    def delete_slice(self, namespace: str, name: str) -> None:
        """Delete an EndpointSlice."""
        self.remove("endpointslices", namespace, name)

    def put_service(self, namespace: str, name: str, ports: Mapping[str, int] | None = None) -> None:
        """Write a headless Service."""
        named = [{"name": n, "port": p, "protocol": "TCP"} for n, p in (ports or {"http": 80}).items()]
        self.write(
            "services", namespace, name, {"spec": {"clusterIP": "None", "selector": {"app": name}, "ports": named}}
        )

    def delete_service(self, namespace: str, name: str) -> None:
        """Delete a Service."""
        self.remove("services", namespace, name)

    def put_configmap(self, namespace: str, name: str, data: Mapping[str, str]) -> None:
        """Write a ConfigMap."""
        self.write("configmaps", namespace, name, {"data": dict(data)})

    def delete_configmap(self, namespace: str, name: str) -> None:
        """Delete a ConfigMap."""
        self.remove("configmaps", namespace, name)
