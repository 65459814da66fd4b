"""What the commands share: arguments and their checks, configs by flags, errors in one line, the TPU's compiler."""

import errno
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from gemma_scope_jax.runtime import extras, reporting, signals
from gemma_scope_jax.runtime.errors import UserError
from gemma_scope_jax.runtime.printing import Unfailing, printable

# Gemma's package imports TensorFlow, which else opens every run with its own notices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

_LONGEST_MESSAGE = 480  # Of an error, which is one line.
_TPU_COMPILER = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"


def say(text: str) -> None:
    """Prints a line in which names and paths stand."""
    print(printable(text, 2000), flush=True)


def find_tpu_compiler() -> None:
    """Makes JAX find the TPU's compiler on a machine without a TPU; to be called before JAX is imported."""
    # It is there to compile and not to run, and two processes may do so at once.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    if _TPU_COMPILER.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(_TPU_COMPILER))


def run(main: Callable[[], None], why: str = "") -> None:
    """Calls `main`; what a user can mend is said in one line, everything else keeps its traceback.

    Args:
      main: the command.
      why: what to add when a signal ends it at once; see `signals.leaving`.
    """
    _keep_speaking()
    signals.answer(why)
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells of every file.
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
        sys.exit(128 + error.number)  # In good order: of many hosts each waits for the others.
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
        # Not sys.exit: on a full disk, each writer that is still open would have its own traceback to add, and one of
        # many processes would wait for the others, who wait for this one.
        os._exit(1)


def _keep_speaking() -> None:
    """A reader that is gone, a full disk and a closed stream cost words and nothing else."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # The next file opened would get this number, and every library's messages.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(
            errors="backslashreplace"
        )  # A name that it cannot encode must not end hours of work.
        setattr(sys, name, Unfailing(stream))


def _threads_error(args: threading.ExceptHookArgs) -> None:
    """A writer's thread finds the disk full before the program does, which then says so."""
    if not _is_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _unraisable_error(args: "sys.UnraisableHookArgs") -> None:
    """Orbax leaves tasks behind on a closed event loop where it could not write or read an array."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def _is_one_of_many() -> bool:
    jax = sys.modules.get("jax")  # Not imported for this: without it there are no others.
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def check_outputs(file: pathlib.Path | None = None, **places: pathlib.Path | None) -> None:
    """Finds out before any work whether what a command is to write can be written.

    Args:
      file: that is written.
      **places: by the names of their options: `html` and `png` are files, all others folders.

    Raises:
      ValueError: it cannot.
    """
    wanted = {"file": file, **places}
    if any(wanted.values()):
        from gemma_scope_jax.runtime import files  # Slow to import.

        for name, place in wanted.items():
            if place is not None:
                files.check_output(place, is_folder=name not in ("file", "html", "png"))


def refresh(path: str | pathlib.Path) -> None:
    """Has a run's folder of SAEs hold those of its newest checkpoint, where a path is a run's."""
    from gemma_scope_jax.runtime import files
    from gemma_scope_jax.saes import loading

    if not str(path).startswith("hf://") and loading.is_run(place := files.expanded(path)):
        from gemma_scope_jax.training import export

        export.refresh(place)


def _is_full_disk(error: object) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a defect of the program."""
    text = printable(" ".join(str(error).split()), _LONGEST_MESSAGE)
    if _is_full_disk(error):
        return f"the disk is full; the last whole checkpoint is untouched. Free space and run again ({text[:150]})"
    if isinstance(error, OSError):
        named = [name for name in (error.filename, error.filename2) if name is not None]
        return printable(": ".join(map(str, [*named, error.strerror or text])), _LONGEST_MESSAGE)
    return text if isinstance(error, UserError) else None
