"""How commands were typed before version 0.2: understood for a release, with a warning that says the new form."""

import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.printing import printable


def warn(new: str) -> None:
    """Says on standard error how a command is typed now."""
    print(f"Warning: this form goes away with the next release; type {printable(new, 400)}", file=sys.stderr)


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Flags with hyphens for those with underscores, which both are understood; a warning if there were any."""
    made = [
        re.sub(r"^--[\w.-]+", lambda flag: flag[0].replace("_", "-"), argument)
        if "_" in argument
        else argument
        for argument in arguments
    ]
    if old := [flag.partition("=")[0] for flag, new in zip(arguments, made, strict=True) if flag != new]:
        warn(f"{old[0].replace('_', '-')} for {old[0]}, and hyphens in all flags")
    return made


def is_of_config(arguments: Sequence[str]) -> bool:
    """Whether a config is named by `--config`, as `train`, `plan` and `prepare` once took it."""
    return any(
        argument == "--config" or argument.startswith(("--config=", "--config.")) for argument in arguments
    )


def of_config(command: str, arguments: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """The config, as nested dicts, and the other options of `--config=FILE --config.FIELD=VALUE --OPTION=VALUE`.

    Raises:
      ValueError: there is no such file or field, an option is not known or missing, or a value is of the wrong type.
    """
    known = {"train": ("workdir",), "plan": ("topology",), "prepare": ("workers",)}[command]
    joined: list[str] = []
    for argument in arguments:  # `--workdir X` is `--workdir=X`.
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
    """The same as it is typed now."""
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
    """The config of a file with the fields set by `--config.FIELD=VALUE`, as nested dicts."""
    from absl import flags
    from ml_collections import config_flags

    from gemma_scope_jax.training import config_files

    path, suite = config_files.find(file)
    place = pathlib.Path(os.path.abspath(path))
    values, arguments = flags.FlagValues(), ["", f"--config={place}{suite and f':{suite}'}", *fields]
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
