"""Output of the library: messages to the logger `gemma_scope_jax`, and progress bars.

By default a library call is silent. The command line shows both. In Python, `logging` shows the messages and
`showing_progress` shows the bars.
"""

import contextlib
import contextvars
import logging
import sys
from collections.abc import Iterator

import tqdm

from gemma_scope_jax.runtime import printing

LOGGER = logging.getLogger("gemma_scope_jax")
LOGGER.addHandler(logging.NullHandler())
_COMPILING = "compiling"
_LONGEST = 2000  # The most characters of a message, which may contain untrusted names and paths.

_shows_progress: contextvars.ContextVar[bool] = contextvars.ContextVar("shows_progress", default=False)


def say(text: str) -> None:
    """Logs a message, in one line."""
    LOGGER.info("%s", printing.printable(text, _LONGEST))


def warn(text: str) -> None:
    """Logs a warning, in one line."""
    LOGGER.warning("%s", printing.printable(text, _LONGEST))


@contextlib.contextmanager
def showing_progress(shows: bool = True) -> Iterator[None]:
    """Shows progress bars within it, on standard error; `False` changes nothing."""
    token = _shows_progress.set(shows or _shows_progress.get())
    try:
        yield
    finally:
        _shows_progress.reset(token)


class _Bar(tqdm.tqdm):
    """A progress bar that says during its first updates that functions are compiled."""

    compiling_until = 0  # the count

    def update(self, n: float = 1) -> bool | None:
        if not self.disable and self.postfix == _COMPILING and self.n + n >= self.compiling_until:
            self.set_postfix_str("", refresh=False)
        return super().update(n)


def bar(
    what: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    speaks: bool = True,
    compiles: int = 0,
) -> tqdm.tqdm:
    """A progress bar, shown within `showing_progress` if this process `speaks`.

    Args:
      what: the label.
      unit: what is counted.
      total: the count at the end; None if it is not known.
      initial: the count at the start.
      speaks: whether this process shows the bar.
      compiles: the count, from the start, for which functions are compiled, which can take minutes; the bar says so.
    """
    made = _Bar(
        desc=what or None,
        unit=unit,
        total=total,
        initial=initial,
        smoothing=0.1,
        dynamic_ncols=True,
        file=printing.unfailing(sys.stderr),  # A closed reader must not end the work.
        disable=not (speaks and _shows_progress.get()),
        postfix=_COMPILING if compiles else None,
    )
    made.compiling_until = initial + compiles
    return made


class _ToStdout(logging.Handler):
    """Prints each message unchanged, to the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        # Clears the progress bar, which would otherwise be in the middle of the line.
        with tqdm.tqdm.external_write_mode(file=sys.stdout):
            mark = "Warning: " if record.levelno >= logging.WARNING else ""
            print(mark + record.getMessage(), file=sys.stdout, flush=True)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Prints all messages and shows all bars within it, as the command line does."""
    handler, level, propagates = _ToStdout(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = (
        False  # Other packages add handlers to the root logger, which would print each message again.
    )
    try:
        with showing_progress():
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates
