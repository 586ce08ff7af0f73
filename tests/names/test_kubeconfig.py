"""Where the API server is, and who we are to it: kubeconfig files, pods, tokens, certificates, plugins."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.errors import ConfigurationError
from meshlib.names.kubernetes import plugin as plugin_module
from meshlib.names.kubernetes.config import Access, explain, find
from meshlib.names.kubernetes.entries import Plugin
from meshlib.names.kubernetes.kubeconfig import merged, parse, read
from meshlib.names.kubernetes.plugin import parse_credential

from ..kubernetes import ApiServer, Certificates, RealApiServer, certificates

SERVICE = "/api/v1/namespaces/shop/services/users"


def config(user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "current-context": "dev",
        "contexts": [{"name": "dev", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443"} | (cluster or {})}],
        "users": [{"name": "u", "user": user or {}}],
    }


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- the file ---------------------------------------------------------------------------------------------------------

YAML = """
apiVersion: v1
kind: Config
current-context: dev
contexts:
- {name: dev, context: {cluster: c, user: u}}
clusters:
- name: c
  cluster: {server: "https://k8s.example/k8s/clusters/c-1", tls-server-name: kubernetes, proxy-url: "socks5://p:1080"}
users:
- name: u
  user: {token: "123"}
"""


def test_yaml_is_read_as_json_is(tmp_path: Path) -> None:
    context = read([write(tmp_path / "config", YAML)])
    assert context is not None
    cluster = context.cluster
    assert (cluster.server, cluster.server_name) == ("https://k8s.example/k8s/clusters/c-1", "kubernetes")
    assert (cluster.proxy, context.namespace, context.user.token) == ("socks5://p:1080", "default", "123")
    assert "123" not in repr(context), "no secret is shown"


def test_yaml_without_pyyaml_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigurationError, match=r"conf: .* needs PyYAML: pip install 'meshlib-rpc\[kubernetes\]'"):
        parse(b"current-context: dev", "conf")
    assert parse(b'{"current-context": "dev"}', "conf") == {"current-context": "dev"}


def test_several_files_are_merged_and_the_first_counts(tmp_path: Path) -> None:
    first = config({"token": "first"})
    del first["clusters"], first["current-context"]
    second = config({"token": "second"}, {"certificate-authority": "ca.pem"})
    second["contexts"][0]["context"]["namespace"] = "other"
    write(tmp_path / "b" / "ca.pem", "pem")
    paths = [tmp_path / "gone", write(tmp_path / "a" / "config", first), write(tmp_path / "b" / "config", second)]
    context = read(paths)
    assert context is not None
    assert (context.user.token, context.namespace) == ("first", "shop")
    assert context.cluster.authority == b"pem", "a path is relative to the file that it stands in"
    assert context.source == str(paths[2])
    assert read(paths[:1]) is None


def test_what_is_given_as_data_goes_before_a_path() -> None:
    data = base64.b64encode(b"inline").decode()
    user = {"client-certificate": "c.pem", "client-certificate-data": data, "client-key": "keys/k.pem"}
    context = merged([(Path("/x/config"), config(user))])
    assert context.user.certificate == b"inline"
    assert context.user.key == Path("/x/keys/k.pem")


@pytest.mark.parametrize(
    ("user", "cluster", "message"),
    [
        ({"token": 123}, {}, r"/x/config: users: 'u': token: expected text, found a number; put it in quotes"),
        ({"client-certificate": "c"}, {}, r"users: 'u': client-certificate without client-key: both are needed"),
        ({"client-key": "c"}, {}, r"users: 'u': client-key without client-certificate: both are needed"),
        ({"client-key-data": "!"}, {}, r"users: 'u': client-key-data: not base64"),
        ({"auth-provider": {"name": "gcp"}}, {}, r"users: 'u': auth-provider: .* use an exec plugin"),
        ({"exec": "x"}, {}, r"users: 'u': exec: expected a mapping, found text"),
        ({"exec": {"command": "x", "apiVersion": "v1alpha1"}}, {}, r"exec: apiVersion: expected client.* or "),
        ({"exec": {"apiVersion": "client.authentication.k8s.io/v1"}}, {}, r"exec: command: expected the program's"),
        ({"as-groups": ["a\nb"]}, {}, r"users: 'u': as: names must be one line"),
        ({}, {"server": "10.0.0.1"}, r"clusters: 'c': server: expected a URL such as https://10.0.0.1:6443, found '10"),
        ({}, {"server": "https://h:port"}, r"clusters: 'c': server: expected a URL"),
        ({}, {"proxy-url": "ftp://p"}, r"clusters: 'c': proxy-url: expected a URL with http, https or socks5"),
        ({}, {"certificate-authority": "gone"}, r"certificate-authority: cannot read /x/gone: No such file"),
        ({}, {"insecure-skip-tls-verify": "yes"}, r"insecure-skip-tls-verify: expected true or false, found text"),
        (
            {},
            {"insecure-skip-tls-verify": True, "certificate-authority-data": "eA=="},
            r"insecure-skip-tls-verify and certificate-authority exclude each other",
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_and_key(user: dict[str, Any], cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        merged([(Path("/x/config"), config(user, cluster))])


def test_what_nobody_uses_may_be_wrong() -> None:
    content = config({"token": "t"})
    content["users"].append({"name": "other", "user": {"token": 5, "auth-provider": {}}})
    content["clusters"].append({"name": "other", "cluster": 5})
    assert merged([(Path("/x/config"), content)]).user.token == "t"


def test_names_that_lead_nowhere_are_said_with_those_that_there_are() -> None:
    content = config()
    content["current-context"] = "prod"
    with pytest.raises(ConfigurationError, match=r"current-context 'prod': .*no such entry in contexts; there are dev"):
        merged([(Path("/x/config"), content)])
    del content["current-context"]
    with pytest.raises(ConfigurationError, match="/x/config: no current-context; there are contexts dev"):
        merged([(Path("/x/config"), content)])
    content = config()
    content["users"] = []
    with pytest.raises(ConfigurationError, match=r"'dev': user 'u': .*no such entry in users; there are \(none\)"):
        merged([(Path("/x/config"), content)])


@pytest.mark.parametrize(
    "text", ["a: [", "{", "a: b: c", "[1]", "x", "\tx: 1", "&a [*a, *a]", "a: \x00", "[" * 9999, "- " * 9999]
)
def test_what_is_no_kubeconfig_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^conf"):
        parse(text.encode(), "conf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigurationError):
        merged([(Path("/x/config"), parse(data, "conf"))])


@given(st.sampled_from(["contexts", "clusters", "users", "current-context"]), JSON, st.data())
def test_any_content_is_read_or_refused(section: str, value: Any, data: st.DataObject) -> None:
    content = config()
    if section != "current-context" and data.draw(st.booleans()):
        kind = section.removesuffix("s")
        content[section][0][kind] = data.draw(
            st.dictionaries(st.sampled_from([*KEYS[kind], *content[section][0][kind]]), JSON, max_size=4)
        )
    else:
        content[section] = value
    with contextlib.suppress(ConfigurationError):
        merged([(Path("/x/config"), content)])


KEYS = {
    "context": ["namespace"],
    "cluster": ["certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name", "proxy-url", "extensions"],
    "user": ["token", "exec", "as", "as-groups", "as-user-extra", "username", "client-key-data", "tokenFile"],
}


# --- where it is looked for -------------------------------------------------------------------------------------------


@pytest.fixture
def account(tmp_path: Path, tls: Certificates) -> Path:
    folder = tmp_path / "serviceaccount"
    write(folder / "token", "pod-token\n")
    write(folder / "namespace", "shop")
    write(folder / "ca.crt", tls.path("ca.crt").read_text())
    return folder


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


async def test_a_pod_uses_its_service_account_and_no_proxy(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    access = await find(POD, account=account)
    assert (access.server, access.namespace) == ("https://10.96.0.1:443", "shop")
    assert (await access.headers())["authorization"] == "Bearer pod-token"
    assert "pod-token" not in repr(access)
    async with await access.client() as http:
        assert http.trust_env is False
    assert (await find(POD | {"KUBERNETES_SERVICE_HOST": "fd00::1"}, account=account)).server == "https://[fd00::1]:443"


async def test_kubeconfig_goes_before_the_pod_and_the_home_comes_last(account: Path, tmp_path: Path) -> None:
    named = write(tmp_path / "named", config(cluster={"server": "https://named"}))
    home = write(tmp_path / ".kube" / "config", config(cluster={"server": "https://home"}))
    environ = POD | {"HOME": str(tmp_path)}
    assert (await find(environ | {"KUBECONFIG": str(named)}, account=account)).server == "https://named"
    assert (await Access.find(environ, account=account)).server == "https://10.96.0.1:443"
    assert (await find({"HOME": str(tmp_path)}, account=account)).server == "https://home"
    assert (await find(environ, account=tmp_path / "none")).source == f"context 'dev' of {home}"


async def test_nothing_to_be_found_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as found:
        await find(POD | {"HOME": str(tmp_path)}, account=tmp_path / "sa")
    assert str(found.value) == (
        "found no Kubernetes API server: KUBECONFIG is not set; this is a pod, but "
        f"{tmp_path / 'sa' / 'token'} is not there (automountServiceAccountToken: false?); "
        f"{tmp_path / '.kube' / 'config'} is not there"
    )
    with pytest.raises(ConfigurationError, match="KUBERNETES_SERVICE_HOST is not set, so this is no pod"):
        await find({"HOME": str(tmp_path)}, account=tmp_path)
    with pytest.raises(ConfigurationError, match="KUBECONFIG names /nowhere, which is not there"):
        await find({"KUBECONFIG": "/nowhere"})


# --- who we are -------------------------------------------------------------------------------------------------------


async def status(access: Access) -> int:
    async with await access.client() as http:
        return (await http.get(SERVICE)).status_code


async def user_of(api: ApiServer, access: Access) -> str:
    """As whom we come: the double's refusal says it."""
    api.forbid("get", "services")
    async with await access.client() as http:
        message: str = (await http.get(SERVICE)).json()["message"]
    return message.partition('User "')[2].partition('"')[0] or message


