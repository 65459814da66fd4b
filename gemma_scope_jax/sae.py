"""The JumpReLU sparse autoencoder: five arrays, its loss, and the gradient that trains it.

Shapes: B activations in a batch, D site width, M latents. Nothing here knows of models, banks or files.
Equations are those of Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435), and of Gemma Scope
(arXiv 2408.05147), with row vectors: activations are rows and `W_dec_MxD[i]` is latent i's direction.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Params:
    """A training SAE. A bank of E of them carries a leading axis E on every array.

    The threshold is trained as its logarithm, so that it stays positive.
    """

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    log_threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, D]
    b_dec: jax.Array  # [D]


@flax.struct.dataclass
class SAE:
    """A folded SAE on raw activations, as it is published: no normalisation, no pre-encoder bias."""

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, D]
    b_dec: jax.Array  # [D]


@flax.struct.dataclass
class BatchSums:
    """What one batch adds to the running metrics, summed over its rows by their weights."""

    weight: jax.Array  # []
    squared_error: jax.Array  # []
    l0: jax.Array  # []
    x_D: jax.Array  # [D]
    x_squared: jax.Array  # []
    fired_M: jax.Array  # [M], bool


def init(key: jax.Array, d: int, m: int, threshold: float, dtype: jnp.dtype = jnp.float32) -> Params:
    """Gemma Scope's initialisation (section 3.2): He-uniform decoder with unit rows, W_enc = W_decᵀ, no biases."""
    W_dec_MxD = jax.nn.initializers.he_uniform()(key, (m, d), dtype)
    W_dec_MxD /= jnp.linalg.norm(W_dec_MxD, axis=1, keepdims=True)
    return Params(
        W_enc=W_dec_MxD.T,
        b_enc=jnp.zeros(m, dtype),
        log_threshold=jnp.full(m, jnp.log(threshold), dtype),
        W_dec=W_dec_MxD,
        b_dec=jnp.zeros(d, dtype),
    )


