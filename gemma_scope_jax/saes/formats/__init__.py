"""The formats that SAEs are read and written in, by name: a module for each, and `register` for one more."""

import itertools
import pathlib
import re
from collections.abc import Iterator

from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable, quoted
from gemma_scope_jax.saes.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)
from gemma_scope_jax.saes.formats.common import Format, Found


def _refuse_sparsify(path: pathlib.Path) -> list[Found]:
    raise FormatError(
        f"{path} is one of sparsify's TopK SAEs, which has no thresholds: it cannot be had as a JumpReLU SAE"
    )


FORMATS: dict[str, Format] = {
    "saelens": saelens.FORMAT,
    "gemma_scope": gemma_scope.FORMAT,
    "gemma_scope_2": gemma_scope_2.FORMAT,
    "multi_layer": gemma_scope_2.MULTI_LAYER,
    "dictionary_learning": dictionary_learning.FORMAT,
    "circuit_tracer": circuit_tracer.FORMAT,
    "sparsify": Format(marks=("sae.safetensors",), read=_refuse_sparsify),
}
_OWN = frozenset(FORMATS)


def register(name: str, one: Format) -> None:
    """Makes a format known by a name, for reading at once and, if it writes, for `export` and `convert`.

    One that was registered by this name so far is replaced.

    Raises:
      ValueError: the name is that of one of the package's own, or a mark of the format is another's.
    """
    if name in _OWN and FORMATS[name] != one:
        raise FormatError(f"another format is called {name!r}; choose another name")
    for other, of in FORMATS.items():
        if other != name and (both := set(of.marks) & set(one.marks)):
            raise FormatError(
                f"{sorted(both)[0]} is a mark of the format {other!r} too; choose another file's name"
            )
    FORMATS[name] = one


def written() -> tuple[str, ...]:
    """The names of the formats that are written."""
    return tuple(name for name, one in FORMATS.items() if one.write is not None)


def format_to_write(name: str) -> Format:
    """The format of a name.

    Raises:
      ValueError: there is none that is written.
    """
    if name not in written():
        raise FormatError(f"unknown format {quoted(name)}; choose one of {', '.join(written())}")
    return FORMATS[name]


def files() -> tuple[str, ...]:
    """What SAEs' files are called, or patterns of them, in all formats."""
    return tuple(dict.fromkeys(file for one in FORMATS.values() for file in one.files))


def weight_files() -> tuple[str, ...]:
    """Those of `files` without which a folder holds no SAE."""
    return tuple(n for n in files() if not n.endswith((".json", ".yaml", "site_mean.safetensors")))


def format_of(path: pathlib.Path) -> str | None:
    """The name of the format of a file or folder; None if it looks like none."""
    # What is surest of every format before what is less so of any.
    for marks in itertools.zip_longest(*(one.marks for one in FORMATS.values())):
        for name, mark in zip(FORMATS, marks, strict=True):
            if mark and (path.name == mark or (path / mark).exists()):
                return name
    for name, one in FORMATS.items():
        if one.file_pattern and re.fullmatch(one.file_pattern, path.name):
            return name
    return None


def read(path: pathlib.Path) -> Iterator[Found]:
    """The SAE of a file or folder in any format, or one after the other those of a set.

    Raises:
      ValueError: there is none, it is broken, or of a kind that is none of a JumpReLU SAE or transcoder.
    """
    name = format_of(path)
    if name is not None:
        for found in FORMATS[name].read(path):
            yield found._replace(format=name)
        return
    if (path / "checkpoints").exists() and (path / "config.json").exists():
        raise FormatError(f"{path} is a run: export writes its SAEs, evaluate evaluates them")
    below = sorted(found.name for found in path.iterdir() if format_of(found)) if path.is_dir() else []
    hint = f"; {printable(below[0], 100)} in it is one" if below else ""
    raise FormatError(
        f"{path} is neither a run directory nor an SAE: it has none of {', '.join(files())}{hint}"
    )


__all__ = [
    "FORMATS",
    "Format",
    "Found",
    "common",
    "files",
    "format_of",
    "format_to_write",
    "read",
    "register",
    "written",
]
