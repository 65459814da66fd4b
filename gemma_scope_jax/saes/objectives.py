"""Training objectives: squared error plus a penalty on how often latents fire, and their gradients.

`OBJECTIVES` holds them by name, and `register` adds one (docs/extending.md). `loss` is the definition. Training uses
`loss_gradient`, which costs two thirds of `jax.grad` of `loss`. Shapes and equations are those of `jumprelu`.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.saes import jumprelu, products


class Sparsity(NamedTuple):
    """How sparse the latents are on a batch of weighted rows."""

    l0: jax.Array  # [], mean number of latents that fire: the sum of `frequency_M`
    frequency_M: jax.Array  # [M], the share of rows on which each latent fires


# Maps the sparsity of a batch to its cost, [].
Penalty = Callable[[Sparsity], jax.Array]


class Examples(NamedTuple):
    """The examples that one SAE is trained on in one update."""

    x_BxD: jax.Array  # the input, normalised
    weight_B: jax.Array
    target_BxO: jax.Array | None  # a transcoder's target, normalised; None for an autoencoder


@flax.struct.dataclass
class BatchSums:
    """The contribution of one batch to the running metrics; sums over rows are weighted."""

    weight: jax.Array  # []
    squared_error: jax.Array  # []
    l0: jax.Array  # []
    target_O: jax.Array  # [O], the sum of targets; x is the target of an autoencoder
    target_variance: jax.Array  # [], the sum of ‖y − mean‖², with the batch's own mean
    penalty: jax.Array  # [], at the batch's sparsity
    rows: jax.Array  # [], int32: the number of rows with a weight above 0
    fired_M: jax.Array  # [M], int32: on how many of those rows each latent fired
    # What drives the thresholds: the mean absolute value, over latents, of each of the two parts of ∂/∂log θ, and
    # the share of latents with any pre-activation within the kernel.
    theta_from_error: jax.Array  # []
    theta_from_sparsity: jax.Array  # []
    theta_reached: jax.Array  # []


def linear_penalty(coefficient: jax.Array) -> Penalty:
    """λ‖f‖₀ (Gemma Scope, equation 4)."""
    return lambda sparsity: coefficient * sparsity.l0


def quadratic_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """(λ / 2L0*)(‖f‖₀ − L0*)², as steep as λ‖f‖₀ where L0 is twice its target (Gemma Scope 2, equation 5).

    It applies to the batch's mean L0, so single tokens can differ from the target. The paper prints the equation with
    2 instead of ½, which is four times as steep as its text says. To use a λ for the printed form, multiply it by
    four.
    """
    return lambda sparsity: coefficient / (2 * target_l0) * jnp.square(sparsity.l0 - target_l0)


def off_target(l0: jax.Array, target_l0: jax.Array) -> jax.Array:
    """How far L0 is above its target, in e-folds, clipped to [-1, 1]."""
    return jnp.clip(jnp.log(l0 / target_l0), -1, 1)


def controlled_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """λ‖f‖₀ times the square of L0 over its target: stronger above the target, weaker below it.

    This part of the controller acts at once. The other, `controlled_coefficient`, moves λ until L0 is on target.
    """

    def penalty(sparsity: Sparsity) -> jax.Array:
        strength = jax.lax.stop_gradient(jnp.exp(2 * off_target(sparsity.l0, target_l0)))
        return coefficient * strength * sparsity.l0

    return penalty


# How fast a controller moves log λ, in learning rates per update for each e-fold that L0 is off its target. The
# thresholds, through which L0 follows, move slower: by about one. `controlled_penalty` acts at once and damps λ.
CONTROLLER_SPEED = 5


def controlled_coefficient(
    coefficient: jax.Array, l0: jax.Array, target_l0: jax.Array, rate: jax.Array
) -> jax.Array:
    """λ for the next update, from how far L0 is off its target in this one."""
    return coefficient * jnp.exp(CONTROLLER_SPEED * rate * off_target(l0, target_l0))


# The definition: a loss with pseudo-derivatives for the threshold. It is readable, but `jax.grad` of it costs 1.5
# times as much as `loss_gradient` below, which training uses. Tests check that the two are equal.
def _in_kernel(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    return jnp.abs(pre - threshold) < bandwidth / 2


@jax.custom_vjp
def jump_relu(pre_BxM: jax.Array, threshold_M: jax.Array, bandwidth: float) -> jax.Array:
    """z·H(z − θ), with the rectangle kernel's pseudo-derivative for θ (equation 11)."""
    del bandwidth
    return jnp.where(pre_BxM > threshold_M[None], pre_BxM, 0)


def _jump_relu_bwd(saved: tuple, g_BxM: jax.Array) -> tuple:
    pre_BxM, threshold_M, bandwidth = saved
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    g_pre_BxM = jnp.where(pre_BxM > threshold_M[None], g_BxM, 0)
    g_threshold_M = -(threshold_M / bandwidth) * jnp.sum(kernel_BxM * g_BxM, axis=0)
    return g_pre_BxM, g_threshold_M, None


