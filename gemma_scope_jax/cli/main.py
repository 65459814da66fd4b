"""`gemma-scope COMMAND`: the table of commands, and the parsing of their arguments."""

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tyro

from gemma_scope_jax import __version__, config
from gemma_scope_jax.cli import common, old_forms
from gemma_scope_jax.cli.commands import analysis, evaluation, sharing, training
from gemma_scope_jax.runtime import signals
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted

NAME = "gemma-scope"


class Command(NamedTuple):
    """A command of the table."""

    # The command; if `has_fields`, a function that returns the command for a default config.
    call: Callable[..., object]
    when_interrupted: str = ""  # text added to the message when a signal ends the command
    has_fields: bool = False  # whether the first argument is a config, whose fields are options
    words: str = ""  # the parameter that also takes positional arguments after options


# The commands by group, in the order of the help.
GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "train": Command(training.train_of, "nothing has been trained yet", has_fields=True),
        "prepare": Command(
            training.prepare_of, "the same command continues after the last complete part", has_fields=True
        ),
    },
    "Evaluate": {
        "evaluate": Command(evaluation.evaluate, "the same command continues after the last complete batch"),
        "compare": Command(evaluation.compare, words="folders"),
        "detect": Command(evaluation.detect, "detection writes its results only at its end"),
        "probe": Command(evaluation.probe, "probing writes its results only at its end"),
    },
    "Look inside": {
        "explore": Command(analysis.explore),
        "attribute": Command(analysis.attribute),
        "steer": Command(analysis.steer, words="prompts"),
        "contrast": Command(analysis.contrast, "a contrast writes its results only at its end"),
        "flow": Command(analysis.flow),
        "links": Command(analysis.links),
        "dashboards": Command(analysis.dashboards, "the same command continues from what was saved last"),
        "generate": Command(analysis.generate, "replies are written only when all are complete"),
    },
    "Share": {
        "export": Command(sharing.export),
        "convert": Command(sharing.convert),
        "publish": Command(sharing.publish),
    },
    "Plan": {"plan": Command(training.plan_of, has_fields=True)},
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def run(arguments: Sequence[str]) -> None:
    """Parses a command line and runs its command.

    Raises:
      SystemExit: after --help, or if an argument is wrong.
      ValueError: if there is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{NAME} has no command {quoted(name, 40)}; {hint}{NAME} --help lists them")
    command = COMMANDS[name]
    signals.leaving(command.when_interrupted)
    call(name, command, rest)


def call(name: str, command: Command, arguments: Sequence[str]) -> None:
    """Parses the arguments of a command, and calls it."""
    if not command.has_fields:
        read(name, command.call, arguments, command.words)
        return
    from gemma_scope_jax.training import config_files

    if old_forms.is_of_config(arguments):
        values, options = old_forms.of_config(name, arguments)
        chosen = config.from_dict(values)
        positional = [value for key, value in options.items() if key != "workers"]
        workers = ["--workers", options["workers"]] if "workers" in options else []
        read(name, command.call(chosen), ["-", *positional, *workers])
        return
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if arguments and named is None and not {"-h", "--help"} & set(arguments):
        raise InputError(
            f"the first argument is {quoted(arguments[0], 40)}, not a config; type {NAME} {name} CONFIG …"
        )
    # The fields of the named config are the defaults of the options.
    default = config.from_dict(config_files.load(named)) if named else config.Config()
    read(name, command.call(default), arguments)


def read(name: str, function: Callable[..., object], arguments: Sequence[str], words: str = "") -> None:
    """Parses arguments by a function's signature, and calls it; see `tyro.cli` and `Command.words`."""
    prog, arguments = f"{NAME} {name}", old_forms.with_hyphens(arguments)

    @functools.wraps(function)
    def bind(*args: object, **kwargs: object) -> inspect.BoundArguments:
        return inspect.signature(function).bind(*args, **kwargs)

    bound, left = tyro.cli(bind, prog=prog, args=arguments, return_unknown_args=True)
    if left and (not words or any(word.startswith("-") for word in left)):
        # tyro suggests the flag that was meant only if the value is a separate argument.
        tyro.cli(bind, prog=prog, args=[part for one in arguments for part in _flag_and_value(one)])
    if left:
        bound.arguments[words] = (*bound.arguments.get(words, ()), *left)
    common.say("Importing JAX and Gemma's code …")
    function(*bound.args, **bound.kwargs)


def _flag_and_value(argument: str) -> list[str]:
    return argument.split("=", 1) if re.match(r"--[\w.-]+=", argument) else [argument]


def help_text() -> str:
    """The help: all commands by group, each with the first line of its docstring."""
    lines = [f"usage: {NAME} COMMAND …", "", "Sparse autoencoders on Gemma's activations.", ""]
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        for name, command in commands.items():
            function = command.call(config.Config()) if command.has_fields else command.call
            lines.append(f"  {name:11} {function.__doc__.splitlines()[0]}")
        lines.append("")
    return "\n".join([*lines, f"{NAME} COMMAND --help shows the options of a command, and an example."])


def main() -> None:
    """Runs the console script `gemma-scope`."""
    common.run(lambda: run(sys.argv[1:]))


def script(name: str) -> None:
    """Runs a script that is one of the commands, such as `train.py`."""
    common.run(lambda: run([name, *sys.argv[1:]]), COMMANDS[name].when_interrupted)
