"""What a result of an analysis can do, whatever was analysed: become a DataFrame, or a file."""

import abc
import pathlib
import typing
from collections.abc import Iterator, Mapping

import numpy as np

from gemma_scope_jax.display import plotting
from gemma_scope_jax.runtime import extras, files
from gemma_scope_jax.runtime.errors import InputError

if typing.TYPE_CHECKING:
    import pandas


class Result(abc.ABC):
    """What was found. It has records; most have a `figure`, some a `write_html` or a `write_json`."""

    @abc.abstractmethod
    def records(self) -> Iterator[dict[str, object]]:
        """What was found in rows, all with the same keys: numbers and text."""

    def to_dataframe(self) -> "pandas.DataFrame":
        """The records as a table of pandas.

        Raises:
          ValueError: pandas is not installed.
        """
        with extras.needed():
            import pandas

        return pandas.DataFrame(self.records())

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes, by the ending of the path, the records (.csv), the figure (.png), a page (.html) or all (.json).

        Returns:
          The path.

        Raises:
          ValueError: this result has no file with such an ending.
        """
        path = files.expanded(path)
        # By ending: what must be there to write it, and what writes it.
        writers = {
            ".csv": ("records", lambda: files.write_csv(path, self.records())),
            ".png": ("figure", lambda: plotting.write_png(path, self.figure())),
            ".html": ("write_html", lambda: self.write_html(path)),
            ".json": ("write_json", lambda: self.write_json(path)),
        }
        known = {ending: write for ending, (needed, write) in writers.items() if hasattr(self, needed)}
        if path.suffix not in known:
            raise InputError(
                f"{path} ends in none of {', '.join(known)}, which {type(self).__name__} is saved as"
            )
        known[path.suffix]()
        return path


def records_of(columns: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Records of columns of one length, in Python's own numbers; what is no array or list is the same in each row."""
    columns = {
        name: column.tolist() if isinstance(column, np.ndarray) else column
        for name, column in columns.items()
    }
    length = next(len(column) for column in columns.values() if isinstance(column, list))
    filled = [column if isinstance(column, list) else [column] * length for column in columns.values()]
    for values in zip(*filled, strict=True):
        yield dict(zip(columns, values, strict=True))