@pytest.fixture
def guarded() -> Iterator[ApiServer]:
    with ApiServer(tokens={"t1": "user-1"}) as api:
        api.put_service("shop", "users")
        yield api


async def test_a_static_token_is_sent_and_a_refusal_is_final(guarded: ApiServer, tmp_path: Path) -> None:
    access = await find(guarded.environ(tmp_path, token="t1"))
    assert await status(access) == 200
    guarded.revoke("t1")
    guarded.requests.clear()
    assert await status(access) == 401
    assert len(guarded.requests) == 1, "the same token would be refused again"


async def test_a_token_file_is_read_again_at_each_request(guarded: ApiServer, tmp_path: Path) -> None:
    token = write(tmp_path / "token", "t1\n")
    access = await find(guarded.environ(tmp_path, tokenFile="token", token="ignored"))
    async with await access.client() as http:
        assert (await http.get(SERVICE)).status_code == 200
        guarded.allow("t2")
        guarded.revoke("t1")
        write(token, "t2")
        assert (await http.get(SERVICE)).status_code == 200
        token.unlink()  # the kubelet swaps links; between two of them is nothing
        assert (await http.get(SERVICE)).status_code == 200
        guarded.revoke("t2")
        with pytest.raises(ConfigurationError, match=r"tokenFile: cannot read .*token: No such file"):
            await http.get(SERVICE)


