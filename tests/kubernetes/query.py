"""What a request asks for: its path, its selectors, and the words in which the real server refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .api import KINDS

__all__ = ["Key", "Query", "Refusal", "Request", "asked", "forbidden", "not_found"]

Key = tuple[str, str, str]
"""Resource, namespace, name."""


@dataclass(frozen=True)
class Request:
    """A request that came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Query:
    """What a list or a watch is of."""

    resource: str
    namespace: str
    labels: Callable[[Mapping[str, str]], bool]
    fields: Callable[[Mapping[str, Any]], bool]

    def has(self, key: Key) -> bool:
        return key[0] == self.resource and self.namespace in ("", key[1])


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        self.body = status | ({"reason": reason} if reason else {}) | ({} if details is None else {"details": details})
        self.body["code"] = code


def not_found(query: Query, name: str) -> Refusal:
    """There is no such object."""
    group, qualified = _group(query.resource)
    details = {"name": name} | ({"group": group} if group else {}) | {"kind": query.resource}
    return Refusal(404, "NotFound", f'{qualified} "{name}" not found', details)


def forbidden(user: str, verb: str, query: Query, name: str) -> Refusal:
    """RBAC grants it by no role."""
    group, qualified = _group(query.resource)
    place = f'in the namespace "{query.namespace}"' if query.namespace else "at the cluster scope"
    what = f'{qualified} "{name}"' if name else qualified
    details = ({"name": name} if name else {}) | ({"group": group} if group else {}) | {"kind": query.resource}
    asked = f'User "{user}" cannot {verb} resource "{query.resource}" in API group "{group}"'
    return Refusal(403, "Forbidden", f"{what} is forbidden: {asked} {place}", details)


def _group(resource: str) -> tuple[str, str]:
    group = KINDS[resource][0].rpartition("/")[0]
    return group, f"{resource}.{group}" if group else resource


PATH = re.compile(r"/(?:api/v1|apis/([^/]+)/v1)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?")


def asked(request: Request) -> tuple[Query, str]:
    match = PATH.fullmatch(request.path)
    kind = KINDS.get(match[3]) if match else None
    if match is None or kind is None or kind[0].rpartition("/")[0] != (match[1] or "") or request.method != "GET":
        raise Refusal(404, "NotFound", "the server could not find the requested resource", {})
    version = request.query.get("resourceVersion", "0")
    if not re.fullmatch(r"\d*", version):
        raise Refusal(500, "", f'resourceVersion: Invalid value: "{version}": strconv.ParseUint: invalid syntax')
    labels = _labels(request.query.get("labelSelector", ""))
    return Query(match[3], match[2] or "", labels, _fields(request.query.get("fieldSelector", ""))), match[4] or ""


def _labels(selector: str) -> Callable[[Mapping[str, str]], bool]:
    tests: list[tuple[str, bool, set[str] | None]] = []
    for part in re.findall(r"[^,(]+(?:\([^)]*\))?", selector):
        if match := re.fullmatch(r"\s*([\w./-]+)\s+(in|notin)\s+\(([^)]*)\)\s*", part):
            tests.append((match[1], match[2] == "in", {value.strip() for value in match[3].split(",")}))
        elif match := re.fullmatch(r"\s*([\w./-]+)\s*(=|==|!=)\s*([\w.-]*)\s*", part):
            tests.append((match[1], match[2] != "!=", {match[3]}))
        elif match := re.fullmatch(r"\s*(!?)([\w./-]+)\s*", part):
            tests.append((match[2], not match[1], None))
        else:
            raise Refusal(400, "BadRequest", f"unable to parse requirement: {part}")

    def chosen(labels: Mapping[str, str]) -> bool:
        return all(yes == (key in labels and (values is None or labels[key] in values)) for key, yes, values in tests)

    return chosen


def _fields(selector: str) -> Callable[[Mapping[str, Any]], bool]:
    wanted = dict(part.replace("==", "=").split("=", 1) for part in selector.split(",") if part)
    if set(wanted) - {"metadata.name", "metadata.namespace"}:
        raise Refusal(400, "BadRequest", f"field label not supported: {selector}")
    return lambda metadata: all(metadata[key.partition(".")[2]] == value for key, value in wanted.items())
