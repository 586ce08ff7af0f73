"""From a path to targets: Finagle's rules, checked against a model, and what is told of names that do not end."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from meshlib.names.delegation import Endless
from meshlib.names.dtab import Dtab, Residual
from meshlib.names.interpreter import DEEPEST, LONGEST, LOOKED, MOST, NESTED, follow, system_name
from meshlib.names.path import Path
from meshlib.names.target import Target
from meshlib.names.tree import EMPTY, FAIL, NEG, Alt, Constant, Leaf, Union, evaluate

# --- examples: the semantics of finagle's doc/Names.rst ---------------------------------------------------------------


def tree(dtab, path="/s/users"):
    return follow(Dtab(dtab), Path.parse(path)).tree()


@pytest.mark.parametrize(
    ("dtab", "expected"),
    [
        ("", "~"),
        ("/s/users => h:1", "h:1"),
        ("/s => /srv ; /srv/users => h:1", "h:1"),
        ("/s/users => h:1 ; /s/users => h:2", "h:2 | h:1"),
        ("/s/users => h:1 ; /s => ~", "h:1"),
        ("/s/users => h:1 ; /s => !", "!"),
        ("/s/users => h:1 ; /s => $", "$"),
        ("/s/users => /a | /b ; /b => h:2", "h:2"),
        ("/s/users => 9 * /a & 1 * /b ; /a => h:1 ; /b => h:2", "9 * h:1 & h:2"),
        ("/s/users => 9 * /a & 1 * /b ; /b => h:2", "h:2"),
        ("/s/users => 9 * /a & 1 * /b", "~"),
        ("/s/users => ! & h:2", "h:2"),
        ("/s/users => ! | h:2", "!"),
        ("/s/* => h:1", "h:1"),
        ("/*/users => h:1", "h:1"),
        ("/s/users/more => h:1", "~"),
        ("/s => zk://z:2181/services", "zk://z:2181/services/users"),
        ("/s => zk://z:2181/services!admin", "zk://z:2181/services/users!admin"),
        ("/s => k8s://shop ; ", "k8s://shop/users"),
        ("/s => /$/inet/10.0.0.1/80 ; ", "10.0.0.1:80/users"),
        ("/s/users => /$/inet/8080", "127.0.0.1:8080"),
        ("/s/users => /$/nil", "$"),
        ("/s/users => /$/fail | h:1", "!"),
        ("/s/users => /$/unheard.of | h:1", "h:1"),
        ("/$/inet => ! ; /s/users => /$/inet/10.0.0.1/80", "!"),
    ],
)
def test_the_rules_by_example(dtab, expected):
    assert str(tree(dtab)) == expected


def test_what_a_target_has_no_place_for_is_kept_beside_it():
    assert tree("/s => h:1", "/s/users/x") == Leaf(Residual(Target.parse("h:1"), Path.parse("/users/x")))


@pytest.mark.parametrize(
    "path", ["/$", "/$/inet", "/$/inet/h", "/$/inet/h/port", "/$/inet/h/99999999", "/$/inet/99999", "/x/inet/80"]
)
def test_what_is_no_name_of_the_system_is_no_name(path):
    assert system_name(Path.parse(path)) == NEG


# --- names without end ------------------------------------------------------------------------------------------------


def test_a_name_that_leads_back_to_itself_is_told_with_its_chain():
    found = tree("/s => /a ; /a => /b ; /b => /a")
    assert isinstance(found, Leaf)
    assert isinstance(found.value, Endless)
    assert "/s/users -> /a/users -> /b/users -> /a/users" in found.value.problem
    assert str(DEEPEST) in found.value.problem


@pytest.mark.parametrize("steps", [1, 50, DEEPEST])
def test_a_chain_as_long_as_is_allowed_is_followed(steps):
    chain = " ; ".join(f"/n{i} => /n{i + 1}" for i in range(steps))
    assert str(tree(f"{chain} ; /n{steps} => h:1", "/n0")) == "h:1"


def test_a_chain_longer_than_is_allowed_is_not():
    chain = " ; ".join(f"/n{i} => /n{i + 1}" for i in range(DEEPEST + 1))
    assert isinstance(tree(f"{chain} ; /n{DEEPEST + 1} => h:1", "/n0").value, Endless)


def test_a_name_that_doubles_with_each_step_ends_soon():
    doubling = " ; ".join(f"/n{i} => /n{i + 1} & /n{i + 1} | /n{i + 1}" for i in range(60))
    found = follow(Dtab(doubling), Path.parse("/n0"))  # 3 ** 60 names, which the test's timeout would not outlast
    assert len(found.targets()) == 0
    assert "more than" in str(found)


@pytest.mark.parametrize(
    ("dtab", "problem"),
    [
        (f"/n0 => /n0{'/x' * 20}", f"a path of more than {LONGEST} labels"),
        (f"/n0 => {'(~ | ' * 90}/n0{')' * 90}", f"more than {NESTED} trees within each other"),
        ("/n0 => /n0 ; " * 3000, f"more than {LOOKED} entries looked at"),
        (f"/n0 => {' & '.join(['/n1'] * 50)} ; /n1 => {' & '.join(['h:1'] * 50)}", f"more than {MOST} names"),
    ],
)
def test_what_a_stranger_may_send_is_bounded(dtab, problem):
    assert problem in str(follow(Dtab(dtab), Path.parse("/n0")).tree())


def test_an_endless_fallback_does_no_harm_to_what_is_before_it():
    found = tree("/s/users => h:1 | /loop ; /loop => /loop")
    assert isinstance(found, Alt)
    assert str(found.trees[0]) == "h:1"


# --- a model ----------------------------------------------------------------------------------------------------------

LABELS = "abcd"


@st.composite
def entries(draw):
    """Entries that lead to later letters only, so that every name ends."""
    first = draw(st.integers(0, 2))
    prefix = "/" + LABELS[first] + draw(st.sampled_from(["", "/x", "/y", "/*"]))
    leaf = st.one_of(
        st.builds(lambda n, rest: f"/{LABELS[n]}{rest}", st.integers(first + 1, 3), st.sampled_from(["", "/x", "/y"])),
        st.sampled_from(["~", "!", "$", "h:1", "h:2", "zk://z/p", "zk://z/p!e"]),
    )
    inner = st.recursive(
        leaf,
        lambda more: st.one_of(
            st.lists(more, min_size=2, max_size=3).map(lambda parts: f"({' | '.join(parts)})"),
            st.lists(st.tuples(st.sampled_from(["", "2 * ", "0.5 * "]), more), min_size=2, max_size=3).map(
                lambda parts: f"({' & '.join(w + t for w, t in parts)})"
            ),
        ),
        max_leaves=4,
    )
    return f"{prefix} => {draw(inner)}"


def naive(dtab, path):
    """What a path comes to: ``"~"``, ``"!"`` or the set of its targets, by the definitions and nothing else."""
    for entry in reversed(dtab.entries):
        prefix = entry.prefix.elements
        if len(prefix) <= len(path) and all(p is None or p == q for p, q in zip(prefix, path, strict=False)):
            found = naive_tree(dtab, entry.tree, path[len(prefix) :])
            if found != "~":
                return found
    return "~"


def naive_tree(dtab, tree, rest):
    if isinstance(tree, Alt):
        return next((f for f in (naive_tree(dtab, t, rest) for t in tree.trees) if f != "~"), "~")
    if isinstance(tree, Union):
        found = [naive_tree(dtab, each.tree, rest) for each in tree.weighted]
        sets = [f for f in found if f not in ("~", "!")]
        return set().union(*sets) if sets else "~"
    if isinstance(tree, Constant):
        return set() if tree == EMPTY else tree.symbol
    if isinstance(tree.value, Path):
        return naive(dtab, tree.value.labels + rest)
    text = tree.value.text
    if text.startswith("zk://") and rest:
        path, mark, endpoint = text.partition("!")
        return {"/".join([path, *(label.decode() for label in rest)]) + mark + endpoint}
    return {"/".join([text, *(label.decode() for label in rest)])}


@given(st.lists(entries(), max_size=8), st.sampled_from(["/a", "/a/x", "/a/y/z", "/b/x", "/c/x/x/x", "/d"]))
def test_it_agrees_with_the_model(texts, path):
    dtab = Dtab(" ; ".join(texts))
    expected = naive(dtab, Path.parse(path).labels)
    found = follow(dtab, Path.parse(path)).tree()
    values = evaluate(found)
    if expected in ("~", "!"):
        assert values is None
        assert found == (FAIL if expected == "!" else NEG)
    else:
        assert {str(value) for value in values} == expected


@settings(max_examples=40)
@given(st.lists(entries(), max_size=8))
def test_every_delegation_prints_and_names_what_it_comes_to(texts):
    found = follow(Dtab(" ; ".join(texts)), Path.parse("/a/x"))
    told = str(found)
    for target in found.targets():
        assert target.text in told
