"""The JumpReLU sparse autoencoder and transcoder: their arrays, loss, and the gradient that trains them.

A transcoder reads one site and predicts another (Gemma Scope, appendix B). It differs from an autoencoder in
three things: a target beside x, no pre-encoder bias, and W_enc not initialised from W_dec. It may have a skip
connection, which is affine and bypasses the latents (Gemma Scope 2).

Shapes: B activations in a batch, D width of the site read, O width of the site predicted (D for an autoencoder),
M latents. Nothing here knows of models, banks or files. Equations are those of Rajamanoharan et al., "Jumping
Ahead" (arXiv 2407.14435), and of Gemma Scope (arXiv 2408.05147), with row vectors: activations are rows and
`W_dec_MxO[i]` is latent i's direction.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

DENSE = 0.1  # A latent that fires on more than this share of activations counts as dense.

# From the mean L0 of a batch to what it costs.
Penalty = Callable[[jax.Array], jax.Array]


@flax.struct.dataclass
class Params:
    """A training SAE or transcoder. A bank of E of them carries a leading axis E on every array.

    The threshold is trained as its logarithm, so that it stays positive.
    """

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    log_threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, O]
    b_dec: jax.Array  # [O]
    W_skip: jax.Array | None = None  # [D, O], of a transcoder with a skip connection


@flax.struct.dataclass
class SAE:
    """A folded SAE or transcoder on raw activations, as it is published: no normalisation, no pre-encoder bias."""

    W_enc: jax.Array  # [D, M]
    b_enc: jax.Array  # [M]
    threshold: jax.Array  # [M]
    W_dec: jax.Array  # [M, O]
    b_dec: jax.Array  # [O]
    W_skip: jax.Array | None = None  # [D, O]


@flax.struct.dataclass
class BatchSums:
    """What one batch adds to the running metrics; sums over rows are by their weights."""

    weight: jax.Array  # []
    squared_error: jax.Array  # []
    l0: jax.Array  # []
    target_O: jax.Array  # [O], of x for an autoencoder
    target_variance: jax.Array  # [], of ‖y − mean‖², the mean being the batch's own
    penalty: jax.Array  # [], of the batch's mean L0
    rows: jax.Array  # [], int32, of a weight above 0
    fired_M: jax.Array  # [M], int32: of those rows, on how many each latent fired
    # What drives the thresholds: means over latents of the two parts of ∂/∂log θ without their signs, and the
    # share of latents that had any pre-activation within the kernel.
    theta_from_error: jax.Array  # []
    theta_from_sparsity: jax.Array  # []
    theta_reached: jax.Array  # []


def init(
    key: jax.Array,
    d: int,
    m: int,
    threshold: float,
    target_width: int | None = None,
    skip: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> Params:
    """Gemma Scope's initialisation (section 3.2): He-uniform decoder with unit rows, W_enc = W_decᵀ, no biases.

    With a `target_width` it is a transcoder's (appendix B): W_enc is drawn by itself, with columns of unit norm too.
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


