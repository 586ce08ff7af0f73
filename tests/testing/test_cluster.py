"""Whole simulations: repeatable, alike on both wires, and true to what is known of queues and balancers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.testing import (
    Calls,
    Clients,
    Cluster,
    Host,
    Load,
    Report,
    Scenario,
    Servers,
    add,
    black_hole,
    constant,
    crash,
    errors,
    exponential,
    hang,
    lognormal,
    remove,
    restart,
    run_virtual,
    slow,
)

PLAIN = (meshlib.timeout(1.0),)
WIRES: Any = pytest.mark.parametrize("wire", ["direct", "mux"])


def three(*faults: Any, **changes: Any) -> Scenario:
    """Three servers at 100 requests a second for 10 s."""
    given: dict[str, Any] = {
        "servers": Servers(3, lognormal(0.02)),
        "clients": Clients(2, PLAIN),
        "load": Load(100),
        "faults": faults,
        "duration": 10.0,
        **changes,
    }
    return Scenario(**given)


def fingerprint(report: Report) -> tuple[Any, ...]:
    record = report.record
    return (
        record.at.tobytes(),
        record.took.tobytes(),
        record.outcome.tobytes(),
        record.sent.at.tobytes(),
        record.sent.host.tobytes(),
        tuple(record.kinds),
    )


ROUGH = (crash(0, at=2, until=3), hang(1, at=4, until=6), errors(0.3, 2, at=5, until=8), remove(1, at=8))


@WIRES
def test_the_same_seed_gives_the_same_report_bit_for_bit(wire: Any) -> None:
    first, again = (three(*ROUGH, wire=wire).run() for _ in range(2))
    assert fingerprint(first) == fingerprint(again)
    assert str(first) == str(again)
    assert first.svg() == again.svg()
    assert fingerprint(three(*ROUGH, wire=wire, seed=2).run()) != fingerprint(first)


def test_the_hash_of_strings_changes_nothing() -> None:
    program = (
        "import hashlib; from meshlib.testing import *; "
        "it = Scenario(servers=Servers(5, lognormal(0.02)), load=Load(200), wire='mux', duration=3, "
        "clients=Clients(2), faults=[crash([0, 1], at=1, until=2)]).run().record; "
        "print(hashlib.sha256(it.took.tobytes() + it.sent.host.tobytes()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_both_wires_tell_the_same_story() -> None:
    direct, wired = (three(*ROUGH, wire=wire).run() for wire in ("direct", "mux"))
    assert direct.requests() == wired.requests() > 900
    assert direct.success() == pytest.approx(wired.success(), abs=0.01)
    for number in range(3):
        assert direct.share(number) == pytest.approx(wired.share(number), abs=0.05)
    assert direct.latency(0.5) == pytest.approx(wired.latency(0.5), rel=0.05)
    assert direct.connects() == pytest.approx(wired.connects(), abs=4)


# --- faults -----------------------------------------------------------------------------------------------------------


@WIRES
def test_a_slow_server_is_slow_for_its_time_and_by_its_factor(wire: Any) -> None:
    it = three(slow(5, at=2, until=4), servers=Servers(1, constant(0.02)), wire=wire).run()
    assert it.latency(0.5, 0, 2) == pytest.approx(0.02, abs=1e-3)
    assert it.latency(0.5, 2, 4) == pytest.approx(0.1, abs=1e-3)
    assert it.latency(0.5, 4.1) == pytest.approx(0.02, abs=1e-3)


def test_a_cold_start_warms_up_in_a_straight_line() -> None:
    it = three(slow(5, to=1, until=8), servers=Servers(1, constant(0.02))).run()
    for since, factor in ((0, 5.0), (2, 4.0), (4, 3.0), (9, 1.0)):
        assert it.latency(0.5, since, since + 0.1) == pytest.approx(0.02 * factor, abs=0.002)


def test_a_crash_loses_what_was_under_way_and_refuses_the_rest() -> None:
    scenario = three(crash(at=2, until=4), clients=Clients(1, PLAIN), servers=Servers(1, 0.02), load=Load(100))
    it = scenario.run()
    assert it.success(0, 1.9) == 1
    assert it.success(2, 2.9) == 0
    assert it.connects(refused=True) >= 1
    assert it.handled(since=2, until=4) == 0
    assert it.success(since=9) == 1


def test_a_restart_drains_and_is_not_noticed_where_others_are() -> None:
    it = three(restart(0, at=3, down=2)).run()
    assert it.success() == 1
    assert it.handled(0, 3.1, 5) == 0
    assert it.handled(0, 6, 10) > 50
    assert it.connects(0) == 4


def test_a_hanging_server_holds_requests_until_it_goes_on() -> None:
    it = three(hang(at=2, until=5), servers=Servers(1, 0.02), clients=Clients(1, (meshlib.timeout(30),))).run()
    assert it.success() == 1
    assert it.latency(0.99, 2.0, 2.1) == pytest.approx(3.0, abs=0.1)
    assert it.connects() == 1, "its connection lived"


def test_a_black_hole_costs_the_connection_and_answers_nothing() -> None:
    it = three(black_hole(0, at=1, until=30), duration=20.0).run()
    assert it.handled(0, 1.1) == 0
    assert it.success(15) == 1


@pytest.mark.parametrize(
    ("kind", "told"), [("failed", "RemoteError"), ("refused", "Rejected"), (lambda: ValueError("x"), "RemoteError")]
)
def test_errors_are_of_their_kind_and_share(kind: Any, told: str) -> None:
    bare = Clients(1, PLAIN, stack=lambda s: s.remove("requeue").remove("retry").remove("admission"))
    it = three(errors(0.25, after=0.002, kind=kind), clients=bare, load=Load(300), servers=Servers(1, 0.02)).run()
    assert set(it.errors()) == {told}
    assert it.success() == pytest.approx(0.75, abs=0.03)
    assert it.latency(0.1) == pytest.approx(0.002, abs=1e-4)


def test_a_server_leaves_the_name_and_joins_it() -> None:
    it = three(remove(0, at=2, until=4), add(1, at=6)).run()
    assert it.sent(0, 2.01, 4) == 0
    assert it.sent(0, 4.5) > 50
    assert it.sent(1, 0, 6) == 0
    assert it.sent(1, 6.5) > 50
    assert it.success() == 1


def test_a_flapping_fault_comes_and_goes() -> None:
    it = three(errors(period=2, share=0.25, at=1, until=6), servers=Servers(1, 0.001), clients=Clients(1, PLAIN))
    told = it.run().slices(0.5)
    bad = {each.since for each in told if each.success < 0.5}
    assert {1.0, 3.0, 5.0} <= bad
    assert bad <= {1.0, 1.5, 3.0, 3.5, 5.0, 5.5}, "a breaker may be open a little longer"


def test_faults_of_one_server_may_overlap() -> None:
    scenario = three(
        crash(0, at=1, until=4), restart(0, at=2, down=4), remove(0, at=1, until=3), remove(0, at=2, until=7)
    )
    it = scenario.run()
    assert it.handled(0, 1.01, 7) == 0
    assert it.handled(0, 7.5) > 0
    assert it.success() > 0.99


# --- servers ----------------------------------------------------------------------------------------------------------


def test_a_server_with_one_worker_is_an_mm1_queue() -> None:
    it = three(
        servers=Servers(1, exponential(0.01), workers=1), clients=Clients(1), load=Load(50), duration=100.0
    ).run()
    # The sojourn time of an M/M/1 queue is exponential with mean 1 / (service rate - arrival rate).
    assert it.latency(0.5) == pytest.approx(0.6931 / 50, rel=0.1)
    assert it.latency(0.99) == pytest.approx(4.605 / 50, rel=0.2)


def test_three_tiers_multiply_by_their_fan_out_and_failures_come_up_opaque() -> None:
    scenario = Scenario(
        servers=[
            Servers(1, 0.01, name="web", calls=Calls(to="users", fan_out=2)),
            Servers(2, 0.01, name="users", calls=Calls(to="db", idempotent=False)),
            Servers(2, 0.01, name="db"),
        ],
        clients=Clients(to="web"),
        load=Load(20, spacing="even"),
        faults=[errors(1, ["db/0", "db/1"], at=5, until=6)],
        duration=10.0,
    )
    it = scenario.run()
    assert it.amplification(until=5) == 1
    assert it.amplification("users", until=5) == it.amplification("db", until=5) == 2
    assert it.latency(0.5, until=4.9) == pytest.approx(0.03, abs=0.001)
    assert it.success(until=4.9) == 1
    assert set(it.errors()) <= {"RemoteError", "Rejected"}
    assert it.success(5.0, 5.9) < 0.2


def test_a_server_may_be_told_what_to_do() -> None:
    def handler(host: Host) -> Any:
        async def answer(request: mux.Request) -> mux.Response:
            await anyio.sleep(host.seconds() * 3)
            await host.work()
            return mux.Response(host.name.encode())

        return answer

    it = three(servers=Servers(2, 0.01, handler=handler)).run()
    assert it.latency(0.5) == pytest.approx(0.04, abs=0.001)


def test_kinds_of_servers_share_a_name_with_their_weights() -> None:
    kinds = [Servers(2, 0.01), Servers(1, 0.01, weight=4, metadata={"zone": "b"})]
    it = three(servers=kinds, load=Load(300)).run()
    assert it.servers == ("servers/0", "servers/1", "servers/2")
    assert it.share(2) > 1.5 * it.share(0)


def test_layers_of_servers_are_theirs() -> None:
    """One request at a time, at four times the rate that it can: three of four are refused."""
    bare = Clients(1, PLAIN, stack=lambda s: s.remove("requeue").remove("retry").remove("admission").remove("accrual"))
    it = three(
        servers=Servers(1, 0.035, layers=(meshlib.concurrency_limit(1),)), clients=bare, load=Load(100, spacing="even")
    ).run()
    assert it.success() == pytest.approx(0.25, abs=0.01)
    assert it.handled() == pytest.approx(it.sent() / 4, abs=5)


# --- load -------------------------------------------------------------------------------------------------------------


def test_loads_have_priorities_deadlines_and_times_of_their_own() -> None:
    seen: set[tuple[str, float | None]] = set()

    def handler(host: Host) -> Any:
        async def look(request: mux.Request) -> mux.Response:
            here = meshlib.current()
            seen.add((here.priority.name, None if here.deadline is None else round(meshlib.remaining() or 0, 2)))
            return mux.Response()

        return look

    it = three(
        servers=Servers(1, handler=handler),
        clients=Clients(1, (meshlib.timeout(None),)),
        load=[
            Load(10, priority="critical", timeout=0.5, spacing="even"),
            Load(20, priority="sheddable", start=5, until=7, spacing="even"),
        ],
    ).run()
    assert seen == {("CRITICAL", 0.5), ("SHEDDABLE", None)}
    assert (it.requests(), it.requests(load=0), it.requests(load=1)) == (140, 100, 40)
    assert it.requests(0, 5) == 50


def test_a_fan_out_is_as_slow_as_its_slowest_call_and_fails_with_any() -> None:
    it = three(load=Load(20, fan_out=10, spacing="even"), servers=Servers(3, lognormal(0.02))).run()
    assert it.amplification() == pytest.approx(1.0, abs=0.01)
    assert it.sent() == pytest.approx(2000, abs=20)
    assert it.latency(0.5) > 0.035, "the median of the slowest of ten is above the single call's p90"
    bare = Clients(1, PLAIN, stack=lambda s: s.remove("retry").remove("accrual"))
    bad = three(errors(0.1), clients=bare, load=Load(20, fan_out=10), servers=Servers(1, 0.01)).run()
    assert bad.success() == pytest.approx(0.9**10, abs=0.1)


def test_what_does_not_end_is_told_as_unfinished() -> None:
    it = three(hang(), clients=Clients(1, (meshlib.timeout(None),)), duration=1.0, settle=2.0, load=Load(10)).run()
    assert it.errors() == {"Unfinished": it.requests()}
    assert it.requests() > 0


def test_clients_of_two_kinds_have_their_own_layers() -> None:
    made: list[int] = []

    def layers(index: int) -> Any:
        made.append(index)
        return PLAIN

    it = three(
        clients=[Clients(3, layers, name="web"), Clients(1, (meshlib.timeout(0.001),), name="batch")],
        load=[Load(50, clients="web"), Load(50, clients="batch")],
    ).run()
    assert made == [0, 1, 2]
    assert it.success(load=0) == 1
    assert it.success(load=1) == 0
    assert it.connects() <= 3 * 4


# --- by hand ----------------------------------------------------------------------------------------------------------


@WIRES
def test_a_cluster_can_be_driven_by_hand_and_leaves_nothing_behind(wire: Any) -> None:
    async def main() -> None:
        async with Cluster(three(wire=wire)) as cluster:
            [client, _] = cluster.clients["clients"]
            request = mux.Request(idempotent=True)
            await client(request)
            for host in cluster.which(["servers/0", 1]):
                host.crash()
            await anyio.sleep(0.1)
            await client(request)
            last = cluster.hosts["servers/2"]
            assert cluster.report().handled(last.number) >= 1
            last.slowed.append(lambda now: 1000.0)
            with pytest.raises(meshlib.DeadlineExceeded):
                await client(request)
            last.slowed.clear()
            assert [host.up for host in cluster.hosts.values()] == [False, False, True]
            cluster.hosts["servers/0"].start()
            await anyio.sleep(20)
            await client(request)
        assert cluster.supervisor.jobs == 0
        assert client.env.supervisor.jobs == 0
        assert cluster.network.connections() == 0

    run_virtual(main, seed=1)


def test_something_may_happen_beside_the_load() -> None:
    async def during(cluster: Cluster) -> None:
        await anyio.sleep(3)
        cluster.hosts["servers/0"].remove()
        await anyio.sleep_forever()

    it = three(during=during).run()
    assert it.sent(0, 3.01) == 0
    assert it.sent(0, 0, 3) > 0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: three(slow(2, 9)).run(), r"servers=9: there is no servers/9; there are servers/0, servers/1"),
        (lambda: three(clients=Clients(to="db")), r"to='db': there are no such servers; there are servers"),
        (lambda: three(load=Load(1, clients="web")), r"clients='web': there are no such clients; there are clients"),
        (lambda: three(servers=[]), r"servers=\[\]: give Servers"),
        (lambda: three(load=[3]), r"load=\[3\]: give Load"),
        (lambda: three(wire="smoke"), "wire='smoke': there are 'mux' and 'direct'"),
        (lambda: three(within=0), "within=0: give seconds, above 0"),
        (lambda: three(windows=[(2, 1)]), "windows: .* since < until"),
        (lambda: Servers(0), "count=0: give a whole number, 1 or more"),
        (lambda: Servers(1, workers=0), "workers=0"),
        (lambda: Servers(1, abandoned="x"), "abandoned='x': there are 'dropped'"),  # type: ignore[arg-type]
        (lambda: Load(0), "rate=0: give a number, above 0"),
        (lambda: Load(1, start=5, until=4), "until=4: give a number, above 5"),
        (lambda: Load(1, priority="urgent"), "priority='urgent': there are 'sheddable', 'default', 'critical'"),
        (lambda: Load(1, spacing="odd"), "spacing='odd'"),  # type: ignore[arg-type]
        (lambda: slow(0), r"slow\(0, to=None\): give factors above 0"),
        (lambda: slow(2, to=1), "say until="),
        (lambda: slow(2, at=3, until=2), "give 0 <= at < until"),
        (lambda: slow(2, period=0), "give seconds, and a share below 1"),
        (lambda: errors(2), "give a share up to 1"),
        (lambda: errors(kind="odd"), "there are 'failed' and 'refused'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_scenarios_are_told(make: Any, complaint: str) -> None:
    with pytest.raises(meshlib.ConfigurationError, match=complaint):
        make()
