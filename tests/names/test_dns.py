"""``dns://`` and ``srv://`` against a real server (dnsmasq), and a scripted one for what that never says."""

import logging
import random
import re

import anyio
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import hypothesis.strategies as st
import pytest
from hypothesis import given

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.supervisor import Supervisor
from meshlib.names.addr import Bound, Neg
from meshlib.names.dns import DnsResolver, SrvResolver
from meshlib.names.dns.exchange import LookupFailed, over_network
from meshlib.names.dns.hosts import parse_hosts, parse_resolv_conf
from meshlib.names.dns.place import Place, Server, encode
from meshlib.names.dns.policy import Service, candidates, endpoints, priorities, until
from meshlib.names.target import Target
from meshlib.names.watch import Watch
from meshlib.testing import run_virtual
from tests.dns_server import Dnsmasq, dnsmasq

SRV = (
    "--srv-host=_grpc._tcp.users.test,a.test,9000,0,30",
    "--srv-host=_grpc._tcp.users.test,b.test,9001,0,10",
    "--srv-host=_grpc._tcp.users.test,c.test,9002,5,1",
    "--srv-host=_grpc._tcp.none.test",
    "--txt-record=text.test,hello",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with dnsmasq(tmp_path_factory.mktemp("dns"), *SRV) as server:
        yield server


@pytest.fixture
def server(shared: Dnsmasq):
    shared.names(a=["127.0.0.1", "127.0.0.2"], b=["127.0.0.3"], c=["127.0.0.4"])
    return shared


async def first(resolver, target):
    states = resolver.watch(Target.parse(target))
    try:
        with anyio.fail_after(10):
            return await anext(states)
    finally:
        await states.aclose()


def shown(addr):
    return sorted(map(str, addr.addresses)) if isinstance(addr, Bound) else addr


# --- a real server ----------------------------------------------------------------------------------------------------


async def test_every_address_of_a_host_is_an_endpoint(server):
    addr = await first(DnsResolver(), f"dns://a.test:80?server={server.server}")
    assert shown(addr) == ["127.0.0.1:80", "127.0.0.2:80"]
    assert dict(addr.addresses[0].metadata) == {"name": "a.test"}
    addr = await first(DnsResolver(), f"dns://a.test:80,b.test:81,127.0.0.9:82?server={server.server}")
    assert shown(addr) == ["127.0.0.1:80", "127.0.0.2:80", "127.0.0.3:81", "127.0.0.9:82"]


async def test_both_families_are_asked_for(server):
    server.names(a=["127.0.0.1", "::1"])
    addr = await first(DnsResolver(), f"dns://a.test:80?server={server.server}")
    assert shown(addr) == ["127.0.0.1:80", "[::1]:80"]


async def test_no_such_name_is_that(server):
    addr = await first(DnsResolver(), f"dns://nobody.test:80?server={server.server}")
    assert addr == Neg()
    assert addr.why == "there is no nobody.test."
    addr = await first(DnsResolver(), f"dns://text.test:80?server={server.server}")
    assert isinstance(addr, Neg)
    assert "text.test. has no A records" in addr.why


async def test_changes_are_seen_once_the_time_to_live_is_over(server):
    resolver = DnsResolver(floor=0.1)
    states = resolver.watch(Target.parse(f"dns://a.test:80?server={server.server}"))
    with anyio.fail_after(20):
        assert shown(await anext(states)) == ["127.0.0.1:80", "127.0.0.2:80"]
        server.names(a=["127.0.0.2", "127.0.0.5"])
        began = anyio.current_time()
        assert shown(await anext(states)) == ["127.0.0.2:80", "127.0.0.5:80"]
        assert anyio.current_time() - began < 5
        server.names(b=["127.0.0.3"])
        assert isinstance(await anext(states), Neg)
    await states.aclose()


async def test_services_have_ports_weights_and_priorities(server):
    addr = await first(SrvResolver(), f"srv://_grpc._tcp.users.test?server={server.server}")
    assert {str(each): each.weight for each in addr.addresses} == {
        "127.0.0.1:9000": 15.0,
        "127.0.0.2:9000": 15.0,
        "127.0.0.3:9001": 10.0,
    }
    server.names(c=["127.0.0.4"])
    addr = await first(SrvResolver(), f"srv://_grpc._tcp.users.test?server={server.server}")
    assert shown(addr) == ["127.0.0.4:9002"]  # the reserve
    server.names()
    assert isinstance(await first(SrvResolver(), f"srv://_grpc._tcp.users.test?server={server.server}"), Neg)
    addr = await first(SrvResolver(), f"srv://_grpc._tcp.none.test?server={server.server}")
    assert addr.why == "_grpc._tcp.none.test says that there is no such service"
    addr = await first(SrvResolver(), f"srv://_grpc._tcp.nobody.test?server={server.server}")
    assert "there is no _grpc._tcp.nobody.test." in addr.why


async def test_an_answer_that_does_not_fit_a_datagram_comes_over_tcp(server):
    many = [f"127.0.{n // 250}.{n % 250 + 1}" for n in range(400)]
    server.names(many=many)
    addr = await first(DnsResolver(), f"dns://many.test:80?server={server.server}")
    assert len(addr.addresses) == 400


async def test_a_server_that_is_down_keeps_what_was_known_and_fails_no_call(tmp_path):
    async def serve(request):
        return meshlib.mux.Response(b"done")

    with dnsmasq(tmp_path) as server:
        async with meshlib.mux.serve(serve, "127.0.0.1:0") as one:
            port = one.address.rpartition(":")[2]
            server.names(a=["127.0.0.1"])
            async with meshlib.mux.client(f"dns://a.test:{port}?server={server.server}") as client:
                watch = client._binding._watch
                watch._resolver._floor = 0.1
                assert (await client(meshlib.mux.Request(b""))).body == b"done"
                server.stop()
                with anyio.fail_after(20):
                    while not watch.problem:
                        await client(meshlib.mux.Request(b""))
                        await anyio.sleep(0.05)
                assert "127.0.0.1:" in watch.problem
                for _ in range(20):
                    await client(meshlib.mux.Request(b""))
                server.start()
                with anyio.fail_after(40):
                    while watch.problem:
                        await client(meshlib.mux.Request(b""))
                        await anyio.sleep(0.05)


async def test_nobody_there_is_told(tmp_path):
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    with pytest.raises(LookupFailed, match=r"x.test. A: 127.0.0.1:1: Connection refused"):
        await first(DnsResolver(), "dns://x.test:80?server=127.0.0.1:1")


async def test_search_domains_and_local_names_are_the_systems(server, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.7 local other # comment\n127.0.0.8 local\nbad line\n")
    (tmp_path / "resolv.conf").write_text("search nowhere.test test\n")

    async def there(query, asked):
        return await over_network(query, Server("127.0.0.1", server.port))

    resolver = DnsResolver(hosts=tmp_path / "hosts", resolv_conf=tmp_path / "resolv.conf", exchange=there)
    assert shown(await first(resolver, "dns://b:80")) == ["127.0.0.3:80"]
    with pytest.raises(LookupFailed, match=r"b\. A: .*REFUSED"):  # it knows of the domain test alone
        await first(resolver, "dns://b.:80")
    assert shown(await first(resolver, "dns://local:80")) == ["127.0.0.7:80", "127.0.0.8:80"]
    assert shown(await first(resolver, "dns://LOCAL:80")) == ["127.0.0.7:80", "127.0.0.8:80"]
    (tmp_path / "hosts").write_text("127.0.0.9 local\n")
    assert shown(await first(resolver, "dns://local:80")) == ["127.0.0.9:80"]
    assert shown(await first(resolver, "dns://localhost:80,api.localhost:81,127.0.0.5:82,[::1]:83")) == [
        "127.0.0.1:80", "127.0.0.1:81", "127.0.0.5:82", "[::1]:83",
    ]  # fmt: skip


async def test_one_address_is_told_once(server, caplog):
    resolver = DnsResolver()
    for _ in range(2):
        await first(resolver, f"dns://b.test:80?server={server.server}")
        await first(resolver, f"dns://a.test:80?server={server.server}")
        await first(resolver, "dns://127.0.0.1:80,localhost:80")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert re.search(r"dns://b.test:80.* has one address, 127.0.0.3:80, so all calls go there", caplog.text)


# --- a scripted server ------------------------------------------------------------------------------------------------


def sent(reply):
    """The message as it arrives."""
    return dns.message.from_wire(reply.to_wire())


class Script:
    """Answers as it is told: a list of addresses, a response code, or an exception."""

    def __init__(self, *answers, ttl=5):
        self.answers, self.asked, self.ttl = list(answers), [], ttl

    async def __call__(self, query, server):
        question = query.question[0]
        if question.rdtype != dns.rdatatype.A:
            return dns.message.make_response(query)
        self.asked.append(anyio.current_time())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        reply = dns.message.make_response(query)
        if isinstance(answer, list):
            reply.answer.append(dns.rrset.from_text(question.name, self.ttl, "IN", "A", *answer))
        else:
            reply.set_rcode(answer)
        return sent(reply)


def play(script, seconds, **options):
    """What a watch of a name comes to in virtual time: the moments and states, and the watch."""

    async def main():
        log = []
        env = Env(clock=Clock(), supervisor=Supervisor("shop"), rng=random.Random(1))
        resolver = DnsResolver(exchange=script, rng=random.Random(1), **options)
        watch = Watch(Target.parse("dns://x.test.:80?server=192.0.2.1"), resolver, env)
        watch.addr.watch(lambda addr: log.append((anyio.current_time(), addr)))
        watch.start()
        await anyio.sleep(seconds)
        await env.supervisor.aclose()
        return log[1:], watch

    return run_virtual(main)


@pytest.mark.parametrize(("ttl", "least", "most"), [(0, 5, 5.5), (1, 5, 5.5), (20, 20, 22), (86_400, 60, 66)])
def test_the_time_to_live_is_honoured_between_floor_and_ceiling(ttl, least, most):
    script = Script(["10.0.0.1"], ttl=ttl)
    play(script, 1000)
    waits = [b - a for a, b in zip(script.asked, script.asked[1:], strict=False)]
    assert least <= min(waits)
    assert max(waits) <= most
    assert len(set(waits)) > 1


def test_no_such_name_is_believed_when_it_was_said_twice():
    log, _ = play(Script(["10.0.0.1"], dns.rcode.NXDOMAIN, ["10.0.0.1"]), 60)
    assert [shown(addr) for _, addr in log] == [["10.0.0.1:80"]]
    log, _ = play(Script(["10.0.0.1"], dns.rcode.NXDOMAIN), 60)
    assert [shown(addr) for _, addr in log] == [["10.0.0.1:80"], Neg()]
    assert 6 <= log[1][0] <= 7


@pytest.mark.parametrize(
    "failure", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, OSError("unreachable"), anyio.EndOfStream()]
)
def test_a_failure_empties_nothing_and_is_tried_again(failure):
    script = Script(["10.0.0.1"], *[failure] * 8, ["10.0.0.2"])
    log, watch = play(script, 300)
    assert [shown(addr) for _, addr in log] == [["10.0.0.1:80"], ["10.0.0.2:80"]]
    assert watch.problem == ""


def test_silence_is_a_failure_within_the_timeouts():
    class Silent(Script):
        async def __call__(self, query, server):
            if len(self.asked) >= 2:
                await anyio.sleep_forever()
            return await super().__call__(query, server)

    log, watch = play(Silent(["10.0.0.1"]), 60)
    assert [shown(addr) for _, addr in log] == [["10.0.0.1:80"]]
    assert "no answer in 2 s" in watch.problem


def test_of_several_hosts_one_that_nobody_can_say_keeps_its_addresses():
    async def main():
        broken = False

        async def exchange(query, server):
            name = query.question[0].name.to_text()
            if broken and name == "a.test.":
                raise OSError("unreachable")
            reply = dns.message.make_response(query)
            if query.question[0].rdtype == dns.rdatatype.A:
                address = "10.0.0.1" if name == "a.test." else "10.0.0.3" if broken else "10.0.0.2"
                reply.answer.append(dns.rrset.from_text(name, 5, "IN", "A", address))
            return sent(reply)

        resolver = DnsResolver(exchange=exchange)
        states = resolver.watch(Target.parse("dns://a.test.:80,b.test.:80?server=192.0.2.1"))
        assert shown(await anext(states)) == ["10.0.0.1:80", "10.0.0.2:80"]
        broken = True
        assert shown(await anext(states)) == ["10.0.0.1:80", "10.0.0.3:80"]
        await states.aclose()

    run_virtual(main)


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("dns://users", "expected host:port"),
        ("dns://users:0", "a port above 0"),
        ("dns://:80", "the name is missing"),
        ("dns://a:80,", "a host is missing"),
        ("dns://a b:80", "a space"),
        (f"dns://{'a' * 64}:80", "no DNS name"),
        ("dns://a:80?server=ns.test", "server"),
        ("dns://a:80?ttl=3", "unknown setting"),
        ("srv://users.test", "expected srv://_service"),
        ("srv://_grpc._tcp.users.test:80", "no port"),
    ],
)
def test_malformed_targets_are_told_when_the_client_is_made(target, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        meshlib.mux.client(target)


@given(st.text(max_size=40))
def test_whatever_a_target_says_is_read_or_refused(text):
    for scheme in ("dns", "srv"):
        try:
            Place.parse(Target(scheme, text, f"{scheme}://{text}"))
        except ConfigurationError as error:
            assert scheme in error.message  # noqa: PT017 - nothing else may be raised


@given(st.text(max_size=200))
def test_whatever_the_systems_files_say_is_read(text):
    assert isinstance(parse_hosts(text), dict)
    settings = parse_resolv_conf(text)
    assert 1 <= len(settings.servers) <= 3


@given(st.none() | st.floats(0, 1e9), st.integers(0, 2**32))
def test_a_wait_is_within_its_bounds(ttl, seed):
    assert 5 <= until(ttl, random.Random(seed)) <= 66


def test_names_are_tried_in_the_systems_order():
    settings = parse_resolv_conf("search a.test b.test\noptions ndots:2\n")
    assert [each.to_text() for each in candidates(encode("x"), settings)] == ["x.a.test.", "x.b.test.", "x."]
    assert candidates(encode("x.y.z"), settings)[0].to_text() == "x.y.z."
    assert [each.to_text() for each in candidates(encode("x."), settings)] == ["x."]
    assert encode("bücher.test").to_text() == "xn--bcher-kva.test"


SERVICES = st.lists(
    st.builds(Service, st.integers(0, 2), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["a.", "b.", "."])),
    max_size=8,
)


@given(SERVICES)
def test_of_services_the_most_wanted_come_first_and_every_weight_is_positive(services):
    groups = priorities(services)
    assert [group[0].priority for group in groups] == sorted({s.priority for s in services if s.host != "." and s.port})
    for group in groups:
        found = endpoints(group, {"a.": ["10.0.0.1", "10.0.0.2"], "b.": ["10.0.0.3"]})
        assert all(each.weight > 0 for each in found)
        assert len(set(found)) == len(found)
        total = sum(each.weight for each in found)
        assert total == pytest.approx(sum(s.weight for s in set(group)) + (not all(s.weight for s in group))) or (
            len({each.weight for each in found}) == 1
        )
