"""Tables and numbers as plain ASCII text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table of strings; the columns named in `left` are aligned left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str]


def layout(table: Table) -> str:
    """The lines of a table: title, header, rule, rows."""
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [table.title]
    for cells in lines:
        aligned = [
            cell.ljust(width) if name in table.left else cell.rjust(width)
            for cell, width, name in zip(cells, widths, table.header, strict=True)
        ]
        text.append("  ".join(aligned).rstrip())
    text.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters; the middle is left out, because names differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[-tail:]


def number_range(values: Sequence[float]) -> str:
    """The least and the greatest value, "0.5..2", or the one value when both print alike."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def percent(part: int, whole: int) -> str:
    """`part` as a percentage of `whole`, with one decimal."""
    return f"{100 * part / max(1, whole):.1f} %"
