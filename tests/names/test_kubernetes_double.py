"""The double of the API server answers as the real one does: both are asked the same."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..kubernetes import ApiServer, RealApiServer, endpoint

_numbers = itertools.count()
USERS = "kubernetes.io/service-name=users"


class Asked:
    """A cluster, with a namespace that nobody else uses, and a client with the rights of an admin or of a nobody."""

    def __init__(self, api: ApiServer | RealApiServer, token: str) -> None:
        self.api = api
        self.ns = f"double-{next(_numbers)}"
        self.slices = f"/apis/discovery.k8s.io/v1/namespaces/{self.ns}/endpointslices"
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=api.url, headers=headers, verify=False, timeout=10, trust_env=False)

    def get(self, path: str, token: str = "", **query: str) -> tuple[int, dict[str, Any]]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = self.http.get(path, params=query, headers=headers)
        return answer.status_code, answer.json()

    def list(self, **query: str) -> dict[str, Any]:
        status, body = self.get(self.slices, **query)
        assert status == 200, body
        return body

    def watch(self, since: str, count: int | None = None, seconds: int = 1, **query: str) -> list[dict[str, Any]]:
        """The first ``count`` events, or all until the watch ends."""
        options = {"watch": "true", "resourceVersion": since, "timeoutSeconds": str(seconds), **query}
        with self.http.stream("GET", self.slices, params=options) as answer:
            assert answer.headers["content-type"] == "application/json"
            return [json.loads(line) for line in itertools.islice(answer.iter_lines(), count)]

    def put(self, name: str, *addresses: str | dict[str, Any], service: str = "users") -> None:
        self.api.put_slice(self.ns, service, name, addresses, {"http": 8080})


@pytest.fixture(params=["double", "real"])
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    if request.param == "real":
        server = Asked(request.getfixturevalue("real_api_server"), "admin-token")
        server.api.namespace(server.ns)
        with server.http:
            yield server
        return
    with ApiServer(tokens={"admin-token": "admin", "reader-token": "reader"}) as api:
        for verb in ("list", "watch", "get"):
            for resource in ("endpointslices", "configmaps", "services"):
                api.forbid(verb, resource)
        api.exempt = {"admin"}
        server = Asked(api, "admin-token")
        with server.http:
            yield server


def names(found: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in found["items"]]


def seen(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(e["type"], e["object"]["metadata"]["name"]) for e in events if e["type"] not in ("BOOKMARK", "ERROR")]


def test_a_list_has_a_version_of_its_own_and_items_without_kinds(asked: Asked) -> None:
    asked.put("users-a", endpoint("10.0.0.1", zone="eu-1", nodeName="n1"), endpoint("10.0.0.2", ready=False))
    found = asked.list(labelSelector=USERS)
    assert (found["kind"], found["apiVersion"]) == ("EndpointSliceList", "discovery.k8s.io/v1")
    assert int(found["metadata"]["resourceVersion"]) >= int(found["items"][0]["metadata"]["resourceVersion"])
    item = found["items"][0]
    assert "kind" not in item
    assert item["addressType"] == "IPv4"
    assert item["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}]
    conditions = {"ready": True, "serving": True, "terminating": False}
    first = {"addresses": ["10.0.0.1"], "conditions": conditions, "zone": "eu-1", "nodeName": "n1"}
    assert item["endpoints"][0] == first
    assert item["endpoints"][1]["conditions"] == {"ready": False, "serving": False, "terminating": False}
    assert names(asked.list(labelSelector="kubernetes.io/service-name=nobody")) == []


def test_lists_come_in_pages_of_one_version(asked: Asked) -> None:
    for name in "abcde":
        asked.put(f"users-{name}", "10.0.0.1")
    first = asked.list(labelSelector=USERS, limit="2")
    asked.put("users-0", "10.0.0.9")
    second = asked.list(labelSelector=USERS, limit="2", **{"continue": first["metadata"]["continue"]})
    third = asked.list(labelSelector=USERS, limit="2", **{"continue": second["metadata"]["continue"]})
    pages = [first, second, third]
    assert [names(page) for page in pages] == [["users-a", "users-b"], ["users-c", "users-d"], ["users-e"]]
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    assert "continue" not in third["metadata"]
    assert "users-0" in names(asked.list())
    cached = asked.list(limit="2", resourceVersion="0")
    assert len(cached["items"]) == 6, "a list from the cache heeds no limit"


def test_a_watch_replays_what_has_happened_since(asked: Asked) -> None:
    asked.put("users-a", "10.0.0.1")
    since = asked.list()["metadata"]["resourceVersion"]
    asked.put("users-a", "10.0.0.1", "10.0.0.2")
    asked.put("users-b", "10.0.0.3")
    asked.put("other-a", "10.0.0.4", service="other")
    asked.api.delete_slice(asked.ns, "users-a")
    asked.put("users-b", "10.0.0.3", service="other")
    events = asked.watch(since, 4, labelSelector=USERS)
    expected = [("MODIFIED", "users-a"), ("ADDED", "users-b"), ("DELETED", "users-a"), ("DELETED", "users-b")]
    assert seen(events) == expected, "what leaves a selection is deleted from it"
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions == sorted(versions)
    assert events[0]["object"]["kind"] == "EndpointSlice"
    assert asked.watch(str(versions[-1]), labelSelector=USERS) == [], "no bookmark that nobody asked for"


def test_a_watch_from_nowhere_begins_with_what_there_is(asked: Asked) -> None:
    asked.put("users-a", "10.0.0.1")
    asked.put("users-b", "10.0.0.1")
    assert sorted(seen(asked.watch("0", 2))) == [("ADDED", "users-a"), ("ADDED", "users-b")]


def test_bookmarks_come_when_they_are_asked_for(asked: Asked) -> None:
    asked.put("users-a", "10.0.0.1")
    since = asked.list()["metadata"]["resourceVersion"]
    seconds = 4 if isinstance(asked.api, RealApiServer) else 1  # a real one sends one two seconds before the end
    assert asked.watch(since, seconds=seconds, allowWatchBookmarks="true") == [], "all is quiet: there is no news"
    query = {"labelSelector": USERS, "allowWatchBookmarks": "true"}
    later = threading.Timer(0.3, asked.put, ["other-a", "10.0.0.1"], {"service": "other"})
    later.start()
    events = asked.watch(since, seconds=seconds, **query)
    later.join()
    assert {event["type"] for event in events} == {"BOOKMARK"}
    last = events[-1]["object"]
    assert (last["kind"], last["endpoints"]) == ("EndpointSlice", None)
    assert int(last["metadata"]["resourceVersion"]) > int(since)


def test_after_a_restart_old_versions_are_gone(asked: Asked) -> None:
    asked.put("users-a", "10.0.0.1")
    since = asked.list()["metadata"]["resourceVersion"]
    asked.put("users-a", "10.0.0.2")
    asked.put("users-a", "10.0.0.3")
    asked.api.restart()
    (event,) = asked.watch(since)
    assert event["type"] == "ERROR"
    status = event["object"]
    assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired")
    assert status["message"].startswith(f"too old resource version: {since} (")
    assert asked.list()["items"][0]["endpoints"][0]["addresses"] == ["10.0.0.3"]


STATUS = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}


def test_who_is_unknown_and_what_is_forbidden(asked: Asked) -> None:
    unknown = STATUS | {"message": "Unauthorized", "reason": "Unauthorized", "code": 401}
    assert asked.get(asked.slices, token="nobody's") == (401, unknown)
    group = 'in API group "discovery.k8s.io" in the namespace'
    for verb, query in (("list", {}), ("watch", {"watch": "true"})):
        status, body = asked.get(asked.slices, token="reader-token", **query)
        message = (
            'endpointslices.discovery.k8s.io is forbidden: User "reader" cannot '
            f'{verb} resource "endpointslices" {group} "{asked.ns}"'
        )
        details = {"group": "discovery.k8s.io", "kind": "endpointslices"}
        assert (status, body) == (
            403,
            STATUS | {"message": message, "reason": "Forbidden", "details": details, "code": 403},
        )
    status, body = asked.get(f"/api/v1/namespaces/{asked.ns}/services/users", token="reader-token")
    assert status == 403
    assert body["details"] == {"name": "users", "kind": "services"}
    assert body["message"] == (
        'services "users" is forbidden: User "reader" cannot get resource "services" in API group "" '
        f'in the namespace "{asked.ns}"'
    )


def test_what_is_not_there(asked: Asked) -> None:
    missing = {"reason": "NotFound", "code": 404}
    for path, message, details in [
        (f"/api/v1/namespaces/{asked.ns}/services/x", 'services "x" not found', {"name": "x", "kind": "services"}),
        (
            f"{asked.slices}/x",
            'endpointslices.discovery.k8s.io "x" not found',
            {"name": "x", "group": "discovery.k8s.io", "kind": "endpointslices"},
        ),
        (f"/api/v1/namespaces/{asked.ns}/nothings", "the server could not find the requested resource", {}),
    ]:
        assert asked.get(path) == (404, STATUS | {"message": message, "details": details} | missing)


def test_single_objects(asked: Asked) -> None:
    asked.api.put_service(asked.ns, "users", {"http": 8080})
    asked.api.put_configmap(asked.ns, "routes", {"dtab": "/s => /t"})
    status, service = asked.get(f"/api/v1/namespaces/{asked.ns}/services/users")
    assert (status, service["kind"], service["spec"]["clusterIP"]) == (200, "Service", "None")
    path = f"/api/v1/namespaces/{asked.ns}/configmaps"
    assert asked.get(f"{path}/routes")[1]["data"] == {"dtab": "/s => /t"}
    selected = asked.get(path, fieldSelector="metadata.name=routes")[1]
    assert names(selected) == ["routes"]
    asked.api.delete_configmap(asked.ns, "routes")
    assert asked.get(f"{path}/routes")[0] == 404
    with pytest.raises(KeyError):
        asked.api.delete_configmap(asked.ns, "routes")


def test_a_version_to_come_cannot_be_listed(asked: Asked) -> None:
    status, body = asked.get(asked.slices, resourceVersion="99999999")
    assert (status, body["reason"]) == (504, "Timeout")
    assert body["message"].startswith("Timeout: Too large resource version: 99999999, current: ")


# --- what only the double can do --------------------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[Asked]:
    with ApiServer() as server:
        asked = Asked(server, "")
        with asked.http:
            yield asked


def test_history_is_bounded_and_can_be_forgotten(api: Asked) -> None:
    api.put("users-a", "10.0.0.1")
    since = api.list()["metadata"]["resourceVersion"]
    page = api.list(limit="1") if api.put("users-b", "10.0.0.1") is None else {}
    api.api.compact()
    assert api.watch(since)[0]["type"] == "ERROR"
    api.api.expired_as = "http"
    assert api.get(api.slices, watch="true", resourceVersion=since)[0] == 410
    status, body = api.get(api.slices, **{"limit": "1", "continue": page["metadata"]["continue"]})
    assert (status, body["reason"]) == (410, "Expired")
    assert seen(api.watch(api.list()["metadata"]["resourceVersion"])) == []


@pytest.mark.parametrize(("how", "error"), [("cut", httpx.RemoteProtocolError), ("reset", httpx.ReadError)])
def test_watches_are_broken_off(api: Asked, how: str, error: type[Exception]) -> None:
    api.put("users-a", "10.0.0.1")
    with api.http.stream("GET", api.slices, params={"watch": "1"}) as answer:
        chunks = answer.iter_raw()
        assert b'"ADDED"' in next(chunks)
        api.api.drop(how)
        with pytest.raises(error):
            list(chunks)
    assert api.list()["items"]
    assert api.api.watches == 0


def test_a_silent_watch_says_later_what_it_held_back(api: Asked) -> None:
    query = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": "1"}
    with api.http.stream("GET", api.slices, params=query, timeout=httpx.Timeout(5, read=0.5)) as answer:
        api.api.wait_for_watches(1)
        api.api.stall()
        api.put("users-a", "10.0.0.1")
        with pytest.raises(httpx.ReadTimeout):
            list(answer.iter_lines())
    with api.http.stream("GET", api.slices, params=query) as answer:
        lines = answer.iter_lines()
        api.api.resume()
        assert json.loads(next(lines))["type"] == "ADDED"


def test_it_refuses_as_often_as_it_is_told_to(api: Asked) -> None:
    api.api.fail(2, 429, retry_after=3)
    api.api.fail(1, 0)
    answers = [api.http.get(api.slices) for _ in range(2)]
    assert [(a.status_code, a.headers["retry-after"]) for a in answers] == [(429, "3"), (429, "3")]
    with pytest.raises(httpx.TransportError):
        api.http.get(api.slices)
    assert api.http.get(api.slices).status_code == 200
    assert len(api.api.requests) == 4


def test_it_stops_and_starts_on_its_port(api: Asked, tmp_path: Path) -> None:
    api.put("users-a", "10.0.0.1")
    port = api.api.port
    api.api.stop()
    with pytest.raises(httpx.ConnectError):
        api.list()
    api.api.start()
    assert api.api.port == port
    assert names(api.list()) == ["users-a"]


def test_large_answers_are_compressed(api: Asked) -> None:
    api.put("users-a", *(f"10.0.{n // 256}.{n % 256}" for n in range(3000)))
    answer = api.http.get(api.slices)
    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.json()["items"][0]["endpoints"]) == 3000
