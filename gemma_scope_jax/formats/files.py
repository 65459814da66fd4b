"""What the formats share: the five arrays by name, and files that are written whole or not at all."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors
import safetensors.numpy

from gemma_scope_jax.sae import SAE

_OPTIONAL = {"W_skip"}


def arrays(sae: SAE) -> dict[str, np.ndarray]:
    """The arrays by their names, float32 and contiguous."""
    named = {field.name: getattr(sae, field.name) for field in dataclasses.fields(sae)}
    return {
        name: np.ascontiguousarray(value, dtype=np.float32)
        for name, value in named.items()
        if value is not None
    }


def sae_from_arrays(tensors: Mapping[str, np.ndarray], source: pathlib.Path) -> SAE:
    """An SAE or transcoder from its arrays.

    Raises:
      ValueError: an array is missing, too many, of the wrong shape, or not finite.
    """
    names = {field.name for field in dataclasses.fields(SAE)}
    missing, extra = sorted(names - _OPTIONAL - tensors.keys()), sorted(tensors.keys() - names)
    if missing or extra:
        raise ValueError(f"{source} is no JumpReLU SAE: arrays missing {missing}, not known {extra}")
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2:
            raise ValueError(f"{source}: {name} has shape {tensors[name].shape}, expected two dimensions")
    (d, m), o = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, o), "b_dec": (o,)}
    if "W_skip" in tensors:
        shapes["W_skip"] = (d, o)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{source}: {name} has shape {tensors[name].shape}, expected {shape}")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{source}: {name} holds non-finite values")
    return SAE(**{name: np.asarray(value, np.float32) for name, value in tensors.items()})


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
      ValueError: the file is not whole.
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def check_own(folder: pathlib.Path, name: str) -> None:
    """Raises ValueError if a folder to be written to holds things and no file `name` of an older export."""
    if folder.exists() and any(folder.iterdir()) and not (folder / name).exists():
        raise ValueError(f"{folder} exists and holds something else; give another folder")


@contextlib.contextmanager
def replacing_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new file to write, which takes the place of `path` when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
