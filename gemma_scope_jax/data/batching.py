"""Batches of rows on a mesh, in an order that is the same for every run, and which of their positions count."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.models import chat, masking, tokenizer
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted

# The rows of a split that are evaluated are the first of this order, whatever the run's seed.
ORDER_SEED = 0

# Which positions [S, L] of rows of tokens count.
Counts = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PlacedRows:
    """Rows of tokens on the devices; the last of them may be padding."""

    tokens_SxL: jax.Array
    is_kept_SxL: jax.Array
    count: int  # that are no padding
    position_SxL: np.ndarray  # of the `count`, behind a document's BOS


def all_but_special(tokens_SxL: np.ndarray) -> np.ndarray:
    """All positions but BOS, EOS and PAD."""
    return masking.is_kept(tokens_SxL, 0)


def batches(
    mesh: jax.sharding.Mesh,
    rows: token_rows.Rows,
    count: int,
    per_batch: int,
    counts: Counts = all_but_special,
    start: int = 0,
) -> Iterator[PlacedRows]:
    """Rows in the order of `ORDER_SEED`, so many at a time, padded to as many as the devices divide.

    Args:
      mesh: that they are put on.
      rows: to read from.
      count: the place in that order behind the last of them.
      per_batch: how many at a time.
      counts: which positions count.
      start: the place of the first of them.
    """
    chosen = token_rows.order(len(rows), ORDER_SEED, 0, count)
    per_batch = padded_rows(mesh, count, per_batch)
    placed = jax.NamedSharding(mesh, sharding.TOKENS)

    def put(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, placed, lambda index: values[index])

    for first in range(start, count, per_batch):
        tokens = np.asarray(rows.read(chosen[first : first + per_batch]).tokens)
        padded = np.pad(tokens, ((0, per_batch - len(tokens)), (0, 0)), constant_values=masking.PAD)
        position = np.asarray(masking.packed_positions(jnp.asarray(tokens)))
        yield PlacedRows(put(padded), put(np.asarray(counts(padded))), len(tokens), position)


def padded_rows(mesh: jax.sharding.Mesh, count: int, per_batch: int) -> int:
    """Rows in a batch: as many as asked for, no more than there are, and a multiple of the devices."""
    return -(-min(per_batch, count) // mesh.size) * mesh.size


def counts_of(config: config_lib.Config, turns: str | None = None) -> Counts:
    """Which positions count: all, or those of one side's turns.

    Raises:
      ValueError: `turns` are nobody's.
    """
    if turns not in (None, "all", "user", "model"):
        raise InputError(f"turns are {quoted(turns)}; choose all, user or model")
    prefix = masking.masked_prefix(config.data)

    def counts(tokens_SxL: np.ndarray) -> np.ndarray:
        return np.asarray(masking.is_kept(tokens_SxL, prefix))

    if turns in (None, "all"):
        return counts
    is_inside = chat.in_turns(tokenizer.load(config.model, config.tokenizer, config.weights), turns)
    return lambda tokens_SxL: counts(tokens_SxL) & is_inside(tokens_SxL)
