"""Batches of rows on a mesh, in an order that is the same for every run, with masks of the positions that count."""

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

# Seeds the order of a split's rows. Evaluations use the first rows of that order, whatever the run's seed.
ORDER_SEED = 0

# Maps rows of tokens [S, L] to a mask [S, L] of the positions that count.
Counts = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PlacedRows:
    """Rows of tokens on the devices; the last rows can be padding."""

    tokens_SxL: jax.Array
    is_kept_SxL: jax.Array
    count: int  # the number of rows that are not padding
    position_SxL: np.ndarray  # of the first `count` rows: tokens since the segment's BOS


def all_but_special(tokens_SxL: np.ndarray) -> np.ndarray:
    """A mask of all positions except BOS, EOS and PAD."""
    return masking.is_kept(tokens_SxL, 0)


def batches(
    mesh: jax.sharding.Mesh,
    rows: token_rows.Rows,
    count: int,
    per_batch: int,
    counts: Counts = all_but_special,
    start: int = 0,
) -> Iterator[PlacedRows]:
    """Yields batches of rows in the order of `ORDER_SEED`, padded to a multiple of the number of devices.

    Args:
      mesh: the devices to put the rows on.
      rows: the rows of a split.
      count: the index in that order after the last row.
      per_batch: the number of rows in a batch; see `padded_rows`.
      counts: makes the mask of positions that count.
      start: the index in that order of the first row.
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
    """The rows in a batch: at most `count` of `per_batch`, rounded up to a multiple of the number of devices."""
    return -(-min(per_batch, count) // mesh.size) * mesh.size


def counts_of(config: config_lib.Config, turns: str | None = None) -> Counts:
    """The function that masks the positions that count: all, or one side's turns.

    Raises:
      ValueError: if `turns` is not all, user or model.
    """
    if turns not in (None, "all", "user", "model"):
        raise InputError(f"unknown turns {quoted(turns)}; choose all, user or model")
    prefix = masking.masked_prefix(config.data)

    def counts(tokens_SxL: np.ndarray) -> np.ndarray:
        return np.asarray(masking.is_kept(tokens_SxL, prefix))

    if turns in (None, "all"):
        return counts
    is_inside = chat.in_turns(tokenizer.load(config.model, config.tokenizer, config.weights), turns)
    return lambda tokens_SxL: counts(tokens_SxL) & is_inside(tokens_SxL)