def encode(sae: SAE, x_BxD: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """Latent activations f_BxM of raw activations."""
    pre_BxM = jnp.matmul(x_BxD, sae.W_enc, precision=precision) + sae.b_enc[None]
    return jnp.where(pre_BxM > sae.threshold[None], jax.nn.relu(pre_BxM), 0)


def decode(sae: SAE, f_BxM: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """Reconstructed raw activations from latent activations."""
    return jnp.matmul(f_BxM, sae.W_dec, precision=precision) + sae.b_dec[None]


def fold(params: Params, mean_D: jax.Array, scale: jax.Array) -> SAE:
    """The SAE on raw activations that equals `params` on (x - mean) / scale (Gemma Scope, appendix A).

    Decoder rows keep their unit norm, so latent activations come out in units of raw activations.
    """
    return SAE(
        W_enc=params.W_enc,
        b_enc=scale * params.b_enc - (scale * params.b_dec + mean_D) @ params.W_enc,
        threshold=scale * jnp.exp(params.log_threshold),
        W_dec=params.W_dec,
        b_dec=scale * params.b_dec + mean_D,
    )


# The definition: a loss whose threshold has pseudo-derivatives. Readable, but `jax.grad` of it costs half as
# much again as `loss_gradient` below, which is what trains; tests hold the two equal.


def _in_kernel(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    return jnp.abs(pre - threshold) < bandwidth / 2


@jax.custom_vjp
def jumprelu(pre_BxM: jax.Array, threshold_M: jax.Array, bandwidth: float) -> jax.Array:
    """z·H(z − θ), with the rectangle kernel's pseudo-derivative for θ (equation 11)."""
    del bandwidth
    return jnp.where(pre_BxM > threshold_M[None], pre_BxM, 0)


def _jumprelu_bwd(saved: tuple, g_BxM: jax.Array) -> tuple:
    pre_BxM, threshold_M, bandwidth = saved
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    g_pre_BxM = jnp.where(pre_BxM > threshold_M[None], g_BxM, 0)
    g_threshold_M = -(threshold_M / bandwidth) * jnp.sum(kernel_BxM * g_BxM, axis=0)
    return g_pre_BxM, g_threshold_M, None


jumprelu.defvjp(lambda *args: (jumprelu(*args), args), _jumprelu_bwd)


@jax.custom_vjp
def step(pre_BxM: jax.Array, threshold_M: jax.Array, bandwidth: float) -> jax.Array:
    """H(z − θ), with a pseudo-derivative for θ and none for z (equation 12)."""
    del bandwidth
    return (pre_BxM > threshold_M[None]).astype(pre_BxM.dtype)


def _step_bwd(saved: tuple, g_BxM: jax.Array) -> tuple:
    pre_BxM, threshold_M, bandwidth = saved
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    return jnp.zeros_like(pre_BxM), -jnp.sum(kernel_BxM * g_BxM, axis=0) / bandwidth, None


step.defvjp(lambda *args: (step(*args), args), _step_bwd)


def loss(
    params: Params, x_BxD: jax.Array, weight_B: jax.Array, sparsity_coefficient: jax.Array, bandwidth: float
) -> jax.Array:
    """Weighted mean over rows of ‖x − x̂‖² + λ‖f‖₀ (Gemma Scope, equation 4); 0 if all weights are 0."""
    threshold_M = jnp.exp(params.log_threshold)
    pre_BxM = (x_BxD - params.b_dec[None]) @ params.W_enc + params.b_enc[None]
    recon_BxD = jumprelu(pre_BxM, threshold_M, bandwidth) @ params.W_dec + params.b_dec[None]
    error_B = jnp.sum(jnp.square(recon_BxD - x_BxD), axis=1)
    l0_B = jnp.sum(step(pre_BxM, threshold_M, bandwidth), axis=1)
    return jnp.sum(normalized(weight_B) * (error_B + sparsity_coefficient * l0_B))


def normalized(weight_B: jax.Array) -> jax.Array:
    """Weights that add up to 1, or zeros."""
    total = weight_B.sum()
    return weight_B / jnp.where(total > 0, total, 1)


def loss_gradient(
    params: Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    sparsity_coefficient: jax.Array,
    bandwidth: float,
    precision: jax.lax.Precision | None = None,
) -> tuple[Params, BatchSums]:
    """The gradient of `loss`, written out: five matmuls and no gradient for x.

    Only θ has a pseudo-derivative; the pre-activation has its true derivative H(z − θ). The pre-encoder bias
    makes b_dec act twice: ∂b_dec = Σr − W_enc·Σdz.
    """

    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision)

    row_weight_B = normalized(weight_B)
    threshold_M = jnp.exp(params.log_threshold)

    centred_BxD = x_BxD - params.b_dec[None]
    pre_BxM = matmul(centred_BxD, params.W_enc) + params.b_enc[None]
    active_BxM = pre_BxM > threshold_M[None]
    f_BxM = jnp.where(active_BxM, pre_BxM, 0)
    error_BxD = matmul(f_BxM, params.W_dec) - centred_BxD

    g_recon_BxD = 2 * row_weight_B[:, None] * error_BxD
    g_f_BxM = matmul(g_recon_BxD, params.W_dec.T)
    g_pre_BxM = jnp.where(active_BxM, g_f_BxM, 0)
    g_b_enc_M = g_pre_BxM.sum(0)
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    g_threshold_BxM = threshold_M[None] * g_f_BxM + sparsity_coefficient * row_weight_B[:, None]
    g_threshold_M = -jnp.where(kernel_BxM, g_threshold_BxM, 0).sum(0) / bandwidth

    gradient = Params(
        W_enc=matmul(centred_BxD.T, g_pre_BxM),
        b_enc=g_b_enc_M,
        log_threshold=threshold_M * g_threshold_M,
        W_dec=matmul(f_BxM.T, g_recon_BxD),
        b_dec=g_recon_BxD.sum(0) - matmul(params.W_enc, g_b_enc_M),
    )
    counted_BxM = active_BxM & (weight_B[:, None] > 0)
    sums = BatchSums(
        weight=weight_B.sum(),
        squared_error=jnp.sum(weight_B[:, None] * jnp.square(error_BxD)),
        l0=jnp.sum(weight_B * jnp.sum(active_BxM, axis=1, dtype=x_BxD.dtype)),
        # A sum and not a matmul, which on TPU would round its inputs to bfloat16.
        x_D=jnp.sum(weight_B[:, None] * x_BxD, axis=0),
        x_squared=jnp.sum(weight_B[:, None] * jnp.square(x_BxD)),
        fired_M=counted_BxM.any(0),
    )
    return gradient, sums
