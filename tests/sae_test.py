"""The SAE against DeepMind's published numbers, against its readable definition, and against NumPy."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax import sae


@pytest.fixture(scope="module")
def random_case():
    rng = np.random.default_rng(0)
    d, m, b = 12, 40, 64
    params = sae.Params(
        W_enc=rng.normal(size=(d, m)),
        b_enc=0.1 * rng.normal(size=m),
        log_threshold=np.log(0.2 + rng.random(m)),
        W_dec=rng.normal(size=(m, d)),
        b_dec=rng.normal(size=d),
    )
    return params, rng.normal(size=(b, d)), np.where(rng.random(b) > 0.3, rng.random(b), 0)


def test_deepminds_published_loss_reconstruction_and_gradients():
    with jax.enable_x64(True):
        params, batches = golden.setup()
        x, weight = batches[0], jnp.ones(len(batches[0]))
        gradient, sums = jax.jit(sae.loss_gradient, static_argnames="bandwidth")(
            params, x, weight, golden.SPARSITY_COEFFICIENT, bandwidth=golden.BANDWIDTH
        )
        loss = (sums.squared_error + golden.SPARSITY_COEFFICIENT * sums.l0) / sums.weight
        np.testing.assert_allclose(loss, 81.98928, rtol=1e-5)
        np.testing.assert_allclose(
            sae.loss(params, x, weight, golden.SPARSITY_COEFFICIENT, golden.BANDWIDTH), 81.98928, rtol=1e-5
        )
        for name, (stride, expected) in golden.GRADIENTS.items():
            np.testing.assert_allclose(
                getattr(gradient, name).ravel()[::stride], expected, rtol=1e-5, atol=1e-8, err_msg=name
            )
        # The published reconstruction is of raw inputs; folding with no normalisation must not change it.
        folded = sae.fold(params, jnp.zeros(16), jnp.ones(()))
        recon = sae.decode(folded, sae.encode(folded, x))
        np.testing.assert_allclose(
            recon.ravel()[::5001], [-0.34825447, -0.12089294, -0.20722952, 1.4071178], rtol=1e-5
        )


@pytest.mark.parametrize("bandwidth", [0.05, 1.0])
def test_hand_written_gradient_equals_the_custom_vjp_form(random_case, bandwidth):
    with jax.enable_x64(True):
        params, x, weight = jax.tree.map(jnp.asarray, random_case)
        expected = jax.grad(sae.loss)(params, x, weight, 0.7, bandwidth)
        gradient, _ = sae.loss_gradient(params, x, weight, 0.7, bandwidth)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), gradient, expected
        )


def test_only_the_threshold_has_a_pseudo_derivative(random_case):
    """Where no pre-activation is near its threshold, finite differences give every other gradient."""
    with jax.enable_x64(True):
        params, x, weight = jax.tree.map(jnp.asarray, random_case)
        gradient, _ = sae.loss_gradient(params, x, weight, 0.0, 1e-9)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            leaf = getattr(params, name)
            index = tuple(1 for _ in leaf.shape)
            h = 1e-7
            low, high = (
                sae.loss(params.replace(**{name: leaf.at[index].add(s * h)}), x, weight, 0.0, 1e-9)
                for s in (-1, 1)
            )
            np.testing.assert_allclose(
                getattr(gradient, name)[index], (high - low) / (2 * h), rtol=1e-4, atol=1e-6
            )
        np.testing.assert_array_equal(gradient.log_threshold, 0)


def test_encoding_and_sums_equal_numpy(random_case):
    params, x, weight = random_case
    threshold = np.exp(params.log_threshold)
    pre = (x - params.b_dec) @ params.W_enc + params.b_enc
    f = pre * (pre > threshold)
    error = f @ params.W_dec + params.b_dec - x
    with jax.enable_x64(True):
        device = jax.tree.map(jnp.asarray, params)
        folded = sae.fold(device, jnp.zeros(12), jnp.ones(()))
        np.testing.assert_allclose(sae.encode(folded, jnp.asarray(x)), f, rtol=1e-9, atol=1e-12)
        _, sums = sae.loss_gradient(device, jnp.asarray(x), jnp.asarray(weight), 0.1, 0.1)
    np.testing.assert_allclose(sums.squared_error, weight @ np.square(error).sum(1))
    np.testing.assert_allclose(sums.l0, weight @ (f > 0).sum(1))
    np.testing.assert_allclose(sums.x_squared, weight @ np.square(x).sum(1))
    np.testing.assert_allclose(sums.x_D, weight @ x)
    np.testing.assert_array_equal(sums.fired_M, ((f > 0) & (weight > 0)[:, None]).any(0))


def test_rows_of_weight_zero_change_nothing(random_case):
    params, x, weight = jax.tree.map(jnp.asarray, random_case)
    gradient, sums = sae.loss_gradient(params, x, weight, 0.3, 0.2)
    spoilt = jnp.where(weight[:, None] > 0, x, 1e3)
    other_gradient, other_sums = sae.loss_gradient(params, spoilt, weight, 0.3, 0.2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradient, other_gradient
    )
    np.testing.assert_array_equal(sums.fired_M, other_sums.fired_M)


def test_a_batch_without_any_weight_has_no_gradient(random_case):
    params, x, weight = jax.tree.map(jnp.asarray, random_case)
    gradient, _ = sae.loss_gradient(params, x, 0 * weight, 0.3, 0.2)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_folding_equals_normalising_encoding_and_undoing():
    rng = np.random.default_rng(3)
    d, m, scale = 8, 24, 37.0
    mean, x = 5 * rng.normal(size=d), 40 * rng.normal(size=(50, d))
    W_dec = rng.normal(size=(m, d))
    arrays = dict(
        W_enc=rng.normal(size=(d, m)), b_enc=rng.normal(size=m), log_threshold=np.log(rng.random(m)), W_dec=W_dec,
        b_dec=rng.normal(size=d),
    )  # fmt: skip
    h = (x - mean) / scale
    pre = (h - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    f = pre * (pre > np.exp(arrays["log_threshold"]))
    expected = scale * (f @ W_dec + arrays["b_dec"]) + mean
    with jax.enable_x64(True):
        folded = sae.fold(
            sae.Params(**jax.tree.map(jnp.asarray, arrays)), jnp.asarray(mean), jnp.asarray(scale)
        )
        f_folded = sae.encode(folded, jnp.asarray(x))
        np.testing.assert_allclose(f_folded, scale * np.maximum(f, 0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(sae.decode(folded, f_folded), expected, rtol=1e-9, atol=1e-9)


def test_initialisation_is_gemma_scopes():
    params = sae.init(jax.random.key(0), 16, 256, 0.001)
    np.testing.assert_allclose(np.linalg.norm(params.W_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(params.W_enc, params.W_dec.T)
    np.testing.assert_allclose(np.exp(params.log_threshold), 0.001, rtol=1e-6)
    assert not params.b_enc.any() and not params.b_dec.any()
