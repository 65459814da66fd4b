"""Tables and text in the terminal; names are shown as plain text, without markup or terminal commands."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import rich.box
import rich.cells
import rich.console
import rich.table
import rich.text

from gemma_scope_jax.runtime.printing import lines, printable

_GAP = 2  # Spaces between two columns.
_NARROWEST = 18  # A column of text is not made narrower than this, in characters.
_LONGEST_WORD = 20  # A longer word of a number's heading is broken, in characters.
_END = r"(?<=[\s_/])(?=[^\s_/])"  # Where a line can end.

Cell = str | rich.text.Text


class _Column(NamedTuple):
    heading: str
    is_number: bool


class Table:
    """A table that `show` lays out for the width of the terminal.

    Numbers are never broken. Text and headings that do not fit are continued on the next line, after a space, `_` or
    `/`. If the columns still do not fit, the rest of them follow in a second table. Strings are made `printable`;
    `rich.text.Text` is printed as it is.
    """

    def __init__(self, *headings: str, title: str = "", keys: int = 1) -> None:
        """Starts a table with columns of text.

        Args:
          *headings: the headings of its first columns, of text.
          title: a line above the table.
          keys: the number of columns, from the left, that are repeated if the table is continued in a second one.
        """
        self.title, self.keys = title, keys
        self._columns: list[_Column] = []
        self._rows: list[tuple[Cell, ...]] = []
        for heading in headings:
            self.add_column(heading)

    def add_column(self, heading: str = "", justify: str = "left") -> None:
        """Adds a column: of text if `justify` is `left`, of numbers if it is `right`."""
        self._columns.append(_Column(printable(heading), justify == "right"))

    def add_row(self, *cells: Cell) -> None:
        """Adds a row with a cell for each column."""
        self._rows.append(tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells))

    def parts(self, width: int) -> Iterator[rich.table.Table]:
        """Yields the table, or several tables if it does not fit in `width` characters."""
        wanted, needed = [], []
        for c, column in enumerate(self._columns):
            widest = max((_width(row[c]) for row in self._rows), default=0)
            wanted.append(max(widest, _width(column.heading)))
            word = max(map(_width, re.split(_END, column.heading)))
            needed.append(
                max(widest, min(word, _LONGEST_WORD)) if column.is_number else min(wanted[-1], _NARROWEST)
            )
        for group in _groups(needed, self.keys, width):
            yield self._laid_out(
                group, _shares([wanted[c] for c in group], [needed[c] for c in group], width)
            )

    def _laid_out(self, group: Sequence[int], widths: Sequence[int]) -> rich.table.Table:
        """Some of the columns, with these widths."""
        made = rich.table.Table(
            box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
        )
        for c, width in zip(group, widths, strict=True):
            made.add_column(
                _folded(self._columns[c].heading, width),
                justify="right" if self._columns[c].is_number else "left",
                width=width,
                overflow="fold",
            )
        for row in self._rows:
            made.add_row(*(_folded(row[c], width) for c, width in zip(group, widths, strict=True)))
        return made


def _width(cell: Cell) -> int:
    return rich.cells.cell_len(cell if isinstance(cell, str) else cell.plain)


def fold(text: str, width: int) -> list[str]:
    """The lines of a text, of at most `width` characters: they end after a space, `_` or `/` if there is one."""
    found = [""]
    for part in re.split(_END, text):
        if _width((found[-1] + part).rstrip()) > width and found[-1]:
            found.append("")
        found[-1] += part
        while _width(found[-1].rstrip()) > width:
            cut = rich.cells.set_cell_size(found[-1], width).rstrip()
            found[-1:] = [cut, found[-1][len(cut) :]]
    return [line.rstrip() for line in found if line.strip()]


def _folded(cell: Cell, width: int) -> rich.text.Text:
    return rich.text.Text("\n".join(fold(cell, width))) if isinstance(cell, str) else cell


def _groups(needed: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The columns of each table that is printed: the first `keys`, and as many others as fit."""
    first, groups = list(range(min(keys, len(needed)))), []
    taken = sum(needed[c] + _GAP for c in first) - _GAP
    used = width
    for c in range(len(first), len(needed)):
        if used + _GAP + needed[c] > width:
            groups.append(list(first))
            used = taken
        groups[-1].append(c)
        used += _GAP + needed[c]
    return groups or [first]


def _shares(wanted: Sequence[int], needed: Sequence[int], width: int) -> list[int]:
    """The widths of columns: those wanted, of which the widest are made narrower until all fit."""
    found = list(wanted)
    room = width - _GAP * (len(found) - 1)
    while sum(found) > room and any(f > n for f, n in zip(found, needed, strict=True)):
        spare = [(f if f > n else 0) for f, n in zip(found, needed, strict=True)]
        found[spare.index(max(spare))] -= 1
    return found


def show(what: str | Table | rich.table.Table, style: str = "") -> None:
    """Prints a table and an empty line, or text with its line breaks.

    Args:
      what: the table or text.
      style: the style of the text, as in `rich`; tables ignore it.
    """
    console = rich.console.Console()
    if isinstance(what, str):
        console.print(rich.text.Text(lines(what), style))
        return
    if isinstance(what, Table):
        if what.title:
            console.print(rich.text.Text(printable(what.title), "italic"))
        for part in what.parts(console.width):
            console.print(part)
            console.print()
        return
    console.print(what)
