"""For how long a server asks to be left alone: bounded once, for every protocol."""

import math

import pytest

from meshlib import Rejected
from meshlib.core.pushback import LONGEST_WAIT, NEVER, pushback


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (None, None),
        (math.nan, None),
        (0, 0.0),
        (0.25, 0.25),
        (LONGEST_WAIT + 1, LONGEST_WAIT),
        (1e30, LONGEST_WAIT),
        (10**400, LONGEST_WAIT),
        (math.inf, LONGEST_WAIT),
        (-5.0, NEVER),
        (-math.inf, NEVER),
    ],
)
def test_it_is_a_bounded_time_or_never_or_nothing(asked, told):
    error = Rejected("full")
    error.retry_after = asked
    assert pushback(error) == told
