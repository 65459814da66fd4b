"""Tables and text in the terminal; names are shown as plain text, without markup or terminal commands."""

from collections.abc import Iterable

import rich.console
import rich.table
import rich.text

from gemma_scope_jax.runtime.printing import lines, printable


class Table(rich.table.Table):
    """A table that makes strings in its title, headings and cells `printable`."""

    def __init__(self, *headings: str, title: str | rich.text.Text = "", **options: object) -> None:
        super().__init__(*headings, title=_text(title) if title else None, **options)

    def add_column(self, header: str = "", **options: object) -> None:
        """Adds a column with a printable header; options as in `rich.table.Table`."""
        super().add_column(_text(header), **options)

    def add_row(self, *cells: str | rich.text.Text) -> None:
        """Adds a row of printable cells."""
        super().add_row(*map(_text, cells))


def _text(cell: str | rich.text.Text) -> rich.text.Text:
    return rich.text.Text(printable(cell)) if isinstance(cell, str) else cell


def width(names: Iterable[str]) -> int:
    """The width of a column of names, in characters."""
    return max((len(printable(name)) for name in names), default=0)


def show(what: str | rich.table.Table, style: str = "", least_width: int = 0) -> None:
    """Prints a table, or text with its line breaks.

    Args:
      what: the table or text.
      style: the style of the text, as in `rich`; tables ignore it.
      least_width: the minimum width to lay out for; in a narrower terminal a row wraps over several lines.
    """
    console = rich.console.Console()
    console.width = max(console.width, least_width)
    console.print(rich.text.Text(lines(what), style) if isinstance(what, str) else what)
