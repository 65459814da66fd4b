"""Gemma Scope's own format: one `params.npz` of five float32 arrays."""

import pathlib
import zipfile

import numpy as np

from gemma_scope_jax.formats import files
from gemma_scope_jax.sae import SAE


def write(path: pathlib.Path, sae: SAE) -> None:
    """Writes a folded SAE as an npz file."""
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
