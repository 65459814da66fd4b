"""Tables and text in the terminal, where names of others are text: no markup, no commands to the terminal."""

from collections.abc import Iterable

import rich.console
import rich.table
import rich.text

from gemma_scope_jax.runtime.printing import lines, printable


class Table(rich.table.Table):
    """A table whose titles, headings and cells, where they are strings, are `printable`."""

    def __init__(self, *headings: str, title: str | rich.text.Text = "", **options: object) -> None:
        super().__init__(*headings, title=_text(title) if title else None, **options)

    def add_column(self, header: str = "", **options: object) -> None:
        """Adds a column; see `rich.table.Table`."""
        super().add_column(_text(header), **options)

    def add_row(self, *cells: str | rich.text.Text) -> None:
        """Adds a row; see `rich.table.Table`."""
        super().add_row(*map(_text, cells))


def _text(cell: str | rich.text.Text) -> rich.text.Text:
    return rich.text.Text(printable(cell)) if isinstance(cell, str) else cell


def width(names: Iterable[str]) -> int:
    """Of a column of names."""
    return max((len(printable(name)) for name in names), default=0)


def show(what: str | rich.table.Table, style: str = "", least_width: int = 0) -> None:
    """Prints a table, or text in its lines.

    Args:
      what: to print.
      style: of text.
      least_width: of the terminal; in a narrower one a row takes several lines.
    """
    console = rich.console.Console()
    console.width = max(console.width, least_width)
    console.print(rich.text.Text(lines(what), style) if isinstance(what, str) else what)
