"""Baselines are as sparse as the SAE, and optimal among their kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_sae

from gemma_scope_jax.evaluation import baselines, measuring
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached, jumprelu

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, 32)) * np.linspace(0.1, 2, 32) @ rng.normal(size=(32, 32))
    return (mixed / mixed.std() + 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def made(x):
    subject = attached.Subject(random_sae(), SITE, None)
    return subject, baselines.of(subject, x, x)


def l0_of(subject, x):
    x = jnp.asarray(x)[None]
    recon, found = measuring.measure(
        subject.sae, x, x, jnp.zeros(32), jnp.ones(x.shape[:2], bool), None, subject.top_k
    )
    return float(found["l0_SxL"].mean()), np.asarray(recon[0])


def test_baselines_are_as_sparse_as_the_sae(made, x):
    subject, found = made
    l0, _ = l0_of(subject, x)
    assert set(found) == {"top_k", "random_decoder", "untrained", "pca"} and l0 > 3
    assert l0_of(found["random_decoder"], x)[0] == l0
    assert l0_of(found["pca"], x)[0] == round(l0)
    np.testing.assert_allclose(l0_of(found["untrained"], x)[0], l0, rtol=0.01)
    # The top_k baseline keeps the k strongest latents, whatever their thresholds.
    top, recon = l0_of(found["top_k"], x)
    f = np.maximum(x.astype(np.float64) @ subject.sae.W_enc + subject.sae.b_enc, 0)
    np.testing.assert_allclose(top, np.minimum((f > 0).sum(1), round(l0)).mean())
    assert top > round(l0) - 0.1
    f[f < np.sort(f, axis=1)[:, [-round(l0)]]] = 0
    np.testing.assert_allclose(recon, f @ subject.sae.W_dec + subject.sae.b_dec, atol=1e-3)


def test_principal_components_are_the_best_projection(made, x):
    """Compared with a singular value decomposition of the centred activations."""
    subject, found = made
    k, mean = round(l0_of(subject, x)[0]), x.astype(np.float64).mean(0)
    u, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    np.testing.assert_allclose(l0_of(found["pca"], x)[1], mean + (u[:, :k] * s[:k]) @ vt[:k], atol=1e-4)


@pytest.mark.parametrize("name", ["random_decoder", "untrained"])
def test_scale_and_bias_are_the_least_squares_fit(made, x, name):
    """The error has zero mean and is uncorrelated with the reconstruction."""
    _, recon = l0_of(made[1][name], x)
    error = x - recon
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-4)
    centred = recon - recon.mean(0)
    assert abs((error * centred).sum()) < 1e-4 * np.linalg.norm(error) * np.linalg.norm(centred)


def test_the_strongest_latents_are_kept():
    f = jnp.array([[0.0, 3, 1, 2], [0, 0, 5, 0]])
    np.testing.assert_array_equal(jumprelu.keep_top(f, 2), [[0, 3, 0, 2], [0, 0, 5, 0]])


def test_a_transcoder_has_fewer_baselines(x):
    y = x[:, ::-1].copy()
    subject = attached.Subject(random_sae(), Site("mlp_in", 1), None, Site("mlp_out", 1))
    assert set(baselines.of(subject, x, y)) == {"top_k", "random_decoder"}
