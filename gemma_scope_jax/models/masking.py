"""Masks over tokens: which are special, which see each other in a packed row, which are kept, which are scored.

A token that is not kept is neither trained on, spliced, nor predicted from. BOS, EOS and PAD never are: BOS has a
norm far above all others', and thousands of latents fire on it; EOS and PAD are no text. In the chat template the
tokens of the user prefix are not kept either, since they are the same in every document.
"""

import jax
import jax.numpy as jnp

from gemma_scope_jax import config as config_lib

PAD, EOS, BOS = 0, 1, 2  # The same in every Gemma.

# Of a document in the chat template: <start_of_turn>, "user" and a newline, behind BOS. A norm far above all
# others', and the same in every document: Gemma Scope leaves these positions out (section 4.5).
CHAT_PREFIX_LENGTH = 3


def is_special(tokens: jax.Array) -> jax.Array:
    """True at BOS, EOS and PAD: positions that are never trained on and never scored."""
    return (tokens == BOS) | (tokens == EOS) | (tokens == PAD)


def packed_positions(tokens_SxL: jax.Array) -> jax.Array:
    """Positions [S, L] of rows in which each segment begins with its own BOS, and at position 0."""
    index_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1])[None], tokens_SxL.shape)
    return index_SxL - jax.lax.cummax(jnp.where(tokens_SxL == BOS, index_SxL, 0), axis=1)


def packed_mask(tokens_SxL: jax.Array) -> jax.Array:
    """Attention mask [S, L, L] of packed rows: causal, and no segment sees another, nor padding.

    With positions that restart, a packed segment sees exactly what it would see alone.
    """
    segment_SxL = jnp.cumsum(tokens_SxL == BOS, axis=1)
    same_SxLxL = segment_SxL[:, :, None] == segment_SxL[:, None, :]
    causal_LxL = jnp.tri(tokens_SxL.shape[1], dtype=bool)
    return same_SxLxL & causal_LxL[None] & (tokens_SxL != PAD)[:, None, :]


def is_kept(tokens_SxL: jax.Array, prefix: int) -> jax.Array:
    """True at positions that are trained on, spliced and predicted from.

    Not at BOS, EOS and PAD, nor at the first `prefix` positions behind a segment's BOS, where the chat template
    has what is the same in every document.
    """
    return ~is_special(tokens_SxL) & (packed_positions(tokens_SxL) > prefix)


def next_tokens(tokens_SxL: jax.Array) -> jax.Array:
    """What is to be predicted at each position, [S, L]."""
    return jnp.pad(tokens_SxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)


def is_scored(tokens_SxL: jax.Array, is_kept_SxL: jax.Array) -> jax.Array:
    """Which predictions [S, L] count: those made from kept positions, unless the next token is BOS or PAD."""
    target_SxL = next_tokens(tokens_SxL)
    return is_kept_SxL & (target_SxL != PAD) & (target_SxL != BOS)


def masked_prefix(config: config_lib.DataConfig) -> int:
    """Positions after a segment's BOS that are the same in every document; see `masking.is_kept`."""
    return CHAT_PREFIX_LENGTH if config.chat_template else 0
