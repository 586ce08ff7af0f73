"""Addresses in a file: every way to write them, every way to break them, and following them as they change."""

import json
import os
from contextlib import aclosing

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshlib.core.errors import ConfigurationError
from meshlib.names import file
from meshlib.names.addr import Address, Bound, Failed
from meshlib.names.file import FileResolver, parse_endpoints
from meshlib.names.target import Target
from meshlib.testing import run_virtual

# --- reading ----------------------------------------------------------------------------------------------------------


def details(addresses):
    return [(str(a), a.weight, dict(a.metadata)) for a in addresses]


def test_one_address_a_line_with_settings_and_comments():
    text = """
    # the shops
    10.0.0.1:9000
    10.0.0.2:9000  weight=2 zone=eu-1   # twice the traffic

    [::1]:9000 weight=0.5
    unix:///run/shop.sock
    """
    assert details(parse_endpoints(text)) == [
        ("10.0.0.1:9000", 1.0, {}),
        ("10.0.0.2:9000", 2.0, {"zone": "eu-1"}),
        ("[::1]:9000", 0.5, {}),
        ("unix:///run/shop.sock", 1.0, {}),
    ]


SAME = [("a:1", 1.0, {}), ("b:2", 2.0, {"zone": "eu-1"}), ("[::1]:3", 1.0, {"shard": "7"})]


@pytest.mark.parametrize("wrap", [lambda items: items, lambda items: {"endpoints": items, "version": 3}])
def test_json_as_a_list_or_an_object_with_one(wrap):
    items = [
        "a:1",
        {"host": "b", "port": 2, "weight": 2, "zone": "eu-1"},
        {"host": "::1", "port": 3, "shard": 7},
    ]
    assert details(parse_endpoints(json.dumps(wrap(items), indent=1))) == SAME


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing here", "[]", '{"endpoints": []}'])
def test_no_address_is_none_and_no_mistake(text):
    assert parse_endpoints(text) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:1\nb\n", "shops, line 2: .*expected host:port"),
        ("a:1\n\n# x\nb:2 heavy", "shops, line 4: 'heavy' is no setting; expected key=value, such as weight=2"),
        ("a:1 weight=", "shops, line 1: 'weight=' is no setting|could not convert"),
        ("a:1 =5", "shops, line 1: '=5' is no setting"),
        ("a:1 weight=much", "shops, line 1: could not convert string to float: 'much'"),
        ("a:1 weight=0", "shops, line 1: .*must be a number above 0"),
        ("a:1 weight=nan", "shops, line 1: .*must be a number above 0"),
        ("[", "shops: not JSON"),
        ('{"endpoints": 5}', "shops: expected a list, or an object with a list of endpoints"),
        ("{}", "shops: expected a list, or an object with a list of endpoints"),
        ('["a:1", 5]', "shops: endpoint 1: 5: expected .host:port. or "),
        ('[{"host": "a"}]', "shops: endpoint 0: "),
        ('[{"host": "a", "port": true}]', "shops: endpoint 0: "),
        ('[{"host": "a", "port": 70000}]', "shops: endpoint 0: .*port from 0 to 65535"),
        ('[{"host": "a", "port": 1, "weight": null}]', "shops: endpoint 0: could not convert"),
        ("[1" + "0" * 5000 + "]", "shops: not JSON"),
        ("[" * 100_000, "shops: not JSON"),
    ],
    ids=range(17),
)
def test_a_mistake_is_told_with_its_place(text, says):
    with pytest.raises(ConfigurationError, match=says):
        parse_endpoints(text, "shops")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["host", "port", "weight", "endpoints", "x"]), inner)
    ),
)


@given(st.text() | st.from_regex(r"([a-z\[\]:0-9.]+:[0-9]{1,6} ?(weight=)?[a-z0-9.=-]*\n?)*") | JSON.map(json.dumps))
@example("[]:1")
@example("\x00:1")
@example('[{"host": "a]:1,[b", "port": 1}]')
def test_whatever_is_in_the_file_is_read_or_refused_and_nothing_else_happens(text):
    try:
        addresses = parse_endpoints(text)
    except ConfigurationError:
        return
    assert all(isinstance(address, Address) and address.weight > 0 for address in addresses)


# --- following --------------------------------------------------------------------------------------------------------


def bound(*texts):
    return Bound.of(map(Address.parse, texts))


class Follower:
    """Follows a file in virtual time, and notes each state."""

    def __init__(self, path):
        self.path = path
        self.states = []

    async def follow(self):
        async with aclosing(FileResolver().watch(Target.parse(f"file://{self.path}"))) as states:
            async for state in states:
                self.states.append(state)

    def write(self, text):
        """As it should be done: a new file, renamed over the old one."""
        new = self.path.with_suffix(".new")
        new.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.replace(new, self.path)  # noqa: PTH105

    async def look(self):
        await anyio.sleep(2 * file.POLL)


def following(tmp_path, script):
    follower = Follower(tmp_path / "shops")

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(follower.follow)
            await script(follower)
            group.cancel_scope.cancel()

    run_virtual(main)
    return follower.states


@pytest.fixture(autouse=True)
def in_this_thread(monkeypatch):
    """Virtual time does not wait for worker threads, so files are read in the event loop's own."""

    async def run_sync(function, *args, **options):
        await anyio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)


def test_a_file_is_followed_as_it_changes(tmp_path):
    async def script(follower):
        follower.write("a:1")
        await follower.look()
        follower.write("a:1\nb:2")
        await follower.look()
        await anyio.sleep(60)
        follower.write("[]")
        await follower.look()

    assert following(tmp_path, script) == [bound("a:1"), bound("a:1", "b:2"), Bound(())]


def test_an_unchanged_file_is_told_once(tmp_path):
    async def script(follower):
        follower.write("a:1")
        await anyio.sleep(300)

    assert following(tmp_path, script) == [bound("a:1")]


def test_a_file_that_is_missing_and_appears_later(tmp_path):
    async def script(follower):
        await anyio.sleep(60)
        follower.write("a:1")
        await follower.look()
        follower.path.unlink()
        await anyio.sleep(60)
        follower.write("a:1")
        await follower.look()

    states = following(tmp_path, script)
    assert [type(state) for state in states] == [Failed, Bound, Failed, Bound]
    assert "No such file or directory" in states[0].cause
    assert str(tmp_path / "shops") in states[0].cause


def test_a_broken_file_is_told_once_with_its_line_and_read_again_when_it_changes(tmp_path):
    async def script(follower):
        follower.write("a:1")
        await follower.look()
        follower.write("a:1\nb2")
        await anyio.sleep(60)
        follower.write("a:1\nb:2")
        await follower.look()

    first, broken, last = following(tmp_path, script)
    assert (first, last) == (bound("a:1"), bound("a:1", "b:2"))
    assert type(broken) is Failed
    assert f"{tmp_path / 'shops'}, line 2" in broken.cause


@pytest.mark.parametrize("text", [b"\xff\xfe", b"["])
def test_what_is_no_text_or_half_of_one_is_told(tmp_path, text):
    async def script(follower):
        follower.write(text)
        await follower.look()

    (state,) = following(tmp_path, script)
    assert type(state) is Failed


def test_a_file_that_is_put_back_as_it_was_is_told_again(tmp_path):
    async def script(follower):
        for text in ("a:1", "broken", "a:1"):
            follower.write(text)
            await follower.look()

    assert [type(state) for state in following(tmp_path, script)] == [Bound, Failed, Bound]


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "LARGEST", 10)

    async def script(follower):
        follower.write("a:1 # much too long")
        await follower.look()

    (state,) = following(tmp_path, script)
    assert "has 19 bytes; the limit is 10" in state.cause


@pytest.mark.parametrize("wrong", ["file://shops", "file://", "file://./x"])
async def test_a_path_that_is_not_absolute_is_told(wrong):
    with pytest.raises(ConfigurationError, match="expected file:///absolute/path"):
        await anext(FileResolver().watch(Target.parse(wrong)))
