"""The file formats of SAEs, by name: one module per format, and `register` to add one."""

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
        f"{path} is a TopK SAE of sparsify; it has no thresholds, so it cannot be read as a JumpReLU SAE"
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
    """Registers a format under a name, for reading and, if it has `write`, for `export` and `convert`.

    A format registered before under this name is replaced.

    Raises:
      ValueError: if the name is taken by one of the package's formats, or a mark of the format is another's.
    """
    if name in _OWN and FORMATS[name] != one:
        raise FormatError(f"another format is called {name!r}; choose another name")
    for other, of in FORMATS.items():
        if other != name and (both := set(of.marks) & set(one.marks)):
            raise FormatError(
                f"{sorted(both)[0]} is also a mark of the format {other!r}; choose another file name"
            )
    FORMATS[name] = one


def written() -> tuple[str, ...]:
    """The names of the formats that can be written."""
    return tuple(name for name, one in FORMATS.items() if one.write is not None)


def format_to_write(name: str) -> Format:
    """The format of a name, if it can be written.

    Raises:
      ValueError: if no such format can be written.
    """
    if name not in written():
        raise FormatError(f"unknown format {quoted(name)}; choose one of {', '.join(written())}")
    return FORMATS[name]


def files() -> tuple[str, ...]:
    """The names of SAE files in all formats, or patterns of names."""
    return tuple(dict.fromkeys(file for one in FORMATS.values() for file in one.files))


def weight_files() -> tuple[str, ...]:
    """The part of `files` that holds weights; a folder without any of them holds no SAE."""
    return tuple(n for n in files() if not n.endswith((".json", ".yaml", "site_mean.safetensors")))


def format_of(path: pathlib.Path) -> str | None:
    """The name of the format of a file or folder; None if no format matches."""
    # The surest mark of every format is tried before the second of any.
    for marks in itertools.zip_longest(*(one.marks for one in FORMATS.values())):
        for name, mark in zip(FORMATS, marks, strict=True):
            if mark and (path.name == mark or (path / mark).exists()):
                return name
    for name, one in FORMATS.items():
        if one.file_pattern and re.fullmatch(one.file_pattern, path.name):
            return name
    return None


def read(path: pathlib.Path) -> Iterator[Found]:
    """Yields the SAE of a file or folder in any format, or the SAEs of a set one at a time.

    Raises:
      ValueError: if there is no SAE, if it is broken, or if it is not a JumpReLU SAE or transcoder.
    """
    name = format_of(path)
    if name is not None:
        for found in FORMATS[name].read(path):
            yield found._replace(format=name)
        return
    if (path / "checkpoints").exists() and (path / "config.json").exists():
        raise FormatError(
            f"{path} is a run directory, not an SAE; export writes its SAEs, evaluate evaluates them"
        )
    below = sorted(found.name for found in path.iterdir() if format_of(found)) if path.is_dir() else []
    hint = f"; {printable(below[0], 100)} in it is an SAE" if below else ""
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
