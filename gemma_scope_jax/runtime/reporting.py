"""What the library says of its work: messages to the logger `gemma_scope_jax`, and progress bars.

By itself a library call is silent. The command line shows both; in Python `logging` shows the messages, and
`showing_progress` the bars.
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
_LONGEST = 2000  # Characters of a message, in which names and paths of others may stand.

_shows_progress: contextvars.ContextVar[bool] = contextvars.ContextVar("shows_progress", default=False)


def say(text: str) -> None:
    """Tells of something in one line."""
    LOGGER.info("%s", printing.printable(text, _LONGEST))


def warn(text: str) -> None:
    """Tells of something that may be wrong."""
    LOGGER.warning("%s", printing.printable(text, _LONGEST))


@contextlib.contextmanager
def showing_progress(shows: bool = True) -> Iterator[None]:
    """Shows bars of what is done within it, on standard error; `False` leaves it as it is."""
    token = _shows_progress.set(shows or _shows_progress.get())
    try:
        yield
    finally:
        _shows_progress.reset(token)


def bar(what: str, unit: str, total: int | None = None, initial: int = 0, speaks: bool = True) -> tqdm.tqdm:
    """A bar of what is done, shown if that is asked for and this process is one that `speaks`."""
    return tqdm.tqdm(
        desc=what or None,
        unit=unit,
        total=total,
        initial=initial,
        smoothing=0.1,
        dynamic_ncols=True,
        file=printing.unfailing(sys.stderr),  # A reader that is gone must not cost what was done.
        disable=not (speaks and _shows_progress.get()),
    )


class _ToStdout(logging.Handler):
    """Prints each message as it is, to what standard output is then."""

    def emit(self, record: logging.LogRecord) -> None:
        # Past the bar, which else would be in the middle of the line.
        with tqdm.tqdm.external_write_mode(file=sys.stdout):
            mark = "Warning: " if record.levelno >= logging.WARNING else ""
            print(mark + record.getMessage(), file=sys.stdout, flush=True)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Prints all messages and shows all bars within it, as the command line does."""
    handler, level, propagates = _ToStdout(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # Other packages give the root logger handlers, which would say all of it again.
    try:
        with showing_progress():
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates
