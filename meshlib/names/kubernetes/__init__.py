"""Kubernetes: ``k8s://namespace/service:port`` by EndpointSlices, and ``k8s://namespace/configmap:key`` as a text.

This room is entered when a ``k8s://`` target is used; only then is httpx imported.
"""

from __future__ import annotations

from .resolver import KubernetesResolver
from .texts import ConfigMapTexts

__all__ = ["ConfigMapTexts", "KubernetesResolver"]
