"""Health: the worst that any layer says of an endpoint, and why."""

from meshlib.core.health import Health
from meshlib.core.service import Status


def test_the_worst_mark_counts_and_withdrawing_it_uncovers_the_next():
    health = Health()
    assert (health.status, health.reason) == (Status.OPEN, "")
    health.mark("breaker", Status.BUSY, "5 failures in a row")
    health.mark("session", Status.CLOSED, "draining")
    assert (health.status, health.reason) == (Status.CLOSED, "breaker: 5 failures in a row, session: draining")
    health.mark("session", Status.OPEN)
    assert (health.status, health.reason) == (Status.BUSY, "breaker: 5 failures in a row")
    health.mark("breaker", Status.OPEN)
    assert (health.status, health.reason) == (Status.OPEN, "")


def test_each_change_is_told_and_a_withdrawal_of_nothing_is_none():
    told = []
    health = Health(lambda: told.append(health.status))
    health.mark("x", Status.OPEN)
    assert told == []
    health.mark("x", Status.BUSY)
    health.mark("x", Status.BUSY, "still")
    health.mark("x", Status.OPEN)
    assert told == [Status.BUSY, Status.BUSY, Status.OPEN]


def test_it_serves_if_need_be_as_long_as_no_layer_says_that_it_cannot():
    health = Health()
    assert health.serves
    health.mark("lease", Status.BUSY, "it ran out", serves=True)
    assert (health.status, health.serves, health.reason) == (Status.BUSY, True, "lease: it ran out")
    health.mark("connect", Status.BUSY, "refused")
    assert not health.serves
    health.mark("connect", Status.OPEN)
    assert health.serves
    health.mark("lease", Status.OPEN)
    assert (health.status, health.serves) == (Status.OPEN, True)


def test_it_prints_its_status_and_reason():
    health = Health()
    assert repr(health) == "<Health open>"
    health.mark("connect", Status.BUSY)
    assert repr(health) == "<Health busy: connect>"
