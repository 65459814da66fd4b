"""What the scripts share: errors in one line."""

import errno
import logging
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable

# Gemma's package imports TensorFlow, which else opens every run with its own notices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def run(main: Callable[[], None]) -> None:
    """Calls `main`; what a user can mend is said in one line, everything else keeps its traceback."""
    threading.excepthook = _threads_error
    sys.unraisablehook = _unraisable_error
    logging.getLogger("absl").addFilter(
        lambda record: not _is_full_disk(f"{record.exc_info} {record.getMessage()}")
    )
    try:
        main()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"\nError: {message}", file=sys.stderr, flush=True)
        # Not sys.exit: on a full disk, each writer that is still open would have its own traceback to add.
        os._exit(1)


def _threads_error(args: threading.ExceptHookArgs) -> None:
    """A writer's thread finds the disk full before the program does, which then says so."""
    if not _is_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _unraisable_error(args: "sys.UnraisableHookArgs") -> None:
    """Orbax leaves tasks behind on a closed event loop where it could not write or read an array."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def _is_full_disk(error: object) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for a defect of the program."""
    text = " ".join(str(error).split())
    if _is_full_disk(error):
        return f"the disk is full; the last whole checkpoint is untouched. Free space and run again ({text[:150]})"
    return text if isinstance(error, (ValueError, FloatingPointError)) and _raised_by_us(error) else None


def _raised_by_us(error: Exception) -> bool:
    """Whether this package or the script raised it; a library's ValueError is as likely a defect as a mistake."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    package = pathlib.Path(__file__).parent
    raised_in = pathlib.Path(frames[-1].filename)
    return package in raised_in.parents or raised_in.parent == package.parent
