"""Paths, name trees and Dtabs: they read as they print, mean what Finagle means, and errors say where."""

import time

import anyio
import anyio.lowlevel
import hypothesis.strategies as st
import pytest
from hypothesis import given

import meshlib
from meshlib import ConfigurationError, Dtab, DtabError, mux
from meshlib.names import dtab as room
from meshlib.names.dtab import EMPTY_DTAB, Dentry, Residual, extended
from meshlib.names.grammar import DEEPEST, parse_tree
from meshlib.names.path import ANY, Path, Prefix
from meshlib.names.target import Target
from meshlib.names.tree import EMPTY, FAIL, NEG, Alt, Leaf, Union, Weighted, evaluate, map_leaves, simplified

LABELS = st.binary(min_size=1, max_size=6) | st.sampled_from([b"s", b"users", b"v1", b"$", b"#", b"a.b:80"])
PATHS = st.lists(LABELS, max_size=4).map(lambda labels: Path(tuple(labels)))
PREFIXES = st.lists(LABELS | st.just(ANY), max_size=4).map(lambda elements: Prefix(tuple(elements)))
TARGETS = st.sampled_from(
    [
        "127.0.0.1:80",
        "[::1]:9000,host:1",
        "10.0.0.1:80",
        "zk://z1:2181,z2:2181/services!http",
        "k8s://shop/users:http",
        "file:///etc/mesh/users",
        "dns://users.prod:80?x=1&y=2",
    ]
).map(Target.parse)
LEAVES = st.one_of(PATHS.map(Leaf), TARGETS.map(Leaf), st.sampled_from([NEG, FAIL, EMPTY]))
WEIGHTS = st.one_of(
    st.just(1.0),
    st.sampled_from([0.0, 0.5, 9.0, 0.1, 1e-7, 1e23, 5e-324, 2**-24, 1.2345678901234567e16]),
    st.floats(0, 1.7e308),
)


def _grown(trees):
    weighted = st.builds(Weighted, WEIGHTS, trees)
    unions = st.lists(weighted, min_size=1, max_size=3).filter(lambda some: len(some) > 1 or some[0].weight != 1)
    return st.one_of(
        st.lists(trees, min_size=2, max_size=3).map(lambda some: Alt(tuple(some))),
        unions.map(lambda some: Union(tuple(some))),
    )


TREES = st.recursive(LEAVES, _grown, max_leaves=8)
DTABS = st.lists(st.builds(Dentry, PREFIXES, TREES), max_size=4).map(Dtab.of)


# --- what is read is what is printed ----------------------------------------------------------------------------------


@given(PATHS)
def test_a_path_reads_as_it_prints(path):
    assert Path.parse(str(path)) == path


@given(TREES)
def test_a_tree_reads_as_it_prints(tree):
    assert parse_tree(str(tree)) == tree


