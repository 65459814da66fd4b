"""The JumpReLU sparse autoencoder and transcoder: their arrays and forward computation.

A transcoder reads one site and predicts another (Gemma Scope, appendix B). It differs from an autoencoder in three
ways: it has a target other than x, it has no pre-encoder bias, and W_enc is not initialised from W_dec. It may have
an affine skip connection, which bypasses the latents (Gemma Scope 2).

Shapes: B activations in a batch, D width of the site read, O width of the site predicted (D for an autoencoder),
M latents. This module does not depend on models, banks or files. Equations are those of Rajamanoharan et al.,
"Jumping Ahead" (arXiv 2407.14435), and of Gemma Scope (arXiv 2408.05147), with row vectors: activations are rows,
and `W_dec_MxO[i]` is the direction of latent i.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.runtime.errors import FormatError

# The default is full float32: a TPU would round inputs to bfloat16, which flips latents near their thresholds.
EXACT = jax.lax.Precision.HIGHEST

DENSE = 0.1  # A latent that fires on more than this share of activations counts as dense.


@flax.struct.dataclass
class Params:
    """The parameters of an SAE or transcoder in training; in a bank of E members, arrays have a leading axis E.

    The logarithm of the threshold is trained, so that the threshold stays positive.
    """

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    log_threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, O]
    b_dec: jax.Array  # [O]
    W_skip: jax.Array | None = None  # [D, O], for a transcoder with a skip connection


@flax.struct.dataclass
class SAE:
    """A folded SAE or transcoder for raw activations, as published: no normalisation, no pre-encoder bias."""

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, O]
    b_dec: jax.Array  # [O]
    W_skip: jax.Array | None = None  # [D, O]


def init(
    key: jax.Array,
    d: int,
    m: int,
    threshold: float,
    target_width: int | None = None,
    skip: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> Params:
    """Gemma Scope's initialisation (section 3.2): He-uniform decoder with unit rows, W_enc = W_decᵀ, zero biases.

    With a `target_width`, initialises a transcoder (appendix B): W_enc is sampled separately, with unit columns.
    """

    def unit_rows(key: jax.Array, width: int) -> jax.Array:
        rows_MxD = jax.nn.initializers.he_uniform()(key, (m, width), dtype)
        return rows_MxD / jnp.linalg.norm(rows_MxD, axis=1, keepdims=True)

    W_dec_MxO = unit_rows(key, target_width or d)
    return Params(
        W_enc=(unit_rows(jax.random.fold_in(key, 1), d) if target_width else W_dec_MxO).T,
        b_enc=jnp.zeros(m, dtype),
        log_threshold=jnp.full(m, jnp.log(threshold), dtype),
        W_dec=W_dec_MxO,
        b_dec=jnp.zeros(W_dec_MxO.shape[1], dtype),
        W_skip=jnp.zeros((d, target_width), dtype) if skip else None,
    )


def encode(sae: SAE, x_BxD: jax.Array, precision: jax.lax.Precision = EXACT) -> jax.Array:
    """Latent activations f_BxM of raw activations."""
    pre_BxM = jnp.matmul(x_BxD, sae.W_enc, precision=precision) + sae.b_enc[None]
    return jnp.where(pre_BxM > sae.threshold[None], jax.nn.relu(pre_BxM), 0)


def keep_top(f_BxM: jax.Array, k: int) -> jax.Array:
    """Keeps the k strongest latents of each activation and sets the others to zero."""
    _, top_BxK = jax.lax.top_k(f_BxM, k)
    rows_Bx1 = jnp.arange(len(f_BxM))[:, None]
    return jnp.zeros_like(f_BxM).at[rows_Bx1, top_BxK].set(f_BxM[rows_Bx1, top_BxK])


def decode(
    sae: SAE,
    f_BxM: jax.Array,
    x_BxD: jax.Array | None = None,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """The reconstruction, or a transcoder's prediction, of raw activations [B, O] from latent activations.

    Args:
      sae: the SAE or transcoder.
      f_BxM: the latent activations from `encode`.
      x_BxD: the activations that were encoded; used only by a skip connection.
      precision: the precision of the matmuls.

    Raises:
      ValueError: if there is a skip connection and no `x_BxD`.
    """
    out_BxO = jnp.matmul(f_BxM, sae.W_dec, precision=precision) + sae.b_dec[None]
    if sae.W_skip is None:
        return out_BxO
    if x_BxD is None:
        raise FormatError(
            "this transcoder has a skip connection; to decode, also give the activations that were encoded"
        )
    return out_BxO + jnp.matmul(x_BxD, sae.W_skip, precision=precision)


def fold(params: Params, mean_D: jax.Array, scale: jax.Array) -> SAE:
    """The SAE on raw activations that equals `params` on (x - mean) / scale (Gemma Scope, appendix A).

    The normaliser's mean and scale are folded into thresholds and biases, so users need neither. Decoder rows keep
    their unit norm, so latent activations are in units of raw activations.
    """
    return SAE(
        W_enc=params.W_enc,
        b_enc=scale * params.b_enc - (scale * params.b_dec + mean_D) @ params.W_enc,
        threshold=scale * jnp.exp(params.log_threshold),
        W_dec=params.W_dec,
        b_dec=scale * params.b_dec + mean_D,
    )


def fold_transcoder(
    params: Params, mean_D: jax.Array, scale: jax.Array, target_mean_O: jax.Array, target_scale: jax.Array
) -> SAE:
    """The transcoder on raw activations that equals `params` on normalised ones.

    The normalised input is (x - mean) / scale, the normalised target (y - target mean) / target scale. Decoder rows
    keep their unit norm, so latent activations are in units of the raw target.
    """
    W_enc_DxM = target_scale / scale * params.W_enc
    b_dec_O = target_scale * params.b_dec + target_mean_O
    W_skip_DxO = None
    if params.W_skip is not None:
        W_skip_DxO = target_scale / scale * params.W_skip
        b_dec_O = b_dec_O - mean_D @ W_skip_DxO
    return SAE(
        W_enc=W_enc_DxM,
        b_enc=target_scale * params.b_enc - mean_D @ W_enc_DxM,
        threshold=target_scale * jnp.exp(params.log_threshold),
        W_dec=params.W_dec,
        b_dec=b_dec_O,
        W_skip=W_skip_DxO,
    )


def read_scaled(sae: SAE, gain_D: jax.Array) -> SAE:
    """The transcoder whose output on gain · x is that of `sae` on x.

    Gemma Scope's transcoders read the MLP's input before its norm's gain, Gemma Scope 2's after it.
    """
    return sae.replace(
        W_enc=sae.W_enc / gain_D[:, None],
        W_skip=None if sae.W_skip is None else sae.W_skip / gain_D[:, None],
    )