@pytest.mark.parametrize("content", ["", "two words", "line\nline", "é"])
async def test_a_file_without_a_token_is_said(guarded: ApiServer, tmp_path: Path, content: str) -> None:
    write(tmp_path / "token", content)
    access = await find(guarded.environ(tmp_path, tokenFile="token"))
    with pytest.raises(ConfigurationError, match=r"token holds no token: expected one line of printable ASCII"):
        await access.headers()


async def test_passwords_and_impersonation_are_headers(tmp_path: Path) -> None:
    user = {"username": "u", "password": "p:w", "as": "jane", "as-groups": ["a", "b"], "as-user-extra": {"x/y": ["1"]}}
    path = write(tmp_path / "config", config(user))
    headers = await (await find({"KUBECONFIG": str(path)})).headers()
    assert headers["authorization"] == "Basic " + base64.b64encode(b"u:p:w").decode()
    assert headers.get_list("impersonate-group") == ["a", "b"]
    assert (headers["impersonate-user"], headers["impersonate-extra-x%2fy"]) == ("jane", "1")


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(tls: Certificates) -> Iterator[ApiServer]:
    with ApiServer(tls=tls, tokens={"t1": "user-1"}) as api:
        yield api


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


async def test_client_certificates_as_data_and_as_files(secure: ApiServer, tls: Certificates, tmp_path: Path) -> None:
    crt, key = tls.path("client.crt"), tls.path("client.key")
    data = {"client-certificate-data": in_base64(crt), "client-key-data": in_base64(key)}
    assert await user_of(secure, await find(secure.environ(tmp_path, **data))) == "cert-user"
    files = {"client-certificate": str(crt), "client-key": str(key)}
    assert await user_of(secure, await find(secure.environ(tmp_path, **files))) == "cert-user"
    assert await user_of(secure, await find(secure.environ(tmp_path, **files, token="t1"))) == "user-1"
    assert await user_of(secure, await find(secure.environ(tmp_path))) == "Unauthorized"


