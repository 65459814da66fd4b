"""Cosines between decoder directions."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.runtime import distributed


def nearest_cosine(W_dec_MxO: np.ndarray, block: int = 1024) -> np.ndarray:
    """The cosine [M] of each decoder direction with the nearest direction of another latent."""
    unit_MxO = jnp.asarray(W_dec_MxO / np.maximum(np.linalg.norm(W_dec_MxO, axis=1, keepdims=True), 1e-30))
    count = len(unit_MxO)

    @jax.jit
    def of_block(start: jax.Array) -> jax.Array:
        rows = jnp.minimum(start + jnp.arange(min(block, count)), count - 1)
        cosines = jnp.matmul(unit_MxO[rows], unit_MxO.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(rows[:, None] == jnp.arange(count)[None], -1, cosines).max(1)

    parts = [np.asarray(of_block(jnp.asarray(start))) for start in range(0, count, block)]
    return np.concatenate(parts)[:count]


def nearest(W_dec_MxO: np.ndarray, top: int = 5, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """For each latent, the `top` latents with the nearest decoder directions [M, top], and their cosines."""
    unit_MxO = jnp.asarray(W_dec_MxO / np.maximum(np.linalg.norm(W_dec_MxO, axis=1, keepdims=True), 1e-30))
    count = len(unit_MxO)
    top = min(top, count - 1)

    @jax.jit
    def of_block(unit_MxO: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.minimum(start + jnp.arange(min(block, count)), count - 1)
        cosines = jnp.matmul(unit_MxO[rows], unit_MxO.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(jnp.where(rows[:, None] == jnp.arange(count)[None], -2, cosines), top)

    parts = [distributed.fetch(of_block(unit_MxO, jnp.asarray(start))) for start in range(0, count, block)]
    cosine, latent = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return latent, cosine