@given(DTABS)
def test_a_dtab_reads_as_it_prints(dtab):
    assert Dtab(str(dtab)) == dtab
    assert Dtab(dtab.pretty()) == dtab
    assert hash(Dtab(str(dtab))) == hash(dtab)
    assert Dtab.of_pairs(dtab.pairs()) == (dtab, 0)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("", ""),
        (" ; ;; ", ""),
        ("/a=>/b", "/a => /b"),
        ("/a => /b ;", "/a => /b"),
        ("/a => /b # to b\n; # and\n/c => /d", "/a => /b ; /c => /d"),
        ("/a => /b#c", "/a => /b#c"),
        ("/ => /x", "/ => /x"),
        ("/a/*/b => /", "/a/*/b => /"),
        ("/a => .5*/b&1.50 * /c|(/d|~)&$", "/a => 0.5 * /b & 1.5 * /c | (/d | ~) & $"),
        ("/a => ((/b))", "/a => /b"),
        ("/a => 1 * /b", "/a => /b"),
        ("/a => 2 * /b", "/a => 2 * /b"),
        ("/a => 127.0.0.1:80", "/a => 127.0.0.1:80"),
        ("/a => 9 * 127.0.0.1:80 & dns://h:1", "/a => 9 * 127.0.0.1:80 & dns://h:1"),
        ("/a => (h:1)|h:2;/b => h:3", "/a => h:1 | h:2 ; /b => h:3"),
        ("/a => h:1 & h:2", "/a => h:1 & h:2"),
        ("/a => zk://z/s?tls=true&ca=/x & /b", "/a => zk://z/s?tls=true&ca=/x & /b"),
        (r"/a\x20b => /\x2f", r"/a\x20b => /\x2f"),
        (r"/\x61 => /b", "/a => /b"),
    ],
)
def test_the_grammar_by_example(text, means):
    assert str(Dtab(text)) == means


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "column", "expected"),
    [
        ("x", 1, 1, "a prefix such as /s"),
        ("/a", 1, 3, "=> after the prefix"),
        ("/a = /b", 1, 4, "=> after the prefix"),
        ("/a =>", 1, 6, "a path, a target, ( or one of ~ ! $"),
        ("/a => /b /c", 1, 10, "; before the next entry"),
        ("/a => /b ;\n/c => /d//e", 2, 9, "no empty label"),
        ("/a => /b/", 1, 9, "no empty label"),
        ("/a => /b\x07", 1, 9, "letters, digits"),
        ("/a => (/b", 1, 10, ") or | or &"),
        ("/a => /b)", 1, 9, "; before the next entry"),
        ("/a => /b |", 1, 11, "a path, a target"),
        ("/a => 3 * ", 1, 11, "a path, a target"),
        ("/a => users", 1, 7, "a target such as zk://host/path"),
        ("/a => h:1&h:2", 1, 7, "white space before the &"),
        ("/a => 1. * /b", 1, 7, "a path, a target"),
        ("/a => 1.5.2 * /b", 1, 7, "a path, a target"),
        ("/a => zk://z/\x00", 1, 7, "without control characters"),
        ("\t/a\x07 => /b", 1, 4, "=> after the prefix"),
        ("/a => h:99999", 1, 7, "a port from 0 to 65535"),
        ("/a*b => /c", 1, 3, "=> after the prefix"),
        (r"/a\xg0 => /c", 1, 3, "=> after the prefix"),
        ("/a => " + "9" * 400 + " * /b", 1, 7, "a weight that a number can hold"),
    ],
)
def test_an_error_says_where_and_what_would_be_right(text, line, column, expected):
    with pytest.raises(DtabError) as caught:
        Dtab(text)
    error = caught.value
    assert (error.line, error.column) == (line, column)
    assert f"line {line}, column {column}: expected " in error.message
    assert expected in error.message
    *_, shown, caret = error.message.split("\n")
    assert caret.strip() == "^"
    assert caret.index("^") == column + 1
    assert shown.isprintable()
    assert len(shown) <= 102


def test_a_long_line_is_shown_around_the_place():
    with pytest.raises(DtabError) as caught:
        Dtab("/a => " + "/b | " * 100 + "?" + " | /c" * 50)
    *_, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^")] == "?"
    assert caught.value.column == 507
    assert len(shown) <= 102


def test_an_error_shows_no_password():
    with pytest.raises(DtabError) as caught:
        Dtab("/a => zk://user:secret@host/s ? /b")
    message = str(caught.value)
    assert "secret" not in message
    assert f"zk://{'…' * 11}@host/s ? /b" in message
    assert "secret" not in repr(Dtab("/a => zk://user:secret@host/s"))
    assert Dtab("/a => zk://user:secret@host/s").pairs() == (("/a", "zk://user:secret@host/s"),)


@pytest.mark.parametrize("value", [None, 3, b"/a => /b"])
def test_a_dtab_is_a_text(value):
    with pytest.raises(DtabError, match="expected a text"):
        Dtab(value)


@pytest.mark.parametrize("text", ["", "a", "//", "/a/", "/a b", "/ü", r"/\x2", "/a\n", "/" + "a" * 70_000, None, b"/a"])
def test_what_is_no_path(text):
    with pytest.raises(DtabError, match="path") as caught:
        Path.parse(text)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_logical_path_is_a_target_and_is_checked_as_such():
    target = Target.parse(r" /s/\x20 ")
    assert (target.scheme, target.rest, target.text) == ("path", r"/s/\x20", r"/s/\x20")
    with pytest.raises(DtabError, match="/label/label"):
        Target.parse("/s//users")


def test_labels_are_bytes_and_not_empty():
    for labels in ((b"a", b""), ("a",)):
        with pytest.raises(DtabError, match="labels are bytes"):
            Path(labels)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_not_below_zero(weight):
    with pytest.raises(DtabError, match="not below 0"):
        Weighted(weight, NEG)


@pytest.mark.parametrize(
    "text",
    [
        "/a => 9" + " " * 200_000 + "x",
        "/a => " + "9" * 200_000 + "x",
        "/a => " + "9" * 200_000 + " * /b",
        "/a => 9" + "#\n" * 100_000 + "x",
        "/" + "*/" * 100_000,
        "/a => /" + "a" * 200_000 + "?",
        "/a => " + r"/\x4" * 50_000,
        "/a => " + "(" * 200_000,
        "/a => " + "x" * 200_000,
    ],
    ids=lambda text: text[:10],
)
def test_hostile_texts_are_refused_soon_and_briefly(text):
    began = time.process_time()
    with pytest.raises(DtabError) as caught:
        Dtab(text)
    assert time.process_time() - began < 5, "milliseconds, unless it grows with the square"
    assert len(str(caught.value)) < 1000