async def test_a_certificate_that_was_renewed_is_shown_from_then_on(
    secure: ApiServer, tls: Certificates, tmp_path: Path
) -> None:
    secure.forbid("get", "services")
    crt, key = tmp_path / "c.crt", tmp_path / "c.key"
    crt.write_bytes(tls.path("client.crt").read_bytes())
    key.write_bytes(tls.path("client.key").read_bytes())
    access = await find(secure.environ(tmp_path, **{"client-certificate": "c.crt", "client-key": "c.key"}))
    async with await access.client() as http:
        assert "cert-user" in (await http.get(SERVICE)).text
        crt.write_bytes(tls.path("client2.crt").read_bytes())
        key.write_bytes(tls.path("client2.key").read_bytes())
        assert "other-user" in (await http.get(SERVICE)).text


async def test_keys_from_memory_leave_no_file_behind(
    secure: ApiServer, tls: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    modes = []
    load = __import__("ssl").SSLContext.load_cert_chain

    def noted(self: Any, certificate: Path, key: Path, password: Any) -> None:
        modes.append((stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(key.parent.stat().st_mode)))
        load(self, certificate, key, password)

    monkeypatch.setattr("ssl.SSLContext.load_cert_chain", noted)
    crt, key = tls.path("client.crt"), tls.path("client.key")
    data = {"client-certificate-data": in_base64(crt), "client-key-data": in_base64(key)}
    access = await find(secure.environ(tmp_path, **data))
    assert await user_of(secure, access) == "cert-user"
    assert modes == [(0o600, 0o700)]
    assert list(scratch.iterdir()) == []
    bad = {"client-certificate-data": in_base64(crt), "client-key-data": in_base64(tls.path("client2.key"))}
    with pytest.raises(ConfigurationError, match=r"users: 'tester': client-certificate, client-key: .*MISMATCH"):
        await status(await find(secure.environ(tmp_path, **bad)))
    assert list(scratch.iterdir()) == []


async def test_the_server_is_verified(secure: ApiServer, tls: Certificates, tmp_path: Path) -> None:
    ca = {"certificate-authority": str(tls.path("ca.crt"))}

    async def ask(cluster: dict[str, Any]) -> int:
        content = config({"token": "t1"}, {"server": secure.url} | cluster)
        return await status(await find({"KUBECONFIG": str(write(tmp_path / "config", content))}))

    assert await ask(ca) == 404
    assert await ask(ca | {"tls-server-name": "kubernetes.default.svc"}) == 404
    assert await ask({"insecure-skip-tls-verify": True}) == 404
    for cluster in ({}, ca | {"tls-server-name": "example.com"}):
        with pytest.raises(httpx.ConnectError) as failed:
            await ask(cluster)
        assert "certificate verify failed" in explain(failed.value)
    with pytest.raises(ConfigurationError, match="certificate-authority: no certificates in PEM"):
        await ask({"certificate-authority-data": base64.b64encode(b"no pem").decode()})


# --- plugins ----------------------------------------------------------------------------------------------------------

V1 = "client.authentication.k8s.io/v1"


def program(folder: Path, body: str) -> dict[str, Any]:
    """A plugin: a Python program in this folder, which counts its runs."""
    text = f"#!{sys.executable}\nimport json, os, sys\nopen({str(folder / 'runs')!r}, 'a').write('x')\n{body}\n"
    path = write(folder / "plugin", text)
    path.chmod(0o755)
    return {"apiVersion": V1, "command": "./plugin", "installHint": "get it from example.com"}


def printing(**status: Any) -> str:
    return f"print(json.dumps({ {'apiVersion': V1, 'kind': 'ExecCredential', 'status': status}!r}))"


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


async def test_a_plugin_is_run_once_for_all_and_again_after_a_401(guarded: ApiServer, tmp_path: Path) -> None:
    user = {"exec": program(tmp_path, printing(token="t1"))}
    one, two = await find(guarded.environ(tmp_path, **user)), await find(guarded.environ(tmp_path, **user))
    statuses = []

    async def ask(access: Access) -> None:
        statuses.append(await status(access))

    async with anyio.create_task_group() as group:
        for access in (one, two, one):
            group.start_soon(ask, access)
    assert statuses == [200, 200, 200]
    assert runs(tmp_path) == 1
    guarded.allow("t2")
    guarded.revoke("t1")
    program(tmp_path, printing(token="t2"))
    assert await status(one) == 200
    assert runs(tmp_path) == 2
    assert await status(two) == 200
    assert runs(tmp_path) == 2


async def test_a_plugin_is_told_what_it_asks_for(guarded: ApiServer, tmp_path: Path) -> None:
    told = tmp_path / "told"
    body = f"json.dump([sys.argv[1:], os.environ['A'], os.environ['KUBERNETES_EXEC_INFO']], open({str(told)!r}, 'w'))"
    user = program(tmp_path, f"{body}\n{printing(token='t1')}")
    user |= {"args": ["get-token", "--x"], "env": [{"name": "A", "value": "b"}], "provideClusterInfo": True}
    assert await status(await find(guarded.environ(tmp_path, exec=user))) == 200
    args, variable, info = json.loads(told.read_text())
    assert (args, variable) == (["get-token", "--x"], "b")
    spec = {"interactive": False, "cluster": {"server": guarded.url}}
    assert json.loads(info) == {"apiVersion": V1, "kind": "ExecCredential", "spec": spec}


async def test_a_plugin_may_print_a_certificate(secure: ApiServer, tls: Certificates, tmp_path: Path) -> None:
    pair = {
        "clientCertificateData": tls.path("client.crt").read_text(),
        "clientKeyData": tls.path("client.key").read_text(),
    }
    access = await find(secure.environ(tmp_path, exec=program(tmp_path, printing(**pair))))
    assert await user_of(secure, access) == "cert-user"


async def test_credentials_are_fetched_anew_before_they_expire(tmp_path: Path) -> None:
    now = time.time()
    wall = [now]
    text = datetime.fromtimestamp(now + 900, UTC).isoformat()
    command = program(tmp_path, printing(token="t", expirationTimestamp=text))
    spec = Plugin(V1, str(tmp_path / "plugin"), where="conf: exec", hint=command["installHint"])
    runner = plugin_module.PluginRunner(spec, dict(os.environ), lambda: wall[0])
    for wall[0], expected in ((now, 1), (now + 839, 1), (now + 841, 2)):
        assert (await runner.identity()).authorization == "Bearer t"
        assert runs(tmp_path) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no session')", r"exec: '.*/plugin' ended with status 1; it said: no session"),
        ("print('hello')", r"printed no credentials: not JSON"),
        ("print('[]')", r"printed no credentials: expected an object of kind ExecCredential"),
        (printing(), r"printed no credentials: its status has neither"),
        (printing(token=5), r"printed no credentials: token, .* must be text"),
        (printing(token="a b"), r"'.*plugin' holds no token"),
        (printing(clientKeyData="k"), r"clientCertificateData and clientKeyData come together"),
        (printing(token="t", expirationTimestamp="soon"), r"expirationTimestamp is 'soon'; expected RFC 3339"),
        ("print('x' * 2_000_000)", r"printed more than 1048576 bytes"),
        ("sys.stderr.write('x' * 2_000_000); sys.exit(3)", r"ended with status 3; it said: xxx.*…"),
    ],
)
async def test_what_is_wrong_with_a_plugin_is_said(tmp_path: Path, body: str, message: str) -> None:
    path = write(tmp_path / "config", config({"exec": program(tmp_path, body)}))
    access = await find({**os.environ, "KUBECONFIG": str(path)})
    with pytest.raises(ConfigurationError, match=rf"^{path}: users: 'u': exec(.|\n)*{message}|{message}"):
        await access.headers()


