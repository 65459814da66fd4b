"""Masks over tokens: special tokens, attention in packed rows, kept positions and scored predictions.

A token that is not kept is neither trained on, spliced, nor predicted from. BOS, EOS and PAD are never kept: BOS has
a norm far above that of all other tokens, and thousands of latents fire on it; EOS and PAD are not text. In the chat
template the tokens of the user prefix are not kept either, since they are the same in every document.
"""

import jax
import jax.numpy as jnp

from gemma_scope_jax import config as config_lib

PAD, EOS, BOS = 0, 1, 2  # The same in every Gemma.

# The user prefix of a document in the chat template: <start_of_turn>, "user" and a newline, after BOS. Their norms
# are far above all others, and they are the same in every document: Gemma Scope leaves them out (section 4.5).
CHAT_PREFIX_LENGTH = 3


def is_special(tokens: jax.Array) -> jax.Array:
    """True at BOS, EOS and PAD: positions that are never trained on or scored."""
    return (tokens == BOS) | (tokens == EOS) | (tokens == PAD)


def packed_positions(tokens_SxL: jax.Array) -> jax.Array:
    """Positions [S, L] in packed rows; each segment begins with its own BOS, at position 0."""
    index_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1])[None], tokens_SxL.shape)
    return index_SxL - jax.lax.cummax(jnp.where(tokens_SxL == BOS, index_SxL, 0), axis=1)


def packed_mask(tokens_SxL: jax.Array) -> jax.Array:
    """Attention mask [S, L, L] of packed rows: causal, within each segment, and never to padding.

    With positions that restart, a packed segment sees exactly what it would see alone.
    """
    segment_SxL = jnp.cumsum(tokens_SxL == BOS, axis=1)
    same_SxLxL = segment_SxL[:, :, None] == segment_SxL[:, None, :]
    causal_LxL = jnp.tri(tokens_SxL.shape[1], dtype=bool)
    return same_SxLxL & causal_LxL[None] & (tokens_SxL != PAD)[:, None, :]


def is_kept(tokens_SxL: jax.Array, prefix: int) -> jax.Array:
    """True at positions that are trained on, spliced and predicted from.

    False at BOS, EOS and PAD, and at the first `prefix` positions after a segment's BOS, where the chat template has
    the same tokens in every document.
    """
    return ~is_special(tokens_SxL) & (packed_positions(tokens_SxL) > prefix)


def next_tokens(tokens_SxL: jax.Array) -> jax.Array:
    """The target token of each position, [S, L]."""
    return jnp.pad(tokens_SxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)


def is_scored(tokens_SxL: jax.Array, is_kept_SxL: jax.Array) -> jax.Array:
    """True at predictions [S, L] that count: those from kept positions, unless the next token is BOS or PAD."""
    target_SxL = next_tokens(tokens_SxL)
    return is_kept_SxL & (target_SxL != PAD) & (target_SxL != BOS)


def masked_prefix(config: config_lib.DataConfig) -> int:
    """The number of positions after a segment's BOS that are the same in every document; see `is_kept`."""
    return CHAT_PREFIX_LENGTH if config.chat_template else 0
