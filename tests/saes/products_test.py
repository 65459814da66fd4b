"""Tests for the precisions of an update's products, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_scope_jax.saes import jumprelu, objectives, products


@pytest.fixture(scope="module")
def operands():
    """Two matrices with entries of very different sizes."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(64, 256)), rng.normal(size=(256, 32))
    return tuple(np.float32(x * np.exp(rng.normal(size=x.shape))) for x in (a, b))


def rounded(x):
    """The values that bfloat16 rounds to, in float64."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def relative_error(found, exact, a, b):
    """The largest error of an entry, relative to the norms of its row and column."""
    scale = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=0)[None]
    return (np.abs(found - exact) / scale).max()


def test_one_pass_multiplies_operands_rounded_to_bfloat16(operands):
    a, b = operands
    found = jax.jit(products.matmul, static_argnums=2)(a, b, "emulated_default")
    np.testing.assert_allclose(found, rounded(a) @ rounded(b), rtol=1e-4, atol=1e-4)
    exact = np.float64(a) @ np.float64(b)
    error = relative_error(np.float64(found), exact, a, b)
    assert 1e-5 < error < 2**-8


def test_three_passes_multiply_the_first_two_bfloat16_parts(operands):
    a, b = map(np.float64, operands)
    found = np.float64(jax.jit(products.matmul, static_argnums=2)(*operands, "emulated_high"))
    a1, b1 = rounded(a), rounded(b)
    a2, b2 = rounded(a - a1), rounded(b - b1)
    np.testing.assert_allclose(found, a1 @ b1 + a1 @ b2 + a2 @ b1, rtol=1e-5, atol=1e-4)
    error = relative_error(found, a @ b, a, b)
    assert error < 2**-16


# The gradients that depend on each product, by the chain rule; the encoder's also decides which latents fire.
DEPENDENT = {
    "encode": {"W_enc", "b_enc", "log_threshold", "W_dec", "b_dec"},
    "decode": {"W_enc", "b_enc", "log_threshold", "W_dec", "b_dec"},
    "latent_gradient": {"W_enc", "b_enc", "log_threshold", "b_dec"},
    "encoder_gradient": {"W_enc"},
    "decoder_gradient": {"W_dec"},
}


@pytest.mark.parametrize("product", DEPENDENT)
def test_a_products_precision_changes_only_the_gradients_that_depend_on_it(product):
    rng = np.random.default_rng(0)
    d, m, b = 16, 32, 64

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = jumprelu.Params(random(d, m), random(m), jnp.full(m, -1.0), random(m, d), random(d))
    of = jax.jit(objectives.loss_gradient, static_argnames=("penalty", "precision"))
    penalty = objectives.linear_penalty(1e-3)
    x_BxD, weight_B = random(b, d), jnp.ones(b)
    exact, _ = of(params, x_BxD, weight_B, penalty, 0.5, precision=products.HIGHEST)
    one_pass = dataclasses.replace(products.HIGHEST, **{product: "emulated_default"})
    found, _ = of(params, x_BxD, weight_B, penalty, 0.5, precision=one_pass)
    changed = {
        name
        for name in DEPENDENT["encode"]
        if not jnp.allclose(vars(exact)[name], vars(found)[name], rtol=1e-4)
    }
    assert changed == DEPENDENT[product]