async def test_a_plugin_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    plugin = {"apiVersion": V1, "command": "no-such-plugin", "installHint": "get it from example.com"}
    access = await find({"KUBECONFIG": str(write(tmp_path / "config", config({"exec": plugin})))})
    with pytest.raises(ConfigurationError, match=r"cannot run 'no-such-plugin': .*; get it from example.com"):
        await access.headers()


async def test_a_plugin_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_module, "TIMEOUT", 0.5)
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nimport time\ntime.sleep(60)"
    access = await find({"KUBECONFIG": str(write(tmp_path / "config", config({"exec": program(tmp_path, body)})))})
    with pytest.raises(ConfigurationError, match=r"did not end in 0.5 s"):
        await access.headers()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


async def test_a_plugin_whose_caller_is_cancelled_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nimport time\ntime.sleep(60)"
    access = await find({"KUBECONFIG": str(write(tmp_path / "config", config({"exec": program(tmp_path, body)})))})
    async with anyio.create_task_group() as group:
        group.start_soon(access.headers)
        with anyio.fail_after(10):
            while not (pid.exists() and pid.read_text()):  # noqa: ASYNC110 - another process tells nobody
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_plugin_prints_is_understood_or_refused(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"^conf: exec: 'x' printed no credentials: "):
        parse_credential(data, Plugin(V1, "x", where="conf: exec"))


