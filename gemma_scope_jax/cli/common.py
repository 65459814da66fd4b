"""Parts of all commands: running one, errors in one line, checks of output paths, and the TPU compiler."""

import errno
import logging
import os
import pathlib
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from gemma_scope_jax.runtime import extras, reporting, signals
from gemma_scope_jax.runtime.errors import UserError
from gemma_scope_jax.runtime.printing import Unfailing, printable

# The gemma package imports TensorFlow, which otherwise starts every run with its own notices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

_LONGEST_MESSAGE = 480  # Characters of an error message, which is one line.
_TPU_COMPILER = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"


def say(text: str) -> None:
    """Prints a line, with unprintable characters of names and paths escaped."""
    print(printable(text, 2000), flush=True)


def suggest(*commands: Sequence[str | pathlib.Path], program: str = "gemma-scope") -> None:
    """Prints in one line the commands that are likely to be wanted next, each given by its words."""
    say(f"Next: {', or '.join(f'{program} {shlex.join(map(str, words))}' for words in commands)}")


def find_tpu_compiler() -> None:
    """Makes JAX find the TPU compiler on a machine without a TPU; call it before JAX is imported."""
    # The library only compiles here, so several processes can load it at once.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    # Otherwise libtpu prints that it cannot find these bounds. The topology that is compiled for does not use them.
    os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")
    if _TPU_COMPILER.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(_TPU_COMPILER))


def run(main: Callable[[], None], why: str = "") -> None:
    """Calls `main`; an error that the user can fix is printed in one line, any other with its traceback.

    Args:
      main: the command.
      why: text added to the message when a signal ends the command at once; see `signals.leaving`.
    """
    _keep_speaking()
    signals.answer(why)
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every file.
    threading.excepthook = _threads_error
    sys.unraisablehook = _unraisable_error
    logging.getLogger("absl").addFilter(
        lambda record: not _is_full_disk(f"{record.exc_info} {record.getMessage()}")
    )
    try:
        with reporting.speaking(), extras.needed():
            main()
    except signals.Interrupted as error:
        if not _is_one_of_many() or sys.modules["jax"].process_index() == 0:
            print(f"\n{error}", file=sys.stderr, flush=True)
        # Not os._exit: at exit, the processes of several hosts wait for each other.
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        message = explain(error)
        if message is None and _is_one_of_many():
            message = traceback.format_exc()
        if message is None:
            raise
        print(f"\nError: {message}", file=sys.stderr, flush=True)
        # Not sys.exit: on a full disk, each open writer would add its own traceback. And with several processes, this
        # one would wait for the others, which wait for it.
        os._exit(1)


def _keep_speaking() -> None:
    """Makes failures to print harmless: the reader has gone, the disk is full, or the stream is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # Otherwise the next opened file would get this number, and all messages.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        # A name that the stream cannot encode must not end hours of work.
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Unfailing(stream))


def _threads_error(args: threading.ExceptHookArgs) -> None:
    """Hides full-disk errors of threads that write: the main thread then fails too, and reports the error."""
    if not _is_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _unraisable_error(args: "sys.UnraisableHookArgs") -> None:
    """Hides errors of the tasks that Orbax leaves on a closed event loop if it cannot read or write an array."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def _is_one_of_many() -> bool:
    jax = sys.modules.get("jax")  # If JAX is not imported, there is one process.
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def check_outputs(file: pathlib.Path | None = None, **places: pathlib.Path | None) -> None:
    """Checks, before any work is done, that the outputs of a command can be written.

    Args:
      file: the file to write.
      **places: further outputs by the names of their options; `html` and `png` are files, all others are folders.

    Raises:
      ValueError: if one cannot be written.
    """
    wanted = {"file": file, **places}
    if any(wanted.values()):
        from gemma_scope_jax.runtime import files  # Slow to import.

        for name, place in wanted.items():
            if place is not None:
                files.check_output(place, is_folder=name not in ("file", "html", "png"))


def is_run(path: str | pathlib.Path) -> bool:
    """Whether a path is a run directory on this machine."""
    from gemma_scope_jax.runtime import files
    from gemma_scope_jax.saes import loading

    return not str(path).startswith("hf://") and loading.is_run(files.expanded(path))


def refresh(path: str | pathlib.Path) -> None:
    """Exports the SAEs of a run's newest checkpoint into the run directory, if the path is a run."""
    if is_run(path):
        from gemma_scope_jax.runtime import files
        from gemma_scope_jax.training import export

        export.refresh(files.expanded(path))


def _is_full_disk(error: object) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)


def explain(error: BaseException) -> str | None:
    """The one-line message of an error that the user can fix; None for a defect of the program."""
    text = printable(" ".join(str(error).split()), _LONGEST_MESSAGE)
    if _is_full_disk(error):
        return f"the disk is full; the last complete checkpoint is intact. Free space and run again ({text[:150]})"
    if isinstance(error, OSError):
        named = [name for name in (error.filename, error.filename2) if name is not None]
        return printable(": ".join(map(str, [*named, error.strerror or text])), _LONGEST_MESSAGE)
    return text if isinstance(error, UserError) else None