def test_parentheses_have_a_limit_and_so_has_the_text():
    deep = "(" * DEEPEST + "/a" + ")" * DEEPEST
    assert parse_tree(deep) == Leaf(Path.parse("/a"))
    assert len(Dtab("/a => (/b) | ((/c)) ; " * DEEPEST)) == DEEPEST, "those beside each other do not count"
    with pytest.raises(DtabError, match="no more than 100 parentheses"):
        parse_tree(f"({deep})")
    with pytest.raises(DtabError, match="the limit is 1048576"):
        Dtab("/a => /b;" * 200_000)


@given(st.text(alphabet="/ab*=>|&;()~!$#. \n1:x\\", max_size=60) | st.text(max_size=60))
def test_no_text_gives_anything_but_a_dtab_or_its_error(text):
    try:
        dtab = Dtab(text)
    except DtabError:
        return
    assert Dtab(str(dtab)) == dtab


@given(DTABS, st.data())
def test_nor_does_a_dtab_with_a_few_characters_changed(dtab, data):
    text = list(str(dtab))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.text(alphabet="/*=>|&;()~!$# .1:", max_size=2))
    try:
        changed = Dtab("".join(text))
    except DtabError:
        return
    assert Dtab(str(changed)) == changed


# --- what is meant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtab", "path", "tree"),
    [
        ("", "/a", "~"),
        ("/a => /b", "/c", "~"),
        ("/a => /b", "/a", "/b"),
        ("/a => /b", "/a/x/y", "/b/x/y"),
        ("/a => /b", "/ab", "~"),
        ("/a/b => /c", "/a", "~"),
        ("/ => /root", "/a", "/root/a"),
        ("/a => /b ; /a => /c", "/a/x", "/c/x | /b/x"),
        ("/a/x => /b ; /a => /c", "/a/x", "/c/x | /b"),
        ("/a/*/c => /b", "/a/x/c/d", "/b/d"),
        ("/* => /b", "/", "~"),
        ("/a => /b | 2 * /c & $", "/a/x", "/b/x | 2 * /c/x & $"),
        ("/a => ! | /b", "/a/x", "! | /b/x"),
        ("/a => h:1", "/a/x", "h:1/x"),
    ],
)
def test_lookup_by_example(dtab, path, tree):
    assert str(Dtab(dtab).lookup(Path.parse(path))) == tree


@given(DTABS, PATHS)
def test_lookup_is_what_a_model_says(dtab, path):
    found = []
    for entry in dtab.entries:
        n = len(entry.prefix.elements)
        head, tail = path.labels[:n], path.labels[n:]
        if len(head) == n and all(want in (ANY, have) for want, have in zip(entry.prefix.elements, head, strict=True)):
            found.insert(0, below(entry.tree, tail))
    assert [tree for _, tree in dtab.matches(path)] == found
    assert dtab.lookup(path) == (NEG if not found else found[0] if len(found) == 1 else Alt(tuple(found)))


def below(tree, tail):
    """The tree with ``tail`` after each of its paths, said in the most tedious way."""
    match tree:
        case Alt(trees):
            return Alt(tuple(below(each, tail) for each in trees))
        case Union(weighted):
            return Union(tuple(Weighted(each.weight, below(each.tree, tail)) for each in weighted))
        case Leaf(Path(labels)):
            return Leaf(Path(labels + tail))
        case Leaf(target) if tail:
            became, left = extended(target, Path(tail))
            return Leaf(Residual(became, left) if left.labels else became)
    return tree


@given(st.lists(PREFIXES, min_size=2, max_size=4), DTABS, PATHS)
def test_what_stands_lower_is_a_fallback_of_what_stands_higher(prefixes, dtab, path):
    head = Path(tuple(label or b"any" for label in prefixes[0].elements))
    above = Dtab.of([Dentry(prefix, Leaf(Path((b"%d" % n,)))) for n, prefix in enumerate([*prefixes, prefixes[0]])])
    found = (dtab + above).lookup(head + path)
    first = found.trees[0] if isinstance(found, Alt) else found
    assert first == Leaf(Path((b"%d" % len(prefixes),)) + path)


