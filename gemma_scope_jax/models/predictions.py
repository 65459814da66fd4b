"""Next-token predictions: logits, losses and divergences, without all logits in memory at once.

Shapes: S sequences, L context length, D width of the stream, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.gemma_package import gm


def logits(gemma: Gemma, x: jax.Array) -> jax.Array:
    """Logits [..., V] in float32, from the residual stream [..., D] after the last block."""

    def decode(model: gm.nn.Transformer) -> jax.Array:
        return model.embedder.decode(forward.float32_norm(x, model.final_norm))

    with forward.matmul_precision(x.dtype):
        values = gemma.module.apply({"params": gemma.params}, method=decode).astype(jnp.float32)
    cap = gemma.module.config.final_logit_softcap
    return values if cap is None else jnp.tanh(values / cap) * cap


def _by_positions(compute: Callable, arrays: tuple[jax.Array, ...], chunk: int) -> object:
    """Applies `compute` to arrays [S, L, …] a few positions at a time, and joins the results.

    Each step takes these positions of all rows, so that every chip computes its own rows. `chunk` is the number of
    predictions in a step.
    """
    rows, length = arrays[0].shape[:2]
    width = min(max(chunk // rows, 1), length)
    pad = -length % width

    def split(value: jax.Array) -> jax.Array:
        value = jnp.pad(value, ((0, 0), (0, pad), *[(0, 0)] * (value.ndim - 2)))
        return jnp.moveaxis(value.reshape(rows, -1, width, *value.shape[2:]), 1, 0)

    def join(value: jax.Array) -> jax.Array:
        return jnp.moveaxis(value, 0, 1).reshape(rows, -1, *value.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(lambda parts: compute(*parts), tuple(map(split, arrays))))


def next_token_loss(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array | None = None,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of each next token, from the residual stream after the last block.

    Args:
      gemma: the model.
      x_SxLxD: the residual stream after the last block.
      tokens_SxL: the packed rows.
      is_kept_SxL: the mask of positions that count; None for `masking.is_kept` without a prefix.
      chunk: the number of predictions whose logits [chunk, V] are in memory at a time; all would be [S, L, V].

    Returns:
      loss_SxL and weight_SxL in float32: the loss of predicting position t + 1 from position t, and 1 where
      it is scored; see `masking.is_scored`.
    """
    is_kept_SxL = masking.is_kept(tokens_SxL, 0) if is_kept_SxL is None else is_kept_SxL
    log_p_SxLx1 = log_probabilities(gemma, x_SxLxD, masking.next_tokens(tokens_SxL)[..., None], chunk)
    return -log_p_SxLx1[..., 0], masking.is_scored(tokens_SxL, is_kept_SxL).astype(jnp.float32)


def log_probabilities(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    tokens_SxLxT: jax.Array,
    chunk: int = 512,
) -> jax.Array:
    """Log-probabilities [S, L, T] of given tokens as the next token of each position; see `next_token_loss`."""

    def compute(x_SxCxD: jax.Array, tokens_SxCxT: jax.Array) -> jax.Array:
        logits_SxCxV = logits(gemma, x_SxCxD)
        chosen_SxCxT = jnp.take_along_axis(logits_SxCxV, tokens_SxCxT, axis=-1)
        return chosen_SxCxT - jax.nn.logsumexp(logits_SxCxV, axis=-1, keepdims=True)

    return _by_positions(compute, (x_SxLxD, tokens_SxLxT), chunk)


def next_token_divergence(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    clean_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each next token, and KL(clean ‖ x) of the two predictions, both [S, L] in nats.

    See `next_token_loss`; twice as many logits are in memory at a time.
    """

    def compute(x_SxCxD: jax.Array, clean_SxCxD: jax.Array, target_SxC: jax.Array) -> tuple:
        log_p_SxCxV = jax.nn.log_softmax(logits(gemma, x_SxCxD))
        clean_log_p_SxCxV = jax.nn.log_softmax(logits(gemma, clean_SxCxD))
        loss_SxC = -jnp.take_along_axis(log_p_SxCxV, target_SxC[..., None], axis=-1)[..., 0]
        return loss_SxC, (jnp.exp(clean_log_p_SxCxV) * (clean_log_p_SxCxV - log_p_SxCxV)).sum(-1)

    return _by_positions(compute, (x_SxLxD, clean_SxLxD, masking.next_tokens(tokens_SxL)), chunk)


def centred_logits(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    chunk: int = 512,
) -> jax.Array:
    """The logit of each next token minus the mean of all logits, [S, L] (Gemma Scope, appendix C)."""

    @jax.checkpoint
    def compute(x_SxCxD: jax.Array, target_SxC: jax.Array) -> jax.Array:
        logits_SxCxV = logits(gemma, x_SxCxD)
        correct_SxC = jnp.take_along_axis(logits_SxCxV, target_SxC[..., None], axis=-1)[..., 0]
        return correct_SxC - logits_SxCxV.mean(-1)

    return _by_positions(compute, (x_SxLxD, masking.next_tokens(tokens_SxL)), chunk)
