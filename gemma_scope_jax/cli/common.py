"""What the commands share: arguments and their checks, configs by flags, errors in one line, the TPU's compiler."""

import argparse
import errno
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from gemma_scope_jax.cli import config_files
from gemma_scope_jax.runtime import reporting, signals
from gemma_scope_jax.runtime.errors import ConfigError, UserError
from gemma_scope_jax.runtime.printing import Unfailing, printable
from gemma_scope_jax.runtime.ranges import COUNT, Range, shown

# Gemma's package imports TensorFlow, which else opens every run with its own notices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

_LONGEST_MESSAGE = 480  # Of an error, which is one line.
_TPU_COMPILER = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"


def say(text: str) -> None:
    """Prints a line in which names and paths stand."""
    print(printable(text, 2000), flush=True)


class Parser(argparse.ArgumentParser):
    """A parser that says a mistake in one line, where argparse puts the whole usage before it."""

    def error(self, message: str) -> None:
        """Ends the program with a status of 2."""
        self.exit(2, f"{self.prog}: error: {printable(message, 400)}; --help lists what there is\n")


def number(allowed: Range, kind: type = int) -> Callable[[str], float]:
    """A `type` for arguments that are numbers of a range."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{printable(text, 40)} is not {what}") from error
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"it is {shown(value)}; it must be {allowed}")
        return value

    return read


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
        with reporting.speaking():
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


def path(text: str) -> pathlib.Path:
    """An argument that is a path; a shell leaves the `~` of `--out=~/x` to be expanded."""
    return pathlib.Path(os.path.expanduser(text))


def check_outputs(args: argparse.Namespace) -> None:
    """Finds out before any work whether what a command is to write can be written.

    Raises:
      ValueError: it cannot.
    """
    given = {name: getattr(args, name, None) for name in ("out", "workdir", "html", "png")}
    for name, place in given.items():
        if place is not None:
            from gemma_scope_jax.runtime import files  # Slow to import.

            is_file = name in ("html", "png") or getattr(args, "command", "") == "generate"
            files.check_output(place, is_folder=not is_file)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The arguments that `opening.open_path` takes, where results go, and how many rows go at a time."""
    parser.add_argument(
        "path",
        help="a run directory; or a path or hf://OWNER/NAME/FOLDER of an SAE in any format, or of several with *",
    )
    add_overrides(parser)
    parser.add_argument("--rows_per_batch", type=number(COUNT), help="rows in one pass of the model")
    parser.add_argument(
        "--out",
        type=path,
        help="folder for the results (default: the path, for another text or model evaluations/… below it)",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What `opening.open_path` can be told of a path."""
    other = parser.add_argument_group("where it shall be another than the run or the file says")
    other.add_argument("--model", help="for example gemma2_2b-it")
    other.add_argument("--weights", help="Gemma's, as in config.weights")
    other.add_argument("--tokenizer", help="Gemma's, as in config.tokenizer")
    other.add_argument("--dtype", choices=("float32", "bfloat16"), help="Gemma's")
    files = parser.add_argument_group("of SAEs in files")
    files.add_argument("--site", help="what is read, if the file does not say it: layer_20_resid_post")
    files.add_argument("--target_site", help="likewise what a transcoder predicts: layer_20_mlp_out")
    files.add_argument(
        "--trust",
        action="store_true",
        default=None,
        help="use the text, weights and tokenizer that a file outside a run directory names, wherever they lie",
    )


def read_config(file: str, fields: list[str]) -> dict:
    """The config of a file, or of a name, with the fields set by `--config.FIELD=VALUE`, as nested dicts.

    Raises:
      ValueError: there is no such file or field, or a value is of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    values, arguments = flags.FlagValues(), ["", f"--config={config_files.find(file)}", *fields]
    # Told the arguments, or it looks for them in sys.argv.
    config_flags.DEFINE_config_file("config", None, "The run's config file.", values, sys_argv=arguments)
    try:
        rest = values(arguments)
        read = values.config.to_dict()  # A file that cannot be loaded is an error only when it is looked at.
    except (AttributeError, KeyError) as error:
        # ml_collections says the name, in quotes of quotes, and perhaps a better one.
        name = re.search(r"\w+", str(error))[0]
        argument = next((argument for argument in fields if f".{name}" in argument), None)
        if argument is None:  # Raised by the config file itself, so its traceback is what helps.
            raise
        better = re.search(r"Did you mean \W*(\w+)", str(error))
        hint = f"; did you mean {better[1]!r}?" if better else ""
        raise ConfigError(f"the config has no field {name!r}, named by {argument}{hint}") from error
    except (TypeError, OSError, flags.Error) as error:
        # A mistake within the config file comes with its traceback; the last line says what it is.
        said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        if unknown := re.search(r"BankConfig\.__init__\(\) got an unexpected keyword argument '(\w+)'", said):
            said = f"{file}: a bank has no field {unknown[1]!r}; gemma_scope_jax/config.py lists them"
        raise ConfigError(said) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; fields are set by --config.field=value")
    return read


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