@given(TREES)
def test_a_simplified_tree_means_the_same(tree):
    assert evaluate(simplified(tree)) == evaluate(tree)
    assert simplified(simplified(tree)) == simplified(tree)


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("~ | /a", "/a"),
        ("/a | ~ | /b", "/a | /b"),
        ("/a | ! | /b", "/a | !"),
        ("/a | $ | /b", "/a | $"),
        ("~ | ~", "~"),
        ("2 * /a & 3 * ~ & !", "/a"),
        ("! & ~", "~"),
        ("2 * /a & 3 * ! & /b", "2 * /a & /b"),
        ("2 * /a & $", "2 * /a & $"),
        ("(/a | ~) & (2 * /b & ~)", "/a & /b"),
    ],
)
def test_simplification_by_example(text, simple):
    assert str(simplified(parse_tree(text))) == simple


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("~", None),
        ("!", None),
        ("$", set()),
        ("/a", {"/a"}),
        ("~ | /a", {"/a"}),
        ("! | /a", None),
        ("$ | /a", set()),
        ("/a | /b", {"/a"}),
        ("/a & /b", {"/a", "/b"}),
        ("/a & ~ & !", {"/a"}),
        ("~ & !", None),
        ("(~ & !) | /a", {"/a"}),
        ("$ & /a", {"/a"}),
    ],
)
def test_evaluation_by_example(text, values):
    found = evaluate(parse_tree(text))
    assert (None if found is None else set(map(str, found))) == values


def test_alternatives_and_unions_of_none_are_no_name():
    assert simplified(Alt(())) == simplified(Union(())) == NEG
    assert str(Alt(())) == str(Union(())) == "~"
    assert map_leaves(Alt(()), Leaf) == Alt(())


def test_later_dtabs_stand_above():
    base, local = Dtab("/s => /a"), Dtab("/s => /b")
    assert str((base + local).lookup(Path.parse("/s"))) == "/b | /a"
    assert base + EMPTY_DTAB is base
    assert len(base + local) == 2
    assert list(base) == [*base.entries]
    assert repr(base) == "Dtab('/s => /a')"
    with pytest.raises(TypeError):
        base + "/s => /b"


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "residual", "became", "left"),
    [
        ("zk://z:2181/services", "/users", "zk://z:2181/services/users", "/"),
        ("zk://z:2181", "/users", "zk://z:2181/users", "/"),
        ("zk://z:2181/services/!http", "/users", "zk://z:2181/services/users!http", "/"),
        ("zk://z/s!http?tls=true", "/users", "zk://z/s/users!http?tls=true", "/"),
        ("file:///etc/mesh", "/users", "file:///etc/mesh/users", "/"),
        ("file:///etc/me!sh?", "/users", "file:///etc/me!sh?/users", "/"),
        ("zk://z/s?tls=true&ca=/x", "/users", "zk://z/s/users?tls=true&ca=/x", "/"),
        ("k8s://shop?context=a/b", "/users:http", "k8s://shop/users:http?context=a/b", "/"),
        ("zk://z/s", r"/a\x2fb", r"zk://z/s/a\x2fb", "/"),
        ("consul://dc1", "/users", "consul://dc1/users", "/"),
        ("k8s://shop", "/users:http", "k8s://shop/users:http", "/"),
        ("k8s://", "/shop/users:http/more", "k8s://shop/users:http", "/more"),
        ("k8s://shop/users", "/x", "k8s://shop/users", "/x"),
        ("h:1", "/x/y", "h:1", "/x/y"),
        ("dns://h:1", "/x", "dns://h:1", "/x"),
        ("srv://_a._tcp.b", "/x", "srv://_a._tcp.b", "/x"),
        ("unix:///run/a", "/x", "unix:///run/a", "/x"),
    ],
)
def test_the_rest_of_a_path_goes_where_a_target_has_a_place_for_it(target, residual, became, left):
    found, rest = extended(Target.parse(target), Path.parse(residual))
    assert (str(found), str(rest)) == (became, left)
    assert Target.parse(found.text) == found


def test_what_has_no_place_is_kept_and_grows():
    first = Dtab("/s => h:1").lookup(Path.parse("/s/x"))
    assert first == Leaf(Residual(Target.parse("h:1"), Path.parse("/x")))


@pytest.mark.parametrize("path", ["/s/..", "/s/a/../../shadow", "/s/."])
def test_a_path_does_not_climb_out_of_a_directory(path):
    assert Dtab("/s => file:///etc/mesh").lookup(Path.parse(path)) == NEG
    assert Dtab("/s => /a").lookup(Path.parse(path)) != NEG


# --- what travels with a request --------------------------------------------------------------------------------------