jump_relu.defvjp(lambda *args: (jump_relu(*args), args), _jump_relu_bwd)


@jax.custom_vjp
def heaviside(pre_BxM: jax.Array, threshold_M: jax.Array, bandwidth: float) -> jax.Array:
    """H(z − θ), with a pseudo-derivative for θ and none for z (equation 12)."""
    del bandwidth
    return (pre_BxM > threshold_M[None]).astype(pre_BxM.dtype)


def _heaviside_bwd(saved: tuple, g_BxM: jax.Array) -> tuple:
    pre_BxM, threshold_M, bandwidth = saved
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    return jnp.zeros_like(pre_BxM), -jnp.sum(kernel_BxM * g_BxM, axis=0) / bandwidth, None


heaviside.defvjp(lambda *args: (heaviside(*args), args), _heaviside_bwd)


def loss(
    params: jumprelu.Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    penalty: Penalty,
    bandwidth: float,
    target_BxO: jax.Array | None = None,
) -> jax.Array:
    """The weighted mean over rows of ‖x − x̂‖², or of ‖y − ŷ‖² with a target, plus the penalty on sparsity."""
    threshold_M = jnp.exp(params.log_threshold)
    read_BxD = x_BxD - params.b_dec[None] if target_BxO is None else x_BxD
    pre_BxM = read_BxD @ params.W_enc + params.b_enc[None]
    recon_BxO = jump_relu(pre_BxM, threshold_M, bandwidth) @ params.W_dec + params.b_dec[None]
    if params.W_skip is not None:
        recon_BxO += x_BxD @ params.W_skip
    error_B = jnp.sum(jnp.square(recon_BxO - (x_BxD if target_BxO is None else target_BxO)), axis=1)
    fires_BxM = heaviside(pre_BxM, threshold_M, bandwidth)
    row_weight_B = normalized(weight_B)
    sparsity = Sparsity(
        jnp.sum(row_weight_B * fires_BxM.sum(1)), jnp.sum(row_weight_B[:, None] * fires_BxM, axis=0)
    )
    # If all weights are zero the loss is zero, even if the penalty is not.
    return jnp.sum(row_weight_B * error_B) + row_weight_B.sum() * penalty(sparsity)


def normalized(weight_B: jax.Array) -> jax.Array:
    """The weights scaled to sum to 1, or zeros if all are zero."""
    total = weight_B.sum()
    return weight_B / jnp.where(total > 0, total, 1)


def loss_gradient(
    params: jumprelu.Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    penalty: Penalty,
    bandwidth: float,
    target_BxO: jax.Array | None = None,
    precision: products.Precision = products.HIGHEST,
) -> tuple[jumprelu.Params, BatchSums]:
    """The gradient of `loss`, written out: five matmuls and no gradient for x.

    Only θ has a pseudo-derivative; the pre-activation has its true derivative H(z − θ). An autoencoder's
    pre-encoder bias makes b_dec act twice: ∂b_dec = Σr − W_enc·Σdz. A skip connection takes two more matmuls.
    """
    matmul = products.matmul
    row_weight_B = normalized(weight_B)
    threshold_M = jnp.exp(params.log_threshold)
    y_BxO = x_BxD if target_BxO is None else target_BxO

    centred_BxO = y_BxO - params.b_dec[None]
    read_BxD = centred_BxO if target_BxO is None else x_BxD
    pre_BxM = matmul(read_BxD, params.W_enc, precision.encode) + params.b_enc[None]
    active_BxM = pre_BxM > threshold_M[None]
    f_BxM = jnp.where(active_BxM, pre_BxM, 0)
    error_BxO = matmul(f_BxM, params.W_dec, precision.decode) - centred_BxO
    if params.W_skip is not None:
        error_BxO += matmul(x_BxD, params.W_skip, precision.decode)
    l0_B = jnp.sum(active_BxM, axis=1, dtype=x_BxD.dtype)
    sparsity = Sparsity(jnp.sum(row_weight_B * l0_B), jnp.where(active_BxM, row_weight_B[:, None], 0).sum(0))
    penalty_value, slope = jax.value_and_grad(penalty)(sparsity)
    slope_M = slope.l0 + slope.frequency_M  # With respect to each latent's frequency; L0 is their sum.

    g_recon_BxO = 2 * row_weight_B[:, None] * error_BxO
    g_f_BxM = matmul(g_recon_BxO, params.W_dec.T, precision.latent_gradient)
    g_pre_BxM = jnp.where(active_BxM, g_f_BxM, 0)
    g_b_enc_M = g_pre_BxM.sum(0)
    g_b_dec_O = g_recon_BxO.sum(0)
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    # The two parts of θ's gradient: from the error, and from sparsity.
    g_error_M = -(threshold_M / bandwidth) * jnp.where(kernel_BxM, g_f_BxM, 0).sum(0)
    reached_M = jnp.where(kernel_BxM, row_weight_B[:, None], 0).sum(0)
    g_sparsity_M = -slope_M / bandwidth * reached_M

    gradient = jumprelu.Params(
        W_enc=matmul(read_BxD.T, g_pre_BxM, precision.encoder_gradient),
        b_enc=g_b_enc_M,
        log_threshold=threshold_M * (g_error_M + g_sparsity_M),
        W_dec=matmul(f_BxM.T, g_recon_BxO, precision.decoder_gradient),
        b_dec=g_b_dec_O - matmul(params.W_enc, g_b_enc_M, "highest") if target_BxO is None else g_b_dec_O,
        W_skip=None if params.W_skip is None else matmul(x_BxD.T, g_recon_BxO, precision.decoder_gradient),
    )
    has_weight_B = weight_B > 0
    # Sums and not matmuls, which on TPU would round their inputs to bfloat16. Targets are centred first: where the
    # mean is large, a mean square minus a squared mean is dominated by rounding.
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


