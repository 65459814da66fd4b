"""`compare`: evaluations side by side, each compared with the first."""

import pathlib
import shlex
from collections.abc import Sequence

from gemma_scope_jax.cli.common import say
from gemma_scope_jax.evaluation import side_by_side
from gemma_scope_jax.runtime import files, printing
from gemma_scope_jax.runtime.errors import InputError


def compare(folders: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """Writes and prints evaluations side by side; see `side_by_side.comparison`.

    Raises:
      ValueError: if a folder contains no evaluation, there is only one folder, or `out` is not a folder.
    """
    if len(folders) < 2:
        raise InputError(f"compare needs two folders or more, but only {folders[0]} is given")
    files.check_output(out, is_folder=True)
    shortest = side_by_side.labels(folders)
    columns = {label: side_by_side.read(folder) for label, folder in zip(shortest, folders, strict=True)}
    command = ["gemma-scope", "compare", *map(str, folders), f"--out={out}"]
    made = side_by_side.comparison(columns, is_compared=True)
    out.mkdir(parents=True, exist_ok=True)
    written = made.save(out, shlex.join(map(printing.shareable, command)))
    made.show()
    say(f"Wrote {', '.join(map(str, written))}")
