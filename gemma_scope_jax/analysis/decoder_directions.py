"""Decoder directions in the residual stream, and the tokens whose logits they raise and lower."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from gemma_scope_jax.models import predictions, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import distributed, reporting, sharding

# The maximum number of logits in memory at a time.
_LOGITS = 2**26


class Logits(NamedTuple):
    """The tokens with the highest and the lowest logits for each direction, the most extreme first."""

    highest_token_MxT: np.ndarray
    highest_MxT: np.ndarray
    lowest_token_MxT: np.ndarray
    lowest_MxT: np.ndarray


def in_stream(params: weights.Params, site: Site, W_dec_MxO: np.ndarray) -> np.ndarray | None:
    """Decoder directions [M, D] in the residual stream; None for a site whose values are not added to it.

    Directions of `attn_out` are mapped through the block's output projection and the gain of the norm after it. The
    norm's divisor is left out: it changes only the length, which the final norm removes.
    """
    if site.kind in ("resid_post", "mlp_out", "embed"):
        return W_dec_MxO
    if site.kind != "attn_out":
        return None
    block = params[f"layer_{site.layer}"]
    w_NxHxD, scale_D = distributed.fetch(
        (block["attn"]["attn_vec_einsum"]["w"], block["post_attention_norm"]["scale"])
    )
    w_NxHxD, gain_D = w_NxHxD.astype(np.float32), 1 + scale_D.astype(np.float32)
    return W_dec_MxO @ w_NxHxD.reshape(-1, w_NxHxD.shape[-1]) * gain_D


@functools.partial(jax.jit, static_argnames="top")
def _extremes(gemma: Gemma, x_CxD: jax.Array, top: int) -> tuple[jax.Array, ...]:
    logits_CxV = predictions.logits(gemma.whole(), x_CxD)
    highest, highest_token = jax.lax.top_k(logits_CxV, top)
    lowest, lowest_token = jax.lax.top_k(-logits_CxV, top)
    found = (highest_token, highest, lowest_token, -lowest)
    return sharding.constrain(gemma.mesh, found, sharding.REPLICATED)


def logits(gemma: Gemma, directions_MxD: np.ndarray, top: int = 10) -> Logits:
    """Next-token logits if each direction alone were the residual stream: final norm, unembedding, soft-cap.

    Args:
      gemma: the model.
      directions_MxD: the directions in the residual stream.
      top: how many of the highest and of the lowest logits to return for each direction.
    """
    vocabulary = gemma.module.config.num_embed
    chunk = -(-min(max(_LOGITS // vocabulary, 1), len(directions_MxD)) // gemma.mesh.size) * gemma.mesh.size
    placed = jax.NamedSharding(gemma.mesh, sharding.TOKENS)
    parts = []
    count = len(directions_MxD)
    with reporting.bar("Computing logits", "latent", count, speaks=count > chunk, compiles=1) as bar:
        for start in range(0, count, chunk):
            # All chunks have the same shape, so the function compiles once.
            x_CxD = directions_MxD[np.minimum(start + np.arange(chunk), count - 1)]
            x_CxD = np.asarray(x_CxD, gemma.dtype)
            put = jax.make_array_from_callback(x_CxD.shape, placed, lambda index, x=x_CxD: x[index])
            parts.append(distributed.fetch(_extremes(gemma, put, top)))
            bar.update(min(chunk, count - start))
    return Logits(*(np.concatenate(part)[: len(directions_MxD)] for part in zip(*parts, strict=True)))
