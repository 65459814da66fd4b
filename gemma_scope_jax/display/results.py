"""The base class of analysis results: conversion to a DataFrame, and saving to files."""

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
    """A result of an analysis. Every result has records; most have `figure`, some `write_html` or `write_json`."""

    @abc.abstractmethod
    def records(self) -> Iterator[dict[str, object]]:
        """Yields the result as rows of numbers and text, all with the same keys."""

    def to_dataframe(self) -> "pandas.DataFrame":
        """The records as a pandas DataFrame.

        Raises:
          ValueError: if pandas is not installed.
        """
        with extras.needed():
            import pandas

        return pandas.DataFrame(self.records())

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes a file; its ending chooses the records (.csv), figure (.png), page (.html) or full result (.json).

        Returns:
          The path.

        Raises:
          ValueError: if this result has no file with this ending.
        """
        path = files.expanded(path)
        # By ending: the method that the result must have, and the function that writes the file.
        writers = {
            ".csv": ("records", lambda: files.write_csv(path, self.records())),
            ".png": ("figure", lambda: plotting.write_png(path, self.figure())),
            ".html": ("write_html", lambda: self.write_html(path)),
            ".json": ("write_json", lambda: self.write_json(path)),
        }
        known = {ending: write for ending, (needed, write) in writers.items() if hasattr(self, needed)}
        if path.suffix not in known:
            raise InputError(
                f"{path} has an unknown ending; {type(self).__name__} can be saved as {', '.join(known)}"
            )
        known[path.suffix]()
        return path


def records_of(columns: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Records of columns of equal length, as Python numbers; any value but an array or list repeats in each row."""
    columns = {
        name: column.tolist() if isinstance(column, np.ndarray) else column
        for name, column in columns.items()
    }
    length = next(len(column) for column in columns.values() if isinstance(column, list))
    filled = [column if isinstance(column, list) else [column] * length for column in columns.values()]
    for values in zip(*filled, strict=True):
        yield dict(zip(columns, values, strict=True))
