"""`gemma-scope COMMAND`: the table of commands, and how their arguments are read."""

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

    call: Callable[
        ..., object
    ]  # the command; if `has_fields`, a factory of it, which takes the default config
    when_interrupted: str = ""  # what is said of its work when a signal ends it
    has_fields: bool = False  # whether it takes a config, named first, and its fields
    words: str = ""  # the parameter that words after options belong to, too


# By groups, in the order in which they are shown.
GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "train": Command(training.train_of, "nothing has been trained yet", has_fields=True),
        "prepare": Command(
            training.prepare_of, "the same command goes on after the last whole part", has_fields=True
        ),
    },
    "Evaluate": {
        "evaluate": Command(evaluation.evaluate, "the same command goes on after the last whole batch"),
        "compare": Command(evaluation.compare, words="folders"),
        "detect": Command(evaluation.detect, "detection writes its results when it ends"),
        "probe": Command(evaluation.probe, "probing writes its results when it ends"),
    },
    "Look inside": {
        "explore": Command(analysis.explore),
        "attribute": Command(analysis.attribute),
        "steer": Command(analysis.steer, words="prompts"),
        "contrast": Command(analysis.contrast, "a contrast writes its results when it ends"),
        "flow": Command(analysis.flow),
        "links": Command(analysis.links),
        "dashboards": Command(analysis.dashboards, "the same command goes on after what was kept last"),
        "generate": Command(analysis.generate, "replies are written when all are there"),
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
    """Reads a command line and runs its command; ends the process where it is mistaken, or asks for help."""
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
    """Reads a command's arguments, and calls it."""
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
            f"{quoted(arguments[0], 40)} stands where the config does; type {NAME} {name} CONFIG … and options behind"
        )
    # The fields' defaults are those of the config that is named.
    default = config.from_dict(config_files.load(named)) if named else config.Config()
    read(name, command.call(default), arguments)


def read(name: str, function: Callable[..., object], arguments: Sequence[str], words: str = "") -> None:
    """Calls a typed function with what its arguments say; see `tyro.cli` and `Command.words`."""
    prog, arguments = f"{NAME} {name}", old_forms.with_hyphens(arguments)

    @functools.wraps(function)
    def bind(*args: object, **kwargs: object) -> inspect.BoundArguments:
        return inspect.signature(function).bind(*args, **kwargs)

    bound, left = tyro.cli(bind, prog=prog, args=arguments, return_unknown_args=True)
    if left and (not words or any(word.startswith("-") for word in left)):
        # What was meant by an unknown flag tyro says where its value stands apart.
        tyro.cli(bind, prog=prog, args=[part for one in arguments for part in _flag_and_value(one)])
    if left:
        bound.arguments[words] = (*bound.arguments.get(words, ()), *left)
    function(*bound.args, **bound.kwargs)


def _flag_and_value(argument: str) -> list[str]:
    return argument.split("=", 1) if re.match(r"--[\w.-]+=", argument) else [argument]


def help_text() -> str:
    """All commands by their groups, each with its first sentence."""
    lines = [f"usage: {NAME} COMMAND …", "", "Sparse autoencoders on Gemma's activations.", ""]
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        for name, command in commands.items():
            function = command.call(config.Config()) if command.has_fields else command.call
            lines.append(f"  {name:11} {function.__doc__.splitlines()[0]}")
        lines.append("")
    return "\n".join([*lines, f"{NAME} COMMAND --help has the options of each, and an example."])


def main() -> None:
    """The console script."""
    common.run(lambda: run(sys.argv[1:]))


def script(name: str) -> None:
    """A script that is one of the commands, such as `train.py`."""
    common.run(lambda: run([name, *sys.argv[1:]]), COMMANDS[name].when_interrupted)