def test_malformed_entries_of_a_request_are_left_out_and_counted():
    pairs = (("/a", "/b"), ("x", "/b"), ("/a", "("), ("/a => /b ; /c", "/d"), ("/c", "/d ; /e => /f"), ("/g", "h:1"))
    dtab, malformed = Dtab.of_pairs(pairs)
    assert str(dtab) == "/a => /b ; /g => h:1"
    assert malformed == 4


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=40)), max_size=4))
def test_whatever_comes_with_a_request_can_be_read(pairs):
    dtab, malformed = Dtab.of_pairs(tuple(pairs))
    assert len(dtab) + malformed == len(pairs)


def test_what_was_read_lately_is_not_read_again_unless_it_is_large():
    for size, again in ((100, True), (room.REMEMBERED, False)):
        pairs = (("/s", "/" + "a" * size),)
        assert (Dtab.of_pairs(pairs)[0] is Dtab.of_pairs(pairs)[0]) == again
        assert len(Dtab.of_pairs(pairs)[0]) == 1
    assert Dtab.of_pairs(())[0] is EMPTY_DTAB


def test_the_local_dtab_is_for_the_body_alone():
    before = meshlib.current()
    assert before.dtab == ()
    with meshlib.dtab("/s => /a") as added:
        assert added == Dtab("/s => /a")
        with meshlib.dtab(Dtab("/s => /b")):
            assert meshlib.current().dtab == (("/s", "/a"), ("/s", "/b"))
        assert meshlib.current().dtab == (("/s", "/a"),)
    assert meshlib.current().dtab == ()
    with pytest.raises(DtabError), meshlib.dtab("/s"):
        pass
    with pytest.raises(ZeroDivisionError), meshlib.dtab("/s => /a"):
        raise ZeroDivisionError
    assert meshlib.current() is before


async def test_tasks_inherit_the_local_dtab_and_do_not_see_that_of_others():
    seen = {}
    canary = meshlib.dtab("/s => /canary")  # one value, in several tasks at once

    async def task(name, inner):
        with canary, meshlib.dtab(f"/s => /{inner}"):
            await anyio.sleep(0.01)
            seen[name] = meshlib.current().dtab
        seen[name + " after"] = meshlib.current().dtab

    with meshlib.dtab("/s => /outer"):
        async with anyio.create_task_group() as group:
            group.start_soon(task, "a", "x")
            group.start_soon(task, "b", "y")
    assert seen == {
        "a": (("/s", "/outer"), ("/s", "/canary"), ("/s", "/x")),
        "b": (("/s", "/outer"), ("/s", "/canary"), ("/s", "/y")),
        "a after": (("/s", "/outer"),),
        "b after": (("/s", "/outer"),),
    }


def test_other_things_of_the_context_stay_as_they_are():
    with meshlib.dtab("/s => /a"), meshlib.use(meshlib.current().evolve(client_id="shop")):
        assert meshlib.current().dtab == (("/s", "/a"),)
        with meshlib.dtab("/s => /b"):
            assert meshlib.current().client_id == "shop"


async def test_it_decorates_functions_but_no_generators():
    @meshlib.dtab("/s => /a")
    def plain(key):
        """Says so."""
        return key, meshlib.current().dtab

    @meshlib.dtab("/s => /b")
    async def waiting():
        await anyio.lowlevel.checkpoint()
        return meshlib.current().dtab

    assert plain(key=1) == (1, (("/s", "/a"),))
    assert plain.__doc__ == "Says so."
    assert await waiting() == (("/s", "/b"),)
    assert meshlib.current().dtab == ()
    for generator in (_one, _one_later):
        with pytest.raises(ConfigurationError, match=r"dtab\('/s => /a'\) on _one.*: it is a generator; use 'with'"):
            meshlib.dtab("/s => /a")(generator)


def _one():
    yield 1


async def _one_later():
    yield 1


async def test_it_travels_to_the_services_that_are_called_and_on_from_there():
    async def last(request):
        with meshlib.dtab("/s => /here"):
            return mux.Response(str(Dtab.of_pairs(meshlib.current().dtab)[0]).encode())

    async with mux.serve(last) as backend, mux.client(backend.address) as inner:

        async def middle(request):
            with meshlib.dtab("/s => 2 * /b & zk://z:2181/s!http"):
                return await inner(mux.Request())

        async with mux.serve(middle) as frontend, mux.client(frontend.address) as outer:
            with meshlib.dtab(r"/s/* => /a\x20 | ~"):
                reply = await outer(mux.Request())
            assert reply.body.decode() == r"/s/* => /a\x20 | ~ ; /s => 2 * /b & zk://z:2181/s!http ; /s => /here"
            assert (await outer(mux.Request())).body == b"/s => 2 * /b & zk://z:2181/s!http ; /s => /here"
