"""What pages made from rows share: tables in Markdown, and where a page holds them.

A table of a page stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where `fill` replaces it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(table(("attack", "ASR"), [("badnets", "0.5")]))
    | attack | ASR |
    | --- | --- |
    | badnets | 0.5 |
    """
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ("---",) * len(header), *lines])


def percent(value: float | None) -> str:
    """A share in percent.

    >>> percent(0.1234), percent(-0.0001), percent(None)
    ('12.3', '0.0', '-')
    """
    return "-" if value is None else f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0")


def fill(text: str, tables: Mapping[str, str]) -> str:
    r"""A page with its tables.

    >>> fill("<!-- table: rates -->\nold\n<!-- end -->\n", {"rates": "new"})
    '<!-- table: rates -->\nnew\n<!-- end -->\n'
    """
    for name, content in tables.items():
        mark = f"<!-- table: {name} -->"
        assert mark in text, f"the page has no {mark}"
        before, _, rest = text.partition(mark)
        text = f"{before}{mark}\n{content}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text
