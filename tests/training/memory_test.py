"""The forecast of a run's memory on each device equals the memory of its arrays."""

import jax
import pytest
import tiny

from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.training import loop, runs
from gemma_scope_jax.training import memory as memory_lib


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_the_forecast_parts_equal_the_arrays_bytes_on_a_device(inputs, mesh):
    banks = {
        "a": dict(layers=(0, 2), width=64, bandwidth=0.1),
        "b": dict(layers=(1,), sites=("mlp_in",), target_site="mlp_out", skip=True, width=128, bandwidth=0.1),
    }
    config = tiny.run_config(inputs, banks=banks, mesh__gemma="whole" if mesh == (1, 1) else "split")
    run = runs.build(config, sharding.make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]]))
    state, _, gemma = runs.abstract_inputs(run)
    needs = {need.what: need.bytes for need in memory_lib.needs(state, gemma, 0)}

    loaded = runs.load_gemma(run)
    rows = token_rows.open_rows(prepare.rows_of(config), token_rows.TRAIN)
    real = runs.init_state(run, loop.calibrate(run, rows, loaded, run.plan.sites))
    device = jax.devices()[0]

    def held(tree):
        return sum(
            s.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for s in leaf.addressable_shards
            if s.device == device
        )

    expected = {"Gemma": held(loaded), "ring": held(real.ring)}
    expected |= {f"bank {name}": held(bank) for name, bank in real.banks.items()}
    assert needs == expected
    # By hand: the SAEs' parameters, a copy of that size for the optimizer, and the counters.
    e, m, d, data, latent = 2, 64, 32, *mesh
    split = 4 * (2 * (2 * d * m + 2 * m) + 2 * m) // latent + 4 * 2 * d + 4 * 5
    assert needs["bank a"] == e // data * split


def test_the_gradient_counts_as_part_of_its_bank(inputs):
    """The compiler counts it as temporary memory, but smaller steps would not reduce it."""
    config = tiny.run_config(inputs, banks__main__width=2**14)
    run = runs.build(config, sharding.make_mesh(1, 1, jax.devices()[:1]))
    state, _, gemma = runs.abstract_inputs(run)
    before = {need.what: need.bytes for need in memory_lib.needs(state, gemma, 0)}
    gradient = memory_lib.bytes_per_device(state.banks["main"].params)
    after = {need.what: need.bytes for need in memory_lib.needs(state, gemma, gradient + 1000)}
    assert after["bank main"] == before["bank main"] + gradient
    assert after["the step's activations"] == 1000


def test_the_compiler_counts_the_same_bytes_of_arguments(inputs):
    run = runs.build(tiny.run_config(inputs), sharding.make_mesh(1, 1, jax.devices()[:1]))
    inputs_of_step = runs.abstract_inputs(run)
    memory = loop.lower_step(run, *inputs_of_step).compile().memory_analysis()
    counted = sum(memory_lib.bytes_per_device(tree) for tree in inputs_of_step)
    assert abs(memory.argument_size_in_bytes / counted - 1) < 0.01


def test_the_error_for_too_little_memory_names_the_largest_part():
    needs = [memory_lib.Need("ring", 60, "lower ring.capacity"), memory_lib.Need("Gemma", 50, "…")]
    memory_lib.check(needs, 110)
    with pytest.raises(ValueError, match=r"does not fit .* The largest part is ring: lower ring\.capacity"):
        memory_lib.check(needs, 109)
