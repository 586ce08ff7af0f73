"""The arithmetic of a report, on a case small enough to be done by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from math import inf, isnan, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.priority import Priority
from meshlib.testing import Load, Report, Scenario, Servers, slow
from meshlib.testing.record import UNSENT, Record
from meshlib.testing.report import percentile
from meshlib.testing.table import windows_of

CRITICAL, SHEDDABLE = Priority.CRITICAL, Priority.SHEDDABLE


def scenario(**changes: Any) -> Scenario:
    given: dict[str, Any] = {
        "servers": Servers(2),
        "load": [Load(1, priority="critical", name="people"), Load(1, priority="sheddable", name="robots", fan_out=2)],
        "duration": 4.0,
        **changes,
    }
    return Scenario(**given)


def report(**changes: Any) -> Report:
    record = Record()
    # Not in the order in which they came, since they end in another. (at, took, error, load)
    for row in [
        (0.0, 0.1, "", 0),
        (1.5, 0.3, "", 1),
        (0.5, 1.0, "DeadlineExceeded", 0),
        (1.0, 2.0, "", 0),
        (2.0, 0.2, "Rejected", 1),
        (3.0, 0.2, "Rejected", 1),
        (3.5, 0.4, "", 0),
    ]:
        record.request(*row)
    for at, host in [(0.0, 0), (0.5, 1), (0.7, UNSENT), (1.0, 1), (1.5, 0), (1.6, 1), (2.0, 0), (3.0, 0), (3.5, 0)]:
        record.sent.add(at, host)
    for at, host in [(0.0, 0), (1.0, 1), (1.5, 0), (3.5, 0)]:
        record.handled.add(at, host)
    record.connects.add(0.0, 0)
    record.connects.add(0.5, 1)
    record.refused.add(0.2, 1)
    return Report(scenario(**changes), ["servers/0", "servers/1"], record)


def test_success() -> None:
    it = report()
    assert it.requests() == 7
    assert it.requests(1, 2) == 2
    assert it.requests(1, 2.0001) == 3
    assert it.success() == pytest.approx(4 / 7)
    assert it.success(within=1.0) == pytest.approx(3 / 7)
    assert report(within=1.0).success() == pytest.approx(3 / 7)
    assert it.success(0, 1) == pytest.approx(1 / 2)
    assert it.success(priority=CRITICAL) == pytest.approx(3 / 4)
    assert it.success(load="robots") == it.success(load=1) == it.success(priority=SHEDDABLE) == pytest.approx(1 / 3)
    assert isnan(it.success(10, 20))
    assert isnan(it.success(priority=Priority.DEFAULT))
    assert it.goodput(0, 2) == pytest.approx(3 / 2)
    assert it.goodput(0, 2, within=0.1) == pytest.approx(1 / 2)


def test_errors_and_latency() -> None:
    it = report()
    assert it.errors() == {"Rejected": 2, "DeadlineExceeded": 1}
    assert it.errors(0, 1) == {"DeadlineExceeded": 1}
    assert it.errors(priority=CRITICAL) == {"DeadlineExceeded": 1}
    assert it.latency(0.5) == 0.3, "of .1 .2 .2 .3 .4 1. 2. the fourth"
    assert it.latency(0.99) == 2.0
    assert it.latency(0.75, answered=True) == 0.4
    assert isnan(it.latency(0.5, 10, 20))


def test_servers() -> None:
    it = report()
    assert it.sent() == it.sent("servers") == it.sent([0, 1]) == 8, "what was never sent is not counted"
    assert it.sent(0) == it.sent("servers/0") == 5
    assert it.sent(1, 0.5, 1.6) == 2
    assert it.handled(0, since=1) == 2
    assert (it.connects(), it.connects(1), it.connects(refused=True)) == (2, 1, 1)
    assert it.share(0) == pytest.approx(5 / 8)
    assert isnan(it.share(0, 10, 20))
    assert it.amplification() == pytest.approx(8 / 10), "three of the requests are two calls each"
    assert it.amplification("servers", 0, 1) == pytest.approx(2 / 2)
    assert isnan(it.amplification(since=10))
    assert it.rates(0) == [1, 1, 1, 2]
    assert it.rates(0, 2.0, "handled") == [1.0, 0.5]
    with pytest.raises(KeyError, match="there is no server 'servers/7'; there are servers/0, servers/1"):
        it.sent("servers/7")


def test_recovery() -> None:
    it = report()
    assert it.recovery(0, success=0.6) == inf, "the last window still is bad"
    assert it.recovery(0, success=0.5) == 3.0, "back in the second from 3 on"
    assert it.recovery(0, success=0.4, window=0.5, until=2.5) == inf
    assert it.recovery(0, success=0.4, until=2.0) == 0
    assert it.recovery(0, success=0.99, until=2.0) == 1.0, "back from the second second on"
    assert it.recovery(0, success=0.99, within=1.0, until=2.0) == inf
    assert it.recovery(1, success=0.99, until=2.0) == 0
    assert it.recovery(50) == 0, "nothing came any more"


def test_slices() -> None:
    first, second, *_ = it = report().slices(1.0)
    assert [each.since for each in it] == [0, 1, 2, 3]
    assert (first.requests, first.success, first.p50, first.p99, first.sent) == (2, 0.5, 0.1, 1.0, (1, 1))
    assert (second.requests, second.success, second.sent) == (2, 1.0, (1, 2))
    assert isnan(report().slices(0.25)[1].success), "nothing came in that quarter"


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], q: float) -> None:
    got = percentile(sorted(values), q)
    assert sum(value <= got for value in values) >= q * len(values) * (1 - 1e-9)
    assert sum(value < got for value in values) < q * len(values)
    assert isnan(percentile([], q))


def test_windows_lie_between_the_faults_unless_they_are_given() -> None:
    faults = [slow(2, 0, at=1, until=2), slow(2, 1, at=2, until=9)]
    assert windows_of(report(faults=faults)) == [(0, 1), (1, 2), (2, 4)]
    assert windows_of(report(windows=[(0.5, 1.5)])) == [(0.5, 1.5)]
    assert windows_of(report()) == [(0, 4)]


def test_the_table_says_it_all() -> None:
    lines = str(report(title="By hand", faults=[slow(2, 0, at=1, until=2)], within=1.0)).splitlines()
    assert lines[0] == "By hand: 4 s, seed 1, direct wire"
    for line in (
        "requests                7",
        "answered          42.857% within 1 s",
        "amplification       0.800 attempts for each call",
        "connections             2 made, 1 refused",
        "errors         Rejected 2, DeadlineExceeded 1",
        "1 … 2 s         2   50.000%  300 ms  2.00 s  2.00 s          1.000",
        "critical          4   50.000%  400 ms  2.00 s  2.00 s",
        "servers/0         5  62.500%        3               2            1",
    ):
        assert line in lines, "\n".join(lines)
    assert max(map(len, lines)) <= 120


def test_a_table_of_nothing_has_dashes() -> None:
    text = str(Report(scenario(), ["servers/0", "servers/1"], Record()))
    assert "nan" not in text
    assert "—" in text


def test_of_many_servers_the_busiest_and_the_idlest_are_listed() -> None:
    record = Record()
    for number in range(50):
        for _ in range(number + 1):
            record.sent.add(0.0, number)
    text = str(Report(scenario(servers=Servers(50)), [f"servers/{n}" for n in range(50)], record))
    assert "… 30 more …" in text
    assert "servers/49" in text
    assert "servers/0 " in text
    assert "servers/25" not in text


def test_the_chart_is_xml_with_a_line_for_each_thing() -> None:
    faults = [slow(2, 0, at=1, until=2), slow(3, 0, at=2, period=1)]
    root = ET.fromstring(report(title="By <hand>", faults=faults).svg())
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in root.iter(f"{space}text")]
    assert {"By <hand>", "answered", "latency", "p50", "p99", "servers/0", "others", "seconds"} <= set(texts)
    lines = list(root.iter(f"{space}polyline"))
    assert len(lines) == 1 + 2 + 2
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 900
            assert 0 <= y <= float(root.attrib["height"])
    spans = [each for each in root.iter(f"{space}rect") if each.find(f"{space}title") is not None]
    assert len(spans) == 3 * (1 + 2), "in each panel"


def test_a_chart_of_nothing_can_be_drawn() -> None:
    svg = Report(scenario(), ["servers/0", "servers/1"], Record()).svg()
    assert "nan" not in svg
    ET.fromstring(svg)


def test_nothing_is_a_number_that_is_none() -> None:
    assert isnan(nan)
    assert repr(report()) == "<Report: 7 requests, 57.143% answered>"
