"""Scenarios in TOML: what they stand for, and what is said of those that make no sense."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib.client import PLACES as CLIENT_PLACES
from meshlib.client import default_layers
from meshlib.core.stack import Stack
from meshlib.testing import Calls, Load, Scenario, Servers, constant, errors, lognormal, pareto, slow
from meshlib.testing.settings import load_scenario, scenario_of

LEAST = "[servers]\n[load]\nrate = 1\n"


def read(text: str, folder: Path = Path()) -> Scenario:
    return scenario_of(tomllib.loads(text), folder)


def test_the_least_scenario_has_the_defaults() -> None:
    it = read(LEAST)
    assert it == Scenario(servers=[Servers()], load=[Load(1)], clients=list(it.client_kinds), faults=[])
    assert it.client_kinds[0].layers == ()
    assert it.duration == 60


def test_everything_that_can_be_said() -> None:
    it = read("""
        title = "All"
        duration = 30
        seed = 7
        wire = "mux"
        network = { lognormal = 0.001, sigma = 0.1 }
        settle = 5
        within = 0.5
        windows = [[0, 10], [10, 30.0]]

        [[servers]]
        name = "web"
        count = 3
        latency = { pareto = { least = 0.01, shape = 2.5 } }
        workers = 4
        abandoned = "served"
        weight = 2
        metadata = { zone = "a" }
        concurrency_limit = 10
        calls = { to = "db", fan_out = 2, idempotent = false, timeout.total = 0.2, retry = false }

        [[servers]]
        name = "db"
        latency = 0.002

        [clients]
        count = 5
        to = "web"

        [[load]]
        rate = 100
        to = 200
        start = 5
        until = 20
        spacing = "even"
        priority = "critical"
        idempotent = false
        timeout = 0.3
        fan_out = 2
        name = "people"

        [[faults]]
        fault = "slow"
        factor = 3
        to = 1
        servers = [0, "db/0"]
        at = 1
        until = 2

        [[faults]]
        fault = "errors"
        rate = 0.5
        kind = "refused"
        period = 10
        share = 0.1
    """)
    assert (it.title, it.duration, it.seed, it.wire, it.settle, it.within) == ("All", 30, 7, "mux", 5, 0.5)
    assert it.network == lognormal(0.001, 0.1)
    assert it.windows == ((0, 10), (10, 30.0))
    web, db = it.server_kinds
    assert (web.count, web.latency, web.workers, web.abandoned) == (3, pareto(0.01, 2.5), 4, "served")
    assert (web.weight, web.metadata, db.latency) == (2, {"zone": "a"}, 0.002)
    assert [repr(layer) for layer in web.layers] == [repr(meshlib.concurrency_limit(10))]  # type: ignore[union-attr]
    assert isinstance(web.calls, Calls)
    assert (web.calls.to, web.calls.fan_out, web.calls.idempotent) == ("db", 2, False)
    assert [repr(layer) for layer in web.calls.layers] == ["timeout(total=0.2 s)"]  # type: ignore[union-attr]
    assert it.client_kinds[0].count == 5
    assert it.loads == (
        Load(
            100,
            to=200,
            start=5,
            until=20,
            spacing="even",
            priority="critical",
            idempotent=False,
            timeout=0.3,
            fan_out=2,
            name="people",
        ),
    )
    assert it.faults == [
        slow(3, (0, "db/0"), to=1, at=1, until=2),
        errors(0.5, kind="refused", period=10, share=0.1),
    ]


def layers_of(text: str) -> Stack:
    [clients] = read(LEAST + "[clients]\n" + text).client_kinds
    stack = Stack(CLIENT_PLACES, default_layers()).with_layers(*clients.layers)  # type: ignore[misc]
    return clients.stack(stack) if clients.stack else stack


@pytest.mark.parametrize(
    ("text", "place", "layer"),
    [
        ("timeout.total = 1.5", "timeout", meshlib.timeout(1.5)),
        ("timeout = 1.5", "timeout", meshlib.timeout(1.5)),
        ("timeout = { attempt = 0.2 }", "attempt_timeout", meshlib.timeout(attempt=0.2)),
        ("retry.attempts = 3", "retry", meshlib.retry(attempts=3)),
        ("retry = true", "retry", meshlib.retry()),
        ('balance = "round_robin"', "balance", meshlib.balance(meshlib.round_robin())),
        ('balance = { p2c = "least_loaded" }', "balance", meshlib.balance(meshlib.p2c(meshlib.least_loaded()))),
        (
            "balance = { peak_ewma = { decay = 5 } }",
            "balance",
            meshlib.balance(meshlib.peak_ewma(decay=5)),
        ),
        ("hedge.extra_load = 0.02", "hedge", meshlib.hedge(extra_load=0.02)),
    ],
)
def test_layers_are_called_by_the_names_of_their_functions(text: str, place: str, layer: Any) -> None:
    assert repr(layers_of(text).find(place)) == repr(layer)


def test_false_leaves_a_place_empty_by_the_name_of_the_layer_or_of_the_place() -> None:
    stack = layers_of("retry = false\nrequeue = false\nfailure_accrual = false")
    assert [place for place in ("retry", "requeue", "accrual") if stack.find(place) is not None] == []
    assert stack.find("balance") is not None


def test_an_adaptive_limit_is_said_in_a_word() -> None:
    [servers] = read('[servers]\nconcurrency_limit = "adaptive"\n[load]\nrate = 1\n').server_kinds
    assert [repr(layer) for layer in servers.layers] == [  # type: ignore[union-attr]
        repr(meshlib.concurrency_limit(meshlib.adaptive()))
    ]


def test_files_are_looked_for_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "times.txt").write_text("10\n20\n")
    path = tmp_path / "it.toml"
    path.write_text('[servers]\nlatency = { replayed = "times.txt", unit = 0.001 }\n[load]\nrate = 1\n')
    [servers] = load_scenario(path).server_kinds
    assert servers.latency.mean == pytest.approx(0.015)  # type: ignore[union-attr]
    path.write_text("[servers]\nlatency = { constant = 0.3 }\n[load]\nrate = 1\n")
    assert load_scenario(path).server_kinds[0].latency == constant(0.3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"^servers: a scenario needs a table \[servers\]"),
        ("[servers]", r"^load: a scenario needs a table \[load\]"),
        ("servers = 3\nload = 4", r"^servers: 3 is no table; write \[servers\], or \[\[servers\]\] for several"),
        (LEAST + "[server]", r"^server: there is no such setting; did you mean 'servers'\? there are .*duration"),
        ("title = 5\nsettle = 'x'\n" + LEAST, r"^scenario: settle='x': give a number"),
        ("windows = 3\n" + LEAST, r"^scenario: something is not of the kind"),
        ("durration = 3\n" + LEAST, r"^durration: .*did you mean 'duration'\?"),
        ("duration = 'long'\n" + LEAST, r"duration='long': give a number, above 0"),
        ("[servers]\ncuont = 3\n[load]\nrate = 1", r"^servers\.cuont: .*did you mean 'count'\?"),
        ("[servers]\ncount = 0\n[load]\nrate = 1", r"^servers: count=0: give a whole number, 1 or more"),
        ("[servers]\nlatency = 'slow'\n[load]\nrate = 1", r"^servers: 'slow' is no latency"),
        (
            "[servers]\nlatency = { lognormal = 0 }\n[load]\nrate = 1",
            r"^servers\.latency\.lognormal: .*give the median",
        ),
        (
            "[servers]\nlatency = { lognormal = 0.1, sgma = 1 }\n[load]\nrate = 1",
            r"^servers\.latency\.lognormal\.sgma: there is no such parameter of lognormal\(\); did you mean 'sigma'\?",
        ),
        ("[servers]\n[load]\nspeed = 1", r"^load\.speed: there is no such setting; .*there are .*rate"),
        ("[servers]\n[load]", r"^load: rate is missing"),
        ("[servers]\n[[load]]\nrate = 1\n[[load]]\nrate = -1", r"^load\[1\]: rate=-1: give a number, above 0"),
        (LEAST + "[clients]\nretri = 3", r"^clients\.retri: there is no such setting or layer; did you mean 'retry'\?"),
        (
            LEAST + "[clients]\nretry.attemts = 3",
            r"^clients\.retry\.attemts: there is no such parameter of retry\(\); did you mean 'attempts'\?",
        ),
        (LEAST + "[clients]\nretry.attempts = -1", r"^clients\.retry: .*attempts"),
        (LEAST + "[clients]\ntimeout.total = 'long'", r"^clients\.timeout: .*give seconds"),
        (LEAST + "[clients]\nconcurrency_limit = 'many'", r"^clients\.concurrency_limit: "),
        (LEAST + "[clients]\npeak_ewma = true", r"^clients\.peak_ewma: .* is not a layer"),
        (LEAST + "[clients]\npool = 3", r"^clients\.pool: this is a place in the stack; it can only be left empty"),
        ("[servers]\nhedge = true\n[load]\nrate = 1\n[[faults]]\nfault = 'no'", r"^faults\[0\]\.fault: 'no' is none;"),
        (LEAST + "[[faults]]\nat = 3", r"^faults\[0\]\.fault: None is none; there are add, black_hole, crash"),
        (
            LEAST + "[[faults]]\nfault = 'slow'\nat = 3",
            r"^faults\[0\]: factor is missing; slow\(\) cannot do without it",
        ),
        (LEAST + "[[faults]]\nfault = 'crash'\nunitl = 3", r"^faults\[0\]\.unitl: .*did you mean 'until'\?"),
        (LEAST + "[[faults]]\nfault = 'crash'\nat = 3\nuntil = 1", r"^faults\[0\]: crash\(at=3, until=1\): give 0 <="),
        (LEAST + "[clients]\nto = 'db'", r"to='db': there are no such servers; there are servers"),
        ("[servers]\ncalls = 3\n[load]\nrate = 1", r"^servers\.calls: 3 is no table"),
        ("[servers.calls]\nto = 'x'\nretri = 1\n[load]\nrate = 1", r"^servers\.calls\.retri: .*'retry'\?"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_key(text: str, complaint: str) -> None:
    with pytest.raises(meshlib.ConfigurationError) as caught:
        read(text)
    caught.match(complaint)


def test_complaints_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    with pytest.raises(meshlib.ConfigurationError, match=r"it\.toml: .*No such file"):
        load_scenario(path)
    path.write_text("a = ")
    with pytest.raises(meshlib.ConfigurationError, match=r"it\.toml: Invalid value"):
        load_scenario(path)
    path.write_text("[servers]\n")
    with pytest.raises(meshlib.ConfigurationError, match=r"it\.toml: load: a scenario needs"):
        load_scenario(path)
