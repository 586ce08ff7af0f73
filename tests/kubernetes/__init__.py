"""Kubernetes' API server for tests: a double that is always there, and the real one where it is installed."""

from .api import KubernetesApi, endpoint
from .certificates import Certificates, certificates
from .double import ApiServer, Request
from .real import RealApiServer, assets

__all__ = [
    "ApiServer",
    "Certificates",
    "KubernetesApi",
    "RealApiServer",
    "Request",
    "assets",
    "certificates",
    "endpoint",
]
