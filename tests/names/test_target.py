"""What users write to say where a client goes, and the addresses in it."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshlib.core.errors import ConfigurationError
from meshlib.names.addr import Address, Bound, Failed, Neg, Pending, parse_hostport
from meshlib.names.static import StaticResolver, UnixResolver, parse
from meshlib.names.target import Target

PORTS = st.integers(0, 65535)
HOSTS = st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "scheme", "rest"),
    [
        ("host:1", "static", "host:1"),
        ("a:1,b:2", "static", "a:1,b:2"),
        ("  host:1  ", "static", "host:1"),
        ("[::1]:9000", "static", "[::1]:9000"),
        ("mux://host:1", "static", "host:1"),
        ("unix:///run/x.sock", "unix", "/run/x.sock"),
        ("file:///etc/x", "file", "/etc/x"),
        ("zk://z:2181/services/x", "zk", "z:2181/services/x"),
        ("my.own+scheme-2://x", "my.own+scheme-2", "x"),
    ],
)
def test_a_target_is_split_at_its_scheme(text, scheme, rest):
    target = Target.parse(text)
    assert (target.scheme, target.rest, target.text, str(target)) == (scheme, rest, text, text)


@pytest.mark.parametrize("wrong", ["", "   ", None, 5, b"host:1"])
def test_what_is_no_target_is_told(wrong):
    with pytest.raises(ConfigurationError, match="expected something like 'host:port' or 'file:///path'"):
        Target.parse(wrong)


# --- addresses --------------------------------------------------------------------------------------------------------


@given(HOSTS, PORTS)
def test_host_and_port_are_read_as_they_are_printed(host, port):
    assert parse_hostport(f"{host}:{port}") == (host, port)
    address = Address.parse(f"{host}:{port}")
    assert address == Address(host, port)
    assert str(address) == f"{host}:{port}"


@given(st.ip_addresses(v=6), PORTS)
def test_ipv6_addresses_stand_in_brackets(ip, port):
    address = Address.parse(f"[{ip}]:{port}")
    assert (address.host, address.port) == (str(ip), port)
    assert str(address) == f"[{ip}]:{port}"
    assert Address.parse(str(address)) == address
    with pytest.raises(ConfigurationError, match="write an IPv6 address in brackets"):
        Address.parse(f"{ip}:{port}")


@pytest.mark.parametrize(
    "wrong",
    [
        "host",
        "host:",
        "host:x",
        "host:-1",
        "host:65536",
        "host:1.5",
        "host:²",
        "host:" + "9" * 5000,
        "",
        ":",
        "[::1]",
        "h:1:2",
    ],
)
def test_what_is_no_address_is_told(wrong):
    with pytest.raises(ConfigurationError, match=r"expected host:port, with a port from 0 to 65535|in brackets"):
        Address.parse(wrong)


@given(st.text())
@example("[]:1")
def test_an_address_is_read_or_refused_and_nothing_else_happens(text):
    try:
        address = Address.parse(text)
    except ConfigurationError:
        return
    assert address.path.startswith("/") or 0 <= address.port < 65536


def test_without_a_host_it_is_this_machine():
    assert str(Address.parse(":9000")) == "127.0.0.1:9000"


def test_a_unix_socket_has_a_path_and_no_port():
    address = Address.parse("unix:///run/x.sock")
    assert (address.path, address.host, address.port, str(address)) == ("/run/x.sock", "", 0, "unix:///run/x.sock")


@pytest.mark.parametrize("wrong", ["unix://", "unix://x.sock"])
def test_a_unix_socket_without_an_absolute_path_is_told(wrong):
    with pytest.raises(ConfigurationError, match="expected unix:///absolute/path"):
        Address.parse(wrong)
    with pytest.raises(ConfigurationError, match="expected unix:///absolute/path"):
        parse(Target.parse(wrong))


def test_an_address_is_where_it_is_whatever_its_weight_and_metadata():
    one, other = Address("h", 1), Address("h", 1, weight=5.0, metadata=(("zone", "a"),))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Address("h", 2)


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_a_number_above_0(weight):
    with pytest.raises(ConfigurationError, match=r"its weight is .*, and must be a number above 0"):
        Address.parse("h:1", weight)


def test_bound_addresses_come_once_each_in_their_order():
    bound = Bound.of([Address("b", 1), Address("a", 1), Address("b", 1, weight=2.0)])
    assert str(bound) == "b:1, a:1"


def test_states_print_in_words():
    assert [str(x) for x in (Bound(()), Neg(), Failed("no route"), Pending())] == [
        "no endpoints", "no such name", "failed: no route", "not resolved yet",
    ]  # fmt: skip


# --- names that are their own addresses -------------------------------------------------------------------------------


async def states_of(resolver, text):
    return [state async for state in resolver.watch(Target.parse(text))]


async def test_a_static_name_is_its_addresses_once():
    assert await states_of(StaticResolver(), "a:1, b:2,a:1") == [Bound((Address("a", 1), Address("b", 2)))]
    assert await states_of(UnixResolver(), "unix:///x") == [Bound((Address(path="/x"),))]


@pytest.mark.parametrize("wrong", ["a:1,", ",a:1", "a:1,,b:2", "mux://"])
def test_a_missing_address_beside_a_comma_is_told(wrong):
    with pytest.raises(ConfigurationError, match="an address is missing beside a comma"):
        parse(Target.parse(wrong))
