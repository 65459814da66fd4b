"""Gemma's activations on rows of tokens, one batch at a time, for analyses that write to no site."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import reporting, sharding


class Batch(NamedTuple):
    """A batch of rows on the devices; rows after the first `count` are padding."""

    first: int
    count: int
    tokens_SxL: jax.Array
    values: dict[Site, jax.Array]  # [S, L, D]


@functools.partial(jax.jit, static_argnames="sites")
def read(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    sites: tuple[Site, ...],
) -> dict[Site, jax.Array]:
    """The activations [S, L, D] of sites. Blocks after the deepest site are not computed."""
    found = forward.read_sites(gemma.gathered(), tokens_SxL, sites)
    return sharding.constrain(gemma.mesh, found, sharding.TOKENS)


def batches(
    gemma: Gemma,
    sites: tuple[Site, ...],
    tokens_RxL: np.ndarray,
    per_batch: int,
    what: str,
) -> Iterator[Batch]:
    """Runs Gemma over all rows, up to the deepest site, and yields the activations batch by batch.

    Args:
      gemma: the model.
      sites: the sites to read, all in the same pass.
      tokens_RxL: the rows.
      per_batch: the number of rows in a batch, rounded up to a multiple of the number of devices.
      what: the label of the progress bar.
    """
    per_batch = -(-min(per_batch, len(tokens_RxL)) // gemma.mesh.size) * gemma.mesh.size
    placed = jax.NamedSharding(gemma.mesh, sharding.TOKENS)
    with reporting.bar(what, "row", len(tokens_RxL), compiles=1) as bar:
        for first in range(0, len(tokens_RxL), per_batch):
            rows = tokens_RxL[first : first + per_batch]
            padded = np.pad(rows, ((0, per_batch - len(rows)), (0, 0)), constant_values=masking.PAD)
            tokens_SxL = jax.device_put(padded, placed)
            values = read(gemma, tokens_SxL, sites)
            yield Batch(first, len(rows), tokens_SxL, values)
            bar.update(len(rows))
