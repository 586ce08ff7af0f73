"""Keeps the tables in a hand-written page those of the last run.

A table stands between ``<!-- results: name -->`` and ``<!-- end -->``; what is between them is replaced.
"""

import re

_SLOT = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table that is known in its place; the others stay as they are."""

    def fill(slot: re.Match[str]) -> str:
        table = tables.get(slot[2])
        return slot[0] if table is None else f"{slot[1]}\n{table}\n\n{slot[3]}"

    return _SLOT.sub(fill, page)
