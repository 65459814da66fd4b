"""The in-memory shuffle: a ring of activations that each compiled step reads from and writes to.

A ring has R groups of slots. An activation never leaves its group, and a group is never split over chips, so
shuffling moves no data between chips. T is the number of activations in one step, C the ring's capacity. Each
step touches T/R slots of each group. The ring holds the activations of `occupancy` steps, at most C/T:

  fill    empty slots are written and nothing is read,
  steady  random slots are read, then overwritten,
  drain   the remaining slots are read and nothing is written.

So each activation that enters is read exactly once. The random choices are keyed by (seed, step, group) and do
not depend on the mesh.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

# Columns of `Slots.source`.
ROW, POSITION, DOCUMENT = range(3)


@flax.struct.dataclass
class Slots:
    """Activations with their weights and sources. All sites share one permutation."""

    acts: Mapping[str, jax.Array]  # site → [R, C/R, D]
    weight: Mapping[str, jax.Array]  # site → [R, C/R]; from 0 to 1, and 0 where masked or empty
    source: jax.Array  # [R, C/R, 3], int32: row, position and document of the slot's activation


@flax.struct.dataclass
class Ring:
    """The slots, and the number of harvests when the ring was last full, which keys filling and draining."""

    slots: Slots
    last_full: jax.Array  # [], int32; 0 until the ring is first full


def init(groups: int, capacity: int, widths: Mapping[str, int], dtype: jnp.dtype) -> Ring:
    """An empty ring for sites of the given widths."""
    shape = (groups, capacity // groups)
    return Ring(
        slots=Slots(
            acts={site: jnp.zeros((*shape, d), dtype) for site, d in widths.items()},
            weight={site: jnp.zeros(shape, jnp.float32) for site in widths},
            source=jnp.zeros((*shape, 3), jnp.int32),
        ),
        last_full=jnp.zeros((), jnp.int32),
    )


def choose_slots(
    ring: Ring, key: jax.Array, count: int, step: jax.Array, occupancy: jax.Array, draining: jax.Array
) -> jax.Array:
    """The slots [R, T/R] that this step reads and writes.

    Args:
      ring: the ring.
      key: the run's key.
      count: T/R, the number of slots in each group.
      step: the number of completed steps, which keys a steady step's choice.
      occupancy: the number of steps whose activations the ring holds.
      draining: whether slots are only read, not written.
    """
    groups, per_group = ring.slots.source.shape[:2]
    full = per_group // count
    steady = (occupancy == full) & ~draining
    # Filling and draining follow the same permutation in opposite directions. So a run that is extended while it
    # drains fills exactly the slots that were emptied.
    stage = jnp.where(draining, full - occupancy, full - 1 - occupancy)
    stage = jnp.where(steady, 0, stage)
    phase_key = jax.random.fold_in(key, jnp.where(steady, step, -1 - ring.last_full))
    order_RxC = jax.vmap(
        lambda group: jax.random.permutation(jax.random.fold_in(phase_key, group), per_group)
    )(jnp.arange(groups))
    return jax.lax.dynamic_slice_in_dim(order_RxC, stage * count, count, axis=1)


def gather(slots: Slots, index_RxT: jax.Array) -> Slots:
    """The contents of the chosen slots of each group."""
    return jax.tree.map(jax.vmap(lambda values, index: values[index]), slots, _like(slots, index_RxT))


def scatter(slots: Slots, index_RxT: jax.Array, new: Slots) -> Slots:
    """The slots, with the chosen slots of each group overwritten."""
    write = jax.vmap(lambda values, index, new: values.at[index].set(new, unique_indices=True))
    return jax.tree.map(write, slots, _like(slots, index_RxT), new)


def _like(slots: Slots, value: jax.Array) -> Slots:
    return jax.tree.map(lambda _: value, slots)


def group_rows(values: jax.Array, groups: int) -> jax.Array:
    """Reshapes [T, …] to [R, T/R, …]. A group takes neighbouring positions, so they stay on their chip."""
    return values.reshape(groups, values.shape[0] // groups, *values.shape[1:])


def deal(values: jax.Array, batches: int) -> jax.Array:
    """Splits [R, T/R, …] into K batches [K, B, …], each with an equal share of every group."""
    groups, count = values.shape[:2]
    dealt = values.reshape(groups, batches, count // batches, *values.shape[2:]).swapaxes(0, 1)
    return dealt.reshape(batches, -1, *values.shape[2:])
