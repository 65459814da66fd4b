"""The optimizer equals DeepMind's published numbers and optax's own Adam."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.saes import jumprelu, objectives
from gemma_scope_jax.training import optimizer as optimizer_lib

PLAIN = config_lib.OptimizerConfig(learning_rate=1e-3, warmup_updates=0, sparsity_warmup_updates=0)


def test_deepminds_published_parameters_after_three_updates():
    with jax.enable_x64(True):
        params, batches = golden.setup()
        optimizer = optimizer_lib.make_optimizer(PLAIN)
        state = optimizer.init(params)
        for x in batches:
            gradient, _ = objectives.loss_gradient(
                params, x, jnp.ones(len(x)), golden.PENALTY, golden.BANDWIDTH
            )
            params, state = optimizer_lib.apply_gradient(optimizer, gradient, state, params, 1e-3)
        exact = golden.three_updates_in_numpy()
        for name, (stride, published) in golden.AFTER_THREE_UPDATES.items():
            value = getattr(params, name)
            np.testing.assert_allclose(value.ravel()[::stride], published, rtol=1e-5, atol=5e-7, err_msg=name)
            np.testing.assert_allclose(value, exact[name], rtol=1e-5, atol=1e-10, err_msg=name)


def test_adam_without_a_first_moment_equals_adam_except_for_the_last_bit():
    params = {"w": jnp.array([0.3, -2.0, 5.0])}
    ours = optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    theirs = optax.scale_by_adam(b1=0.0, b2=0.999, eps=1e-8)
    our_state, their_state = ours.init(params), theirs.init(params)
    for i in range(5):
        gradient = {"w": jnp.sin(params["w"] * (i + 1))}
        our_update, our_state = ours.update(gradient, our_state)
        their_update, their_state = theirs.update(gradient, their_state)
        # Our update multiplies by a reciprocal; optax's Adam divides.
        np.testing.assert_array_max_ulp(np.asarray(our_update["w"]), np.asarray(their_update["w"]), maxulp=1)


def test_the_optimizer_state_has_the_size_of_the_parameters():
    params = jumprelu.init(jax.random.key(0), 16, 64, 0.001)
    state = optimizer_lib.make_optimizer(PLAIN).init(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= size + 2


def test_decoder_rows_keep_unit_norm_and_their_gradient_is_orthogonal():
    params = jumprelu.init(jax.random.key(0), 16, 64, 0.001)
    gradient = jax.tree.map(jnp.ones_like, params)
    projected, _ = optimizer_lib.project_decoder_gradient().update(gradient, optax.EmptyState(), params)
    np.testing.assert_allclose((projected.W_dec * params.W_dec).sum(1), 0, atol=1e-5)
    np.testing.assert_array_equal(projected.W_enc, gradient.W_enc)
    optimizer = optimizer_lib.make_optimizer(PLAIN)
    after, _ = optimizer_lib.apply_gradient(optimizer, gradient, optimizer.init(params), params, 1e-3)
    np.testing.assert_allclose(np.linalg.norm(after.W_dec, axis=1), 1, atol=1e-6)


def test_the_learning_rate_rises_from_a_tenth_as_a_cosine_and_falls_linearly():
    config = config_lib.OptimizerConfig(learning_rate=2.0, warmup_updates=1000, decay_fraction=0.2)
    schedule = lambda update: optimizer_lib.learning_rate(config, 10_000, update, update)  # noqa: E731
    for update, expected in [(0, 0.2), (500, 1.1), (250, 2 * (0.1 + 0.9 * (1 - np.cos(np.pi / 4)) / 2)), (1000, 2.0),
                             (8000, 2.0), (9000, 1.0), (10_000, 0.0)]:  # fmt: skip
        np.testing.assert_allclose(schedule(update), expected, rtol=1e-5, atol=1e-7, err_msg=str(update))


def test_without_a_warmup_every_member_has_the_full_rate():
    rates = optimizer_lib.learning_rate(PLAIN, 10, 3, np.array([0, 5]))
    np.testing.assert_allclose(rates, [1e-3, 1e-3])


def test_an_sae_that_joins_later_has_its_own_warmup_and_the_runs_decay():
    config = config_lib.OptimizerConfig(learning_rate=2.0, warmup_updates=1000, decay_fraction=0.2)
    own = np.array([0, 500, 9000])
    rates = optimizer_lib.learning_rate(config, 10_000, 9000, own)
    np.testing.assert_allclose(rates, [0.1, 0.55, 1.0], rtol=1e-5)


def test_gemma_scopes_own_schedules_are_the_default():
    config = config_lib.OptimizerConfig()
    schedule = lambda update: optimizer_lib.learning_rate(config, 976_562, update, update)  # noqa: E731
    np.testing.assert_allclose(
        [schedule(0), schedule(1000), schedule(976_561)], [7e-6, 7e-5, 7e-5], rtol=1e-5
    )
    warmup = optimizer_lib.sparsity_warmup(config)
    np.testing.assert_allclose([warmup(0), warmup(5000), warmup(10_000), warmup(20_000)], [0, 0.5, 1, 1])
