"""The waiting line: who goes next, who must go, checked against a line that is a plain list."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshlib.core.priority import Priority
from meshlib.filters.waiting import INTERVAL, Waiter, WaitingLine

SHEDDABLE, DEFAULT, CRITICAL = Priority


def filled(*waiters):
    line = WaitingLine()
    for waiter in waiters:
        assert line.push(waiter, 100) is None
    return line


def taken(line, now):
    order = []
    while (best := line.best(now)) is not None:
        line.remove(best, now)
        order.append(best)
    return order


def test_first_come_first_served_until_a_queue_stands_then_the_newest_first():
    waiters = [Waiter(DEFAULT, i / 1000) for i in range(5)]
    assert taken(filled(*waiters), 0.09) == waiters
    assert taken(filled(*waiters), 0.1) == waiters[::-1]


def test_the_more_important_goes_first_whenever_it_came():
    low, mid, high = Waiter(SHEDDABLE, 0.0), Waiter(DEFAULT, 0.01), Waiter(CRITICAL, 0.02)
    for now in (0.03, 5.0):
        assert taken(filled(low, mid, high), now) == [high, mid, low]


def test_a_critical_request_does_not_find_a_queue_that_sheddable_ones_make():
    low = Waiter(SHEDDABLE, 0.0)
    line = filled(low)
    for i in range(3):
        line.push(Waiter(CRITICAL, 0.2 + i / 1000), 100)
    assert line.standing(SHEDDABLE, 0.25)
    assert not line.standing(DEFAULT, 0.25)
    assert not line.standing(CRITICAL, 0.25)
    assert line.late(0.25) is low
    assert line.late(0.25) is None
    assert [waiter.since for waiter in taken(line, 0.25)] == [0.2, 0.201, 0.202]


def test_nobody_waits_longer_than_the_interval_or_its_twentieth_once_a_queue_stands():
    first = Waiter(DEFAULT, 0.0)
    line = filled(first)
    assert line.late(0.0999) is None
    assert line.late(0.1) is first
    second, third = Waiter(DEFAULT, 0.101), Waiter(DEFAULT, 0.103)  # the queue still stands
    line.push(second, 100)
    line.push(third, 100)
    assert line.late(0.1055) is None
    assert line.late(0.107) is second
    assert line.late(0.107) is None
    assert line.late(0.109) is third


def test_a_pause_of_the_target_ends_a_standing_queue():
    for pause, stands in ((0.004, True), (0.006, False)):
        line = filled(Waiter(DEFAULT, 0.0))
        taken(line, 0.2)
        line.push(Waiter(DEFAULT, 0.2 + pause), 100)
        assert line.standing(DEFAULT, 0.2 + pause) is stands


def test_a_queue_that_has_not_stood_does_not_become_standing_by_short_pauses():
    line = WaitingLine()
    for i in range(100):
        waiter = Waiter(DEFAULT, i * 0.002)
        line.push(waiter, 100)
        assert not line.standing(DEFAULT, waiter.since + 0.001)
        line.remove(waiter, waiter.since + 0.001)


def test_the_interval_may_be_longer_where_requests_take_longer():
    waiter = Waiter(DEFAULT, 0.0)
    line = filled(waiter)
    line.interval = 2.0
    assert line.late(1.9) is None
    assert line.late(2.0) is waiter


def test_when_there_is_no_room_the_last_to_be_served_must_go():
    line = filled(old := Waiter(DEFAULT, 0.0), new := Waiter(DEFAULT, 0.01))
    late_comer = Waiter(DEFAULT, 0.02)
    assert line.push(late_comer, 2) is late_comer
    assert line.push(high := Waiter(CRITICAL, 0.03), 2) is new
    newest = Waiter(DEFAULT, 0.2)
    assert line.push(newest, 2) is old
    low = Waiter(SHEDDABLE, 0.21)
    assert line.push(low, 2) is low
    assert taken(line, 0.21) == [high, newest]


def test_without_any_room_nobody_gets_in():
    line, waiter = WaitingLine(), Waiter(CRITICAL, 0.0)
    assert line.push(waiter, 0) is waiter
    assert len(line) == 0


class Model(RuleBasedStateMachine):
    """The line beside a list of (priority, since) in the order of their coming."""

    def __init__(self):
        super().__init__()
        self.line = WaitingLine()
        self.there = []
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.0005, 0.004, 0.006, 0.05, 0.11, 1.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(priority=st.sampled_from(Priority), room=st.integers(0, 6))
    def push(self, priority, room):
        waiter = Waiter(priority, self.now)
        self.there.append(waiter)
        full = len(self.there) > room
        out = self.line.push(waiter, room)
        assert (out is not None) == full
        if out is not None:
            assert out.priority == min(other.priority for other in self.there)
            peers = [other for other in self.there if other.priority == out.priority]
            assert out in (peers[0], peers[-1])
            self.there.remove(out)

    @rule(index=st.integers(0, 20), twice=st.booleans())
    def leave(self, index, twice):
        if self.there:
            waiter = self.there.pop(index % len(self.there))
            for _ in range(1 + twice):
                self.line.remove(waiter, self.now)

    @rule()
    def serve(self):
        best = self.line.best(self.now)
        if best is None:
            assert not self.there
            return
        peers = [w for w in self.there if w.priority == max(other.priority for other in self.there)]
        assert best is (peers[-1] if self.line.standing(best.priority, self.now) else peers[0])
        self.there.remove(best)
        self.line.remove(best, self.now)

    @rule()
    def dismiss(self):
        while (late := self.line.late(self.now)) is not None:
            peers = [w for w in self.there if w.priority == late.priority]
            assert late is peers[0]
            assert self.now - late.since >= 0.05 * INTERVAL
            self.there.remove(late)
        assert all(self.now - waiter.since < INTERVAL for waiter in self.there)

    @invariant()
    def counts(self):
        assert len(self.line) == len(self.there)
        standing = [self.line.standing(priority, self.now) for priority in Priority]
        assert standing == sorted(standing, reverse=True)  # who sees more sees a queue at least as old
        assert not any(standing) or self.there


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAgainstAList = Model.TestCase


def test_it_prints_who_waits():
    assert repr(filled(Waiter(CRITICAL, 0), Waiter(DEFAULT, 0))) == "<WaitingLine: 1 critical, 1 default, 0 sheddable>"


@pytest.mark.parametrize("priority", Priority)
def test_an_empty_line_stands_for_nobody(priority):
    assert not WaitingLine().standing(priority, 1e9)
