"""What the formats share: the five arrays by name, and files that are written whole or not at all."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from gemma_scope_jax.sae import SAE


def arrays(sae: SAE) -> dict[str, np.ndarray]:
    """The five arrays by their names, float32 and contiguous."""
    return {
        field.name: np.ascontiguousarray(getattr(sae, field.name), dtype=np.float32)
        for field in dataclasses.fields(sae)
    }


def sae_from_arrays(tensors: Mapping[str, np.ndarray], source: pathlib.Path) -> SAE:
    """An SAE from its five arrays.

    Raises:
      ValueError: an array is missing, too many, of the wrong shape, or not finite.
    """
    names = {field.name for field in dataclasses.fields(SAE)}
    if tensors.keys() != names:
        missing, extra = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        raise ValueError(f"{source} is no JumpReLU SAE: arrays missing {missing}, not known {extra}")
    if tensors["W_enc"].ndim != 2:
        raise ValueError(f"{source}: W_enc has shape {tensors['W_enc'].shape}, expected [D, M]")
    d, m = tensors["W_enc"].shape
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{source}: {name} has shape {tensors[name].shape}, expected {shape}")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{source}: {name} holds non-finite values")
    return SAE(**{name: np.asarray(value, np.float32) for name, value in tensors.items()})


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