# Makes the penalty of one SAE in one update from λ (after warm-up), the target L0 and the objective's options.
MakePenalty = Callable[[jax.Array, jax.Array, Mapping[str, float]], Penalty]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective; its gradient is `loss_gradient` of its penalty unless `loss` or `gradient` is given.

    Args:
      penalty: makes the penalty; see `MakePenalty`.
      needs_target: whether each SAE must have a target L0.
      options: the objective's options with their defaults, which `objective_options` of a bank can change.
      next_coefficient: computes λ for the next update from λ, the batch's L0, the target L0 and the learning rate;
        None: λ stays.
      loss: replaces this module's `loss`; takes parameters, examples, penalty and bandwidth. JAX differentiates it,
        so thresholds are trained only through `jump_relu` and `heaviside`.
      gradient: a hand-written gradient; takes the arguments of `loss` and a `products.Precision`.
    """

    penalty: MakePenalty
    needs_target: bool = False
    options: Mapping[str, float] = types.MappingProxyType({})
    next_coefficient: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    loss: Callable[[jumprelu.Params, Examples, Penalty, float], jax.Array] | None = None
    gradient: (
        Callable[[jumprelu.Params, Examples, Penalty, float, products.Precision], jumprelu.Params] | None
    ) = None


OBJECTIVES: dict[str, Objective] = {
    "linear": Objective(lambda coefficient, target_l0, options: linear_penalty(coefficient)),
    "quadratic": Objective(
        lambda coefficient, target_l0, options: quadratic_penalty(coefficient, target_l0), needs_target=True
    ),
    "controlled": Objective(
        lambda coefficient, target_l0, options: controlled_penalty(coefficient, target_l0),
        needs_target=True,
        next_coefficient=controlled_coefficient,
    ),
}
_OWN = frozenset(OBJECTIVES)


def register(name: str, objective: Objective) -> None:
    """Registers an objective under a name, for `objective` of a bank; replaces one registered before.

    Raises:
      ValueError: if the name is taken by one of the package's objectives, or cannot be part of an SAE's name.
    """
    if not name.isidentifier():
        raise ConfigError(
            f"an objective cannot be called {quoted(name)}; choose a name of letters, digits and _"
        )
    if name in _OWN and OBJECTIVES[name] != objective:
        raise ConfigError(f"another objective is called {name!r}; choose another name")
    OBJECTIVES[name] = objective


def objective_of(name: str) -> Objective:
    """The objective registered under a name.

    Raises:
      ValueError: if there is no such objective.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown objective {quoted(name)}; known: {', '.join(OBJECTIVES)}{hint}")
    return OBJECTIVES[name]


def gradient_of(
    objective: Objective,
    params: jumprelu.Params,
    examples: Examples,
    penalty: Penalty,
    bandwidth: float,
    precision: products.Precision = products.HIGHEST,
) -> tuple[jumprelu.Params, BatchSums]:
    """An objective's gradient for one SAE, and the batch's contribution to its metrics."""
    x_BxD, weight_B, target_BxO = examples
    gradient, sums = loss_gradient(params, x_BxD, weight_B, penalty, bandwidth, target_BxO, precision)
    if objective.gradient is None and objective.loss is None:
        return gradient, sums
    # The compiler drops the parts of the gradient above that are not used.
    if objective.gradient is not None:
        gradient = objective.gradient(params, examples, penalty, bandwidth, precision)
    else:
        with jax.default_matmul_precision(precision.encode):
            gradient = jax.grad(objective.loss)(params, examples, penalty, bandwidth)
    # If all weights are zero the gradient is zero, whatever the loss returns.
    return jax.tree.map(lambda leaf: jnp.where(sums.weight > 0, leaf, 0), gradient), sums