def encode(sae: SAE, x_BxD: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """Latent activations f_BxM of raw activations."""
    pre_BxM = jnp.matmul(x_BxD, sae.W_enc, precision=precision) + sae.b_enc[None]
    return jnp.where(pre_BxM > sae.threshold[None], jax.nn.relu(pre_BxM), 0)


def keep_top(f_BxM: jax.Array, k: int) -> jax.Array:
    """The k strongest latents of each activation, zero in all others' place."""
    _, top_BxK = jax.lax.top_k(f_BxM, k)
    rows_Bx1 = jnp.arange(len(f_BxM))[:, None]
    return jnp.zeros_like(f_BxM).at[rows_Bx1, top_BxK].set(f_BxM[rows_Bx1, top_BxK])


def decode(
    sae: SAE,
    f_BxM: jax.Array,
    x_BxD: jax.Array | None = None,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """Raw activations [B, O] as reconstructed or predicted from latent activations.

    Args:
      sae: the SAE or transcoder.
      f_BxM: what `encode` gave.
      x_BxD: what was encoded; only a skip connection reads it.
      precision: of the matmuls.

    Raises:
      ValueError: there is a skip connection and no x.
    """
    out_BxO = jnp.matmul(f_BxM, sae.W_dec, precision=precision) + sae.b_dec[None]
    if sae.W_skip is None:
        return out_BxO
    if x_BxD is None:
        raise ValueError(
            "this transcoder has a skip connection: decoding needs the activations that were encoded"
        )
    return out_BxO + jnp.matmul(x_BxD, sae.W_skip, precision=precision)


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


def fold_transcoder(
    params: Params, mean_D: jax.Array, scale: jax.Array, target_mean_O: jax.Array, target_scale: jax.Array
) -> SAE:
    """The transcoder on raw activations that equals `params` on normalised ones.

    Those are (x - mean) / scale and, of what it predicts, (y - target mean) / target scale. Decoder rows keep their
    unit norm, so latent activations come out in units of the raw target.
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
    """The transcoder that makes of gain · x what `sae` makes of x.

    Gemma Scope's read what the MLP reads before its norm's gain, Gemma Scope 2's behind it.
    """
    return sae.replace(
        W_enc=sae.W_enc / gain_D[:, None],
        W_skip=None if sae.W_skip is None else sae.W_skip / gain_D[:, None],
    )


def linear_penalty(coefficient: jax.Array) -> Penalty:
    """λ‖f‖₀ (Gemma Scope, equation 4)."""
    return lambda l0: coefficient * l0


def quadratic_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """(λ / 2L0*)(‖f‖₀ − L0*)², as hard as λ‖f‖₀ where L0 is twice its target (Gemma Scope 2, equation 5).

    Of the batch's mean L0, so that tokens may differ in theirs. The equation is printed with 2 in place of ½, which
    is four times as hard as its text says: to use such a λ, multiply it by four.
    """
    return lambda l0: coefficient / (2 * target_l0) * jnp.square(l0 - target_l0)


def off_target(l0: jax.Array, target_l0: jax.Array) -> jax.Array:
    """How far L0 is above its target, in e-folds, from -1 to 1."""
    return jnp.clip(jnp.log(l0 / target_l0), -1, 1)


def controlled_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """λ‖f‖₀, λ being stronger above the target and weaker below it, by the square of L0 over its target.

    The part of a controller that acts at once; the other moves λ itself, until nothing is left for this one.
    """

    def penalty(l0: jax.Array) -> jax.Array:
        return coefficient * jax.lax.stop_gradient(jnp.exp(2 * off_target(l0, target_l0))) * l0

    return penalty


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
    params: Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    penalty: Penalty,
    bandwidth: float,
    target_BxO: jax.Array | None = None,
) -> jax.Array:
    """Weighted mean over rows of ‖x − x̂‖², plus the penalty on that of ‖f‖₀; with a target, that of ‖y − ŷ‖²."""
    threshold_M = jnp.exp(params.log_threshold)
    read_BxD = x_BxD - params.b_dec[None] if target_BxO is None else x_BxD
    pre_BxM = read_BxD @ params.W_enc + params.b_enc[None]
    recon_BxO = jumprelu(pre_BxM, threshold_M, bandwidth) @ params.W_dec + params.b_dec[None]
    if params.W_skip is not None:
        recon_BxO += x_BxD @ params.W_skip
    error_B = jnp.sum(jnp.square(recon_BxO - (x_BxD if target_BxO is None else target_BxO)), axis=1)
    l0_B = jnp.sum(step(pre_BxM, threshold_M, bandwidth), axis=1)
    row_weight_B = normalized(weight_B)
    # Nothing to learn from rows without weight, not even that their L0 is off its target.
    return jnp.sum(row_weight_B * error_B) + row_weight_B.sum() * penalty(jnp.sum(row_weight_B * l0_B))


def normalized(weight_B: jax.Array) -> jax.Array:
    """Weights that add up to 1, or zeros."""
    total = weight_B.sum()
    return weight_B / jnp.where(total > 0, total, 1)


def loss_gradient(
    params: Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    penalty: Penalty,
    bandwidth: float,
    target_BxO: jax.Array | None = None,
    precision: jax.lax.Precision | None = None,
) -> tuple[Params, BatchSums]:
    """The gradient of `loss`, written out: five matmuls and no gradient for x.

    Only θ has a pseudo-derivative; the pre-activation has its true derivative H(z − θ). An autoencoder's
    pre-encoder bias makes b_dec act twice: ∂b_dec = Σr − W_enc·Σdz. A skip connection takes two more matmuls.
    """

    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision)

    row_weight_B = normalized(weight_B)
    threshold_M = jnp.exp(params.log_threshold)
    y_BxO = x_BxD if target_BxO is None else target_BxO

    centred_BxO = y_BxO - params.b_dec[None]
    read_BxD = centred_BxO if target_BxO is None else x_BxD
    pre_BxM = matmul(read_BxD, params.W_enc) + params.b_enc[None]
    active_BxM = pre_BxM > threshold_M[None]
    f_BxM = jnp.where(active_BxM, pre_BxM, 0)
    error_BxO = matmul(f_BxM, params.W_dec) - centred_BxO
    if params.W_skip is not None:
        error_BxO += matmul(x_BxD, params.W_skip)
    l0_B = jnp.sum(active_BxM, axis=1, dtype=x_BxD.dtype)
    penalty_value, slope = jax.value_and_grad(penalty)(jnp.sum(row_weight_B * l0_B))

    g_recon_BxO = 2 * row_weight_B[:, None] * error_BxO
    g_f_BxM = matmul(g_recon_BxO, params.W_dec.T)
    g_pre_BxM = jnp.where(active_BxM, g_f_BxM, 0)
    g_b_enc_M = g_pre_BxM.sum(0)
    g_b_dec_O = g_recon_BxO.sum(0)
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    # θ's gradient in its two parts: what the error wants, and what sparsity wants.
    g_error_M = -(threshold_M / bandwidth) * jnp.where(kernel_BxM, g_f_BxM, 0).sum(0)
    reached_M = jnp.where(kernel_BxM, row_weight_B[:, None], 0).sum(0)
    g_sparsity_M = -slope / bandwidth * reached_M

    gradient = Params(
        W_enc=matmul(read_BxD.T, g_pre_BxM),
        b_enc=g_b_enc_M,
        log_threshold=threshold_M * (g_error_M + g_sparsity_M),
        W_dec=matmul(f_BxM.T, g_recon_BxO),
        b_dec=g_b_dec_O - matmul(params.W_enc, g_b_enc_M) if target_BxO is None else g_b_dec_O,
        W_skip=None if params.W_skip is None else matmul(x_BxD.T, g_recon_BxO),
    )
    has_weight_B = weight_B > 0
    # Sums and not matmuls, which on TPU would round their inputs to bfloat16; of what is centred, since a mean square
    # less a squared mean is nothing but rounding where the mean is large.
    target_O = jnp.sum(weight_B[:, None] * y_BxO, axis=0)
    mean_O = target_O / jnp.where(weight_B.sum() > 0, weight_B.sum(), 1)
    sums = BatchSums(
        weight=weight_B.sum(),
        squared_error=jnp.sum(weight_B[:, None] * jnp.square(error_BxO)),
        l0=jnp.sum(weight_B * l0_B),
        target_O=target_O,
        target_variance=jnp.sum(weight_B[:, None] * jnp.square(y_BxO - mean_O[None])),
        penalty=penalty_value,
        rows=has_weight_B.sum(dtype=jnp.int32),
        fired_M=(active_BxM & has_weight_B[:, None]).sum(0, dtype=jnp.int32),
        theta_from_error=jnp.abs(threshold_M * g_error_M).mean(),
        theta_from_sparsity=jnp.abs(threshold_M * g_sparsity_M).mean(),
        theta_reached=(reached_M > 0).mean(dtype=x_BxD.dtype),
    )
    return gradient, sums
