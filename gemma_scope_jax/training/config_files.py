"""Finds and loads config files; the package's own configs are found by name from any folder."""

import difflib
import importlib.util
import os
import pathlib
from collections.abc import Mapping

import ml_collections

from gemma_scope_jax import config
from gemma_scope_jax.runtime.errors import ConfigError, NotFoundError
from gemma_scope_jax.runtime.printing import quoted

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """The folder of the package's configs: inside an installed package, beside the package in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of the package's configs, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> tuple[pathlib.Path, str]:
    """The path of a config file, and the suite after the colon of its name, as in `gemma2_2b:all_16k`.

    Args:
      name: a path; or one of the package's configs, such as `quickstart`, `quickstart.py` or `configs/quickstart.py`.
        If a file of this name exists, it takes precedence over the package's config.

    Raises:
      ValueError: if there is no such file.
    """
    given, _, suite = name.partition(":")
    path = pathlib.Path(os.path.expanduser(given))
    if path.is_file():
        return path, suite
    shipped = names()
    if path.stem in shipped and path.suffix in ("", ".py") and str(path.parent) in (".", "configs"):
        return folder() / f"{path.stem}.py", suite
    near = [*difflib.get_close_matches(path.stem, shipped, n=1), *_near(path)]
    hint = f"did you mean {' or '.join(map(quoted, near))}? " if near else ""
    raise NotFoundError(
        f"there is no config file {quoted(given)}; {hint}give a path or one of the package's configs: "
        f"{', '.join(shipped)}"
    )


def _near(path: pathlib.Path) -> list[str]:
    """The user's Python file, if any, whose path is nearest to a mistyped one, in the name or the last folder."""
    inside = path.parent
    found = inside.glob("*.py") if inside.is_dir() else inside.parent.glob("*/*.py")
    own = [str(one) for one in found if one.parent.resolve() != folder().resolve()]
    return difflib.get_close_matches(str(path), own, n=1, cutoff=0.8)


def load(name: str) -> dict:
    """Loads a config file as nested dicts; an error that the file's own code raises is passed on.

    Raises:
      ValueError: if there is no such file, or it has no `get_config`.
    """
    path, suite = find(name)
    spec = importlib.util.spec_from_file_location(f"config_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; give a config file that ends with .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config; add get_config, which returns the config")
    made = module.get_config(suite) if suite else module.get_config()
    return made.to_dict() if isinstance(made, ml_collections.ConfigDict) else config.to_dict(made)


def with_fields(values: Mapping, fields: Mapping[str, object]) -> dict:
    """A copy of a config with some fields changed.

    Args:
      values: the config, as nested dicts.
      fields: the new values, by dotted names as in `banks.main.width`, or by last names that only one field has.

    Raises:
      ValueError: if there is no such field, or several fields have the name.
    """
    made = _copied(values)
    every = list(_names(made))
    for field, value in fields.items():
        same = [name for name in every if name == field] or [
            name for name in every if name.endswith(f".{field}")
        ]
        if len(same) != 1:
            raise ConfigError(_which(field, same, every))
        *parents, last = same[0].split(".")
        inner = made
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return made


def _which(field: str, same: list[str], every: list[str]) -> str:
    if same:
        return f"several fields are called {field!r}: {', '.join(same)}; give the whole name of one"
    # Users type last names. If several fields have the same one, suggest the first.
    ends = {name.rpartition(".")[2]: name for name in reversed(every)}
    near = difflib.get_close_matches(field.rpartition(".")[2], ends, 1)
    return f"the config has no field {quoted(field)}" + (f"; did you mean {ends[near[0]]}?" if near else "")


def _copied(values: Mapping) -> dict:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _names(values: Mapping, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _names(value, f"{prefix}{key}.")
        # A field that holds a mapping can also be given as a whole.
        if not isinstance(value, Mapping) or not value or key == "objective_options":
            found.append(f"{prefix}{key}")
    return found
