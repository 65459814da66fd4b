"""Config files by name: those that come with the package, from any folder."""

import difflib
import os
import pathlib

from gemma_scope_jax.runtime.errors import NotFoundError
from gemma_scope_jax.runtime.printing import quoted

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """Where the package's configs lie: in it when it is installed, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The package's configs by name, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> pathlib.Path:
    """The config file of a name.

    Args:
      name: a path; or one of the package's configs, such as `quickstart`, `quickstart.py` or `configs/quickstart.py`.
        A file that exists is taken before a config of that name. What stands behind a colon, as in
        `gemma2_2b:all_16k`, is kept at the end of the path.

    Raises:
      NotFoundError: there is no such file.
    """
    given, colon, suite = name.partition(":")
    path = pathlib.Path(os.path.expanduser(given))
    if path.is_file():
        return pathlib.Path(f"{path}{colon}{suite}")  # A suite may have slashes.
    shipped = names()
    if path.stem in shipped and path.suffix in ("", ".py") and str(path.parent) in (".", "configs"):
        return folder() / f"{path.stem}.py{colon}{suite}"
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise NotFoundError(
        f"there is no config file {quoted(given, 200)}; {hint}"
        f"give a path, or one of the configs that come with the package: {', '.join(shipped)}"
    )
