"""Command lines of version 0.1: they still work in this release, with a warning that shows the new form."""

import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.printing import printable


def warn(new: str) -> None:
    """Prints the new form of a command on standard error."""
    print(
        f"Warning: this form will be removed in the next release; type {printable(new, 400)}", file=sys.stderr
    )


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """The arguments with hyphens in place of underscores in flags; warns if there are any."""
    made = [
        re.sub(r"^--[\w.-]+", lambda flag: flag[0].replace("_", "-"), argument)
        if "_" in argument
        else argument
        for argument in arguments
    ]
    if old := [flag.partition("=")[0] for flag, new in zip(arguments, made, strict=True) if flag != new]:
        warn(f"{old[0].replace('_', '-')} instead of {old[0]}, and hyphens in all flags")
    return made


def is_of_config(arguments: Sequence[str]) -> bool:
    """Whether the config is given by `--config`, the old form of `train`, `plan` and `prepare`."""
    return any(
        argument == "--config" or argument.startswith(("--config=", "--config.")) for argument in arguments
    )


def of_config(command: str, arguments: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """Parses `--config=FILE --config.FIELD=VALUE --OPTION=VALUE`.

    Returns:
      The config as nested dicts, and the options.

    Raises:
      ValueError: if there is no such file or field, an option is unknown or missing, or a value has the wrong type.
    """
    known = {"train": ("workdir",), "plan": ("topology",), "prepare": ("workers",)}[command]
    joined: list[str] = []
    for argument in arguments:  # `--workdir X` means `--workdir=X`.
        if joined and re.fullmatch(r"--[\w.]+", joined[-1]) and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    file, fields, options = "", [], {}
    for argument in joined:
        name, _, value = argument.partition("=")
        if name == "--config":
            file = value
        elif name.startswith("--config."):
            fields.append(argument)
        elif name.removeprefix("--") in known:
            options[name.removeprefix("--")] = value
        else:
            raise ConfigError(f"unexpected argument {argument!r}; fields are set by --config.field=value")
    for name in known if command != "prepare" else ():
        if name not in options:
            raise ConfigError(f"--{name} is missing")
    if not file:
        raise ConfigError("--config is missing; give a config file")
    warn(_new(command, file, fields, options))
    return _read(file, fields), options


def _new(command: str, file: str, fields: Sequence[str], options: dict[str, str]) -> str:
    """The new form of the same command."""
    flags = []
    for field in fields:
        name, _, value = field.removeprefix("--config.").partition("=")
        inside = re.fullmatch(r"[\[(](.*?),?[\])]", value)
        values = [part.strip(" '\"") for part in inside[1].split(",")] if inside else [value]
        name = name.replace("_", "-")
        if value.lower() in ("true", "false"):
            group, dot, last = name.rpartition(".")
            flags.append(f"--{group}{dot}{'no-' if value.lower() == 'false' else ''}{last}")
        else:
            flags += [f"--{name}", *filter(None, values)]
    workers = ["--workers", options["workers"]] if "workers" in options else []
    places = [value for name, value in options.items() if name != "workers"]
    return shlex.join(["gemma-scope", command, file, *places, *workers, *flags])


def _read(file: str, fields: Sequence[str]) -> dict:
    """The config of a file, with the fields set by `--config.FIELD=VALUE`, as nested dicts."""
    from absl import flags
    from ml_collections import config_flags

    from gemma_scope_jax.training import config_files

    path, suite = config_files.find(file)
    place = pathlib.Path(os.path.abspath(path))
    values, arguments = flags.FlagValues(), ["", f"--config={place}{suite and f':{suite}'}", *fields]
    # Without `sys_argv` it would read sys.argv.
    config_flags.DEFINE_config_file("config", None, "The run's config file.", values, sys_argv=arguments)
    try:
        rest = values(arguments)
        read = values.config.to_dict()  # Only this raises if the file cannot be loaded.
    except (AttributeError, KeyError) as error:
        # The message of ml_collections has the name in nested quotes, and perhaps a suggestion.
        name = re.search(r"\w+", str(error))[0]
        argument = next((argument for argument in fields if f".{name}" in argument), None)
        if argument is None:  # Raised by the config file itself: its traceback helps.
            raise
        better = re.search(r"Did you mean \W*(\w+)", str(error))
        hint = f"; did you mean {better[1]!r}?" if better else ""
        raise ConfigError(f"the config has no field {name!r}, named by {argument}{hint}") from error
    except (TypeError, OSError, flags.Error) as error:
        # The message of a mistake in the config file contains a traceback; the last line is the error.
        said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        if unknown := re.search(r"BankConfig\.__init__\(\) got an unexpected keyword argument '(\w+)'", said):
            said = f"{file}: a bank has no field {unknown[1]!r}; gemma_scope_jax/config.py lists them"
        raise ConfigError(said) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; fields are set by --config.field=value")
    return read
