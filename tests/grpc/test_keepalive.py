"""When to ping; and which methods may be called twice."""

import itertools

import pytest
from grpclib.config import Configuration
from h2.errors import ErrorCodes

import meshlib
from meshlib.grpc.calling.idempotency import Idempotency, declared
from meshlib.grpc.calling.keepalive import Keepalive, Policy


def keepalive(**options):
    policy = Policy(5.0, 4.0, **options)
    return Keepalive(policy, 0.0), policy


def test_a_ping_goes_out_after_a_silence_while_calls_are_under_way():
    each, _ = keepalive()
    assert each.pause(0.0) == 5.0
    assert each.due(4.0, 1) is None
    assert each.due(5.0, 0) is None
    assert len(each.due(5.0, 1)) == 8
    assert each.pause(5.0) == 1.0
    assert each.due(8.9, 1) is None
    error = each.due(9.1, 1)
    assert isinstance(error, meshlib.ConnectionLost)
    assert "within 4 s" in str(error)


def test_whatever_comes_is_an_answer():
    each, _ = keepalive()
    assert each.due(5.0, 1)
    each.heard(6.0, False)
    assert each.due(9.1, 1) is None
    assert each.pause(6.0) == 5.0


def test_an_idle_connection_is_looked_at_now_and_then():
    each, _ = keepalive()
    now, looks = 0.0, 0
    while now < 60:
        assert each.due(now, 0) is None
        now += each.pause(now)
        looks += 1
    assert 50 < looks < 65
    assert len(each.due(now, 1)) == 8


def test_two_without_data_and_then_one_in_five_minutes():
    each, _ = keepalive()
    sent = []
    now = 0.0
    while now < 1000:
        now += 1
        if isinstance(each.due(now, 1), bytes):
            sent.append(now)
            each.heard(now + 0.5, False)
    assert sent[0] == 5
    assert len(sent) == 5
    assert all(later - before >= 300 for before, later in itertools.pairwise(sent[1:]))
    each.heard(now, True)
    assert isinstance(each.due(now + 5, 1), bytes)
    assert isinstance(each.due(now + 10, 1), meshlib.ConnectionLost)


def test_a_server_that_complains_gets_half_as_many_from_all():
    each, policy = keepalive()
    other = Keepalive(policy, 0.0)
    each.told(ErrorCodes.NO_ERROR, "too_many_pings")
    each.told(ErrorCodes.ENHANCE_YOUR_CALM, "resets")
    assert policy.interval == 5
    each.told(ErrorCodes.ENHANCE_YOUR_CALM, "too_many_pings")
    assert other.pause(0.0) == 10.0


def test_as_a_configuration_says():
    assert Policy.of_configuration(Configuration().__for_client__()) is None
    config = Configuration(_keepalive_time=10, _keepalive_timeout=3, _keepalive_permit_without_calls=True)
    policy = Policy.of_configuration(config.__for_client__())
    assert (policy.interval, policy.timeout, policy.idle, policy.free, policy.spacing) == (10, 3, True, 2, 300)
    each = Keepalive(policy, 0.0)
    assert isinstance(each.due(10.0, 0), bytes)


def test_silence_is_told_from_a_slow_call():
    each, _ = keepalive()
    each.heard(10.0, True)
    assert not each.silent_since(9.0, 30.0)
    assert not each.silent_since(11.0, 18.0)
    assert each.silent_since(11.0, 19.0)


# --- idempotency ------------------------------------------------------------------------------------------------------


def test_what_protobuf_declares():
    from meshprotos import interop_pb2

    service = "/meshlib.grpctest.Interop/"
    assert declared(f"{service}EmptyCall", interop_pb2.Empty)
    assert declared(f"{service}Read")
    assert not declared(f"{service}UnaryCall")
    assert not declared(f"{service}Nothing")
    assert not declared("/")
    assert not declared("nonsense", object())


@pytest.mark.parametrize(
    ("word", "path", "expected"),
    [
        (None, "/a.B/Get", False),
        (True, "/a.B/Get", True),
        (False, "/meshlib.grpctest.Interop/Read", False),
        ("a.B/Get*", "/a.B/GetUser", True),
        ("/a.B/Get*", "/a.B/GetUser", True),
        ("a.B/Get*", "/a.B/Set", False),
        (["*/Get*", "a.B/List"], "/a.B/List", True),
        (["*/Get*"], "/meshlib.grpctest.Interop/Read", True),
        (lambda path: path == "/a.B/C" or None, "/a.B/C", True),
        (lambda path: None, "/meshlib.grpctest.Interop/Read", True),
        (lambda path: False, "/meshlib.grpctest.Interop/Read", False),
    ],
)
def test_a_word_of_ones_own(word, path, expected):
    import meshprotos.interop_pb2

    assert meshprotos.interop_pb2.DESCRIPTOR
    assert Idempotency(word)(path) is expected


@pytest.mark.parametrize("word", [5, "Get", ["Get"], [5], [None]])
def test_a_word_that_makes_no_sense(word):
    with pytest.raises(meshlib.ConfigurationError, match="patterns such as"):
        Idempotency(word)