@given(st.dictionaries(st.sampled_from(["token", "clientKeyData", "expirationTimestamp"]), JSON))
def test_whatever_its_status_is_it_is_understood_or_refused(found: dict[str, Any]) -> None:
    data = json.dumps({"apiVersion": V1, "kind": "ExecCredential", "status": found}).encode()
    with contextlib.suppress(ConfigurationError):
        parse_credential(data, Plugin(V1, "x", where="conf: exec"))


# --- the real one -----------------------------------------------------------------------------------------------------


async def test_real_tokens_certificates_and_service_accounts(real_api_server: RealApiServer, tmp_path: Path) -> None:
    api, at = real_api_server, real_api_server.certificates.path
    forbidden = 'User "{}" cannot get resource "services"'
    access = await find(api.environ(tmp_path))
    async with await access.client() as http:
        assert (await http.get("/version")).json()["major"]
        assert (await http.get(SERVICE)).status_code == 404
    pair = {"client-certificate": str(at("client.crt")), "client-key": str(at("client.key"))}
    exec_ = {"exec": program(tmp_path, printing(token="reader-token"))}
    for user, name in (({"token": "reader-token"}, "reader"), (pair, "cert-user"), (exec_, "reader")):
        async with await (await find(api.environ(tmp_path, **user))).client() as http:
            assert forbidden.format(name) in (await http.get(SERVICE)).json()["message"]
    assert await status(await find(api.environ(tmp_path, token="wrong"))) == 401
    folder = tmp_path / "sa"
    write(folder / "token", api.service_account_token("shop", "web"))
    write(folder / "namespace", "shop")
    write(folder / "ca.crt", at("ca.crt").read_text())
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
    async with await (await find(environ, account=folder)).client() as http:
        answer = (await http.get(SERVICE)).json()
        assert forbidden.format("system:serviceaccount:shop:web") in answer["message"]


def shown_role() -> list[dict[str, Any]]:
    """The rules of the Role that the documentation shows."""
    page = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text("utf-8")
    blocks = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    (role,) = (block for block in blocks if block.get("kind") == "Role")
    rules: list[dict[str, Any]] = role["rules"]
    return rules


async def test_the_role_of_the_documentation_is_enough(real_api_server: RealApiServer, tmp_path: Path) -> None:
    api = real_api_server
    api.role("roles", shown_role(), {"kind": "User", "name": "reader", "apiGroup": "rbac.authorization.k8s.io"})
    core, slices = "/api/v1/namespaces/roles", "/apis/discovery.k8s.io/v1/namespaces/roles/endpointslices"
    one = {"fieldSelector": "metadata.name=routes"}
    watch = {"watch": "true", "timeoutSeconds": "1"}
    async with await (await find(api.environ(tmp_path, token="reader-token"))).client() as http:
        with anyio.fail_after(5):  # the authorizer hears of a new Role a moment later
            while (await http.get(slices)).status_code != 200:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        allowed = [(f"{core}/services/x", {}, 404), (f"{core}/configmaps", one, 200)]
        refused = [(f"{core}/configmaps", {}, 403), (f"{core}/services", {}, 403), (f"{core}/secrets", {}, 403)]
        for path, query, expected in [*allowed, *refused]:
            assert (await http.get(path, params=query)).status_code == expected, path
        for path, query in ((slices, watch), (f"{core}/configmaps", watch | one)):
            async with http.stream("GET", path, params=query) as answer:
                assert answer.status_code == 200
