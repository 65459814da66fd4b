"""Gemma Scope's own format: one `params.npz` of five float32 arrays, of an SAE or of a transcoder."""

import pathlib
import zipfile

import numpy as np

from gemma_scope_jax.formats import files
from gemma_scope_jax.sae import SAE

NO_SKIP = (
    "has a skip connection, for which params.npz has no place; --format=gemma_scope_2 and saelens have one"
)


def write(path: pathlib.Path, sae: SAE) -> None:
    """Writes a folded SAE or transcoder as an npz file.

    Raises:
      ValueError: a skip connection, for which the format has no place.
    """
    if sae.W_skip is not None:
        raise ValueError(f"{path} {NO_SKIP}")
    with files.replacing_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **files.arrays(sae))


def read(path: pathlib.Path) -> SAE:
    """Reads an npz file.

    Raises:
      ValueError: the file is not whole, holds other arrays, or pickled objects.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole npz file: {error}") from error
    return files.sae_from_arrays(tensors, path)
