"""The ring draws each activation exactly once and mixes the steps well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.training import shuffle_buffer

GROUPS, PER_GROUP, COUNT = 4, 24, 4  # A step has 16 activations; the ring holds six steps.
FULL = PER_GROUP // COUNT
KEY = jax.random.key(7)


@jax.jit
def ring_step(state, new, step, harvests, draws, total):
    draining = harvests >= total
    occupancy = harvests - draws
    index = shuffle_buffer.choose_slots(state, KEY, COUNT, step, occupancy, draining)
    drawn = shuffle_buffer.gather(state.slots, index)
    slots = shuffle_buffer.scatter(state.slots, index, new)
    drawing = draining | (occupancy == FULL)
    harvests = harvests + ~draining
    draws = draws + drawing
    last_full = jnp.where(harvests - draws == FULL, harvests, state.last_full)
    return shuffle_buffer.Ring(slots, last_full), drawn, drawing, harvests, draws


def simulate(totals):
    """Runs the ring for each (total, steps before a stop) in turn; returns the ids drawn at each step."""
    state = shuffle_buffer.init(GROUPS, GROUPS * PER_GROUP, {"a": 1}, jnp.float32)
    step = harvests = draws = 0
    drawn_at = []
    for total, stop_after in totals:
        done = 0
        while (harvests < total or draws < harvests) and done != stop_after:
            ids = np.zeros((GROUPS * COUNT, 3), np.int32)
            if harvests < total:
                ids[:, 0] = harvests * GROUPS * COUNT + np.arange(GROUPS * COUNT) + 1
            new = shuffle_buffer.Slots(
                acts={"a": ids[:, :1].astype(np.float32)},
                weight={"a": (ids[:, 0] > 0).astype(np.float32)},
                source=ids,
            )
            new = jax.tree.map(lambda v: shuffle_buffer.group_rows(jnp.asarray(v), GROUPS), new)
            state, drawn, drawing, harvests, draws = ring_step(state, new, step, harvests, draws, total)
            harvests, draws = int(harvests), int(draws)
            if drawing:
                weight = np.asarray(drawn.weight["a"])
                np.testing.assert_array_equal(
                    np.asarray(drawn.acts["a"])[..., 0][weight > 0],
                    np.asarray(drawn.source)[..., 0][weight > 0],
                )
                drawn_at.append(np.asarray(drawn.source)[..., 0][weight > 0])
            step, done = step + 1, done + 1
    return drawn_at


@pytest.mark.parametrize(
    "totals",
    [
        [(20, None)],
        [(FULL, None)],  # Only filling and draining.
        [(10, 12), (20, None)],  # Extended while draining.
        [(10, None), (20, None)],  # Extended after the end.
        [(20, 8), (3, None)],  # Shortened.
    ],
)
def test_each_activation_is_drawn_exactly_once(totals):
    drawn = np.concatenate(simulate(totals))
    steps_before_cut = totals[0][1] or 0
    harvested = max(steps_before_cut if totals[0][0] > totals[-1][0] else 0, totals[-1][0])
    np.testing.assert_array_equal(np.sort(drawn), np.arange(1, harvested * GROUPS * COUNT + 1))


def test_draws_mix_the_steps_they_came_from():
    drawn_at = simulate([(60, None)])
    distinct_steps = [len(set((ids - 1) // (GROUPS * COUNT))) for ids in drawn_at[5:-5]]
    assert np.mean(distinct_steps) > 5
    # A ring that is only filled and drained mixes too.
    assert np.mean([len(set((ids - 1) // (GROUPS * COUNT))) for ids in simulate([(FULL, None)])]) > 3


def test_deal_gives_each_batch_an_equal_share_of_each_group():
    values = jnp.arange(GROUPS * 6).reshape(GROUPS, 6)
    dealt = shuffle_buffer.deal(values, 3)
    assert dealt.shape == (3, GROUPS * 2)
    for batch in np.asarray(dealt):
        np.testing.assert_array_equal(np.bincount(batch // 6), [2] * GROUPS)
