from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlib.mux.messages import MAX_TAG, MIN_TAG
from meshlib.mux.tags import TagPool


def test_requests_begin_at_tag_2_because_0_and_1_are_taken() -> None:
    assert (MIN_TAG, MAX_TAG) == (2, 2**23 - 1)
    assert TagPool().acquire() == 2


@given(st.lists(st.integers(0, 20)), st.integers(2, 12))
def test_the_lowest_free_tag_is_lent_next(steps: list[int], last: int) -> None:
    """Checked against a set: each step takes a tag, or gives back one of those that are lent."""
    pool = TagPool(last)
    lent: set[int] = set()
    for step in steps:
        if step % 2 or not lent:
            tag = pool.acquire()
            free = set(range(MIN_TAG, last + 1)) - lent
            assert tag == min(free, default=None)
            if tag is not None:
                lent.add(tag)
        else:
            tag = sorted(lent)[step % len(lent)]
            lent.remove(tag)
            pool.release(tag)
        assert pool.in_use == len(lent)


def test_a_pool_that_is_used_up_recovers() -> None:
    pool = TagPool(4)
    assert [pool.acquire() for _ in range(5)] == [2, 3, 4, None, None]
    pool.release(3)
    assert pool.acquire() == 3
    assert pool.acquire() is None
