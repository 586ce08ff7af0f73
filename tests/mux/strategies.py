"""Every message of the protocol, at random."""

from __future__ import annotations

from hypothesis import strategies as st

from meshlib.mux.messages import (
    MAX_TAG,
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tlease,
    Tping,
    Treq,
    Unknown,
)

tags = st.integers(0, MAX_TAG)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
blobs = st.binary(max_size=60)
bodies = st.one_of(st.binary(max_size=80), st.binary(min_size=200, max_size=700))
pairs = st.lists(st.tuples(blobs, blobs), max_size=6).map(tuple)
rules = st.lists(st.tuples(texts, texts), max_size=4).map(tuple)
statuses = st.sampled_from(ReplyStatus)
u64 = st.integers(0, 2**64 - 1)
versions = st.integers(-(2**15), 2**15 - 1)

KNOWN_CODES = {1, -1, 2, -2, 64, -64, 65, -65, 66, -66, 67, 68, -68, -128, 127, -62}

BY_TYPE: dict[type, st.SearchStrategy[Message]] = {
    Treq: st.builds(
        Treq, tags, trace=st.none() | st.tuples(u64, u64, u64), flags=st.none() | st.integers(0, 255), body=bodies
    ),
    Rreq: st.builds(Rreq, tags, status=statuses, body=bodies),
    Tdispatch: st.builds(Tdispatch, tags, contexts=pairs, dest=texts, dtab=rules, body=bodies),
    Rdispatch: st.builds(Rdispatch, tags, status=statuses, contexts=pairs, body=bodies),
    Tdrain: st.builds(Tdrain, tags),
    Rdrain: st.builds(Rdrain, tags),
    Tping: st.builds(Tping, tags),
    Rping: st.builds(Rping, tags),
    Tdiscarded: st.builds(Tdiscarded, tags, which=st.integers(0, 2**24 - 1), why=texts),
    Rdiscarded: st.builds(Rdiscarded, tags),
    Tlease: st.builds(Tlease, tags, unit=st.integers(0, 255), howmuch=u64),
    Tinit: st.builds(Tinit, tags, version=versions, headers=pairs),
    Rinit: st.builds(Rinit, tags, version=versions, headers=pairs),
    Rerr: st.builds(Rerr, tags, why=texts),
    Unknown: st.builds(
        Unknown, tags, code=st.integers(-128, 127).filter(lambda code: code not in KNOWN_CODES), body=bodies
    ),
}
"""A strategy for each type of message there is."""

messages = st.one_of(*BY_TYPE.values())
dispatches = st.one_of(BY_TYPE[Tdispatch], BY_TYPE[Rdispatch])
