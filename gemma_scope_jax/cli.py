"""What the scripts share: errors in one line."""

import errno
import os
import sys
from collections.abc import Callable

# Gemma's package imports TensorFlow, which else opens every run with its own notices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def run(main: Callable[[], None]) -> None:
    """Calls `main`; what a user can mend is said in one line, everything else keeps its traceback."""
    try:
        main()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"Error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for a defect of the program."""
    text = " ".join(str(error).split())
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in text:
        return f"the disk is full; the last whole checkpoint is untouched. Free space and run again ({text[:200]})"
    if type(error) in (ValueError, FloatingPointError):
        return text
    return None
