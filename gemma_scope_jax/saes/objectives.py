"""What an SAE is trained on: squared error and a penalty on how often latents fire, and their gradients.

`OBJECTIVES` has them by name, and `register` adds one (docs/extending.md). `loss` is the definition; `loss_gradient`
is what trains, and costs two thirds of its gradient. Shapes and equations are those of
`jumprelu`.
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
from gemma_scope_jax.saes import jumprelu


class Sparsity(NamedTuple):
    """How sparse the latents are on a batch, its rows by their weights."""

    l0: jax.Array  # [], mean number of latents that fire: the sum of the frequencies
    frequency_M: jax.Array  # on which share of the rows each latent fires


# From how sparse a batch's latents are to what that costs, [].
Penalty = Callable[[Sparsity], jax.Array]


class Examples(NamedTuple):
    """What one SAE is trained on in one update."""

    x_BxD: jax.Array  # what it reads, normalised
    weight_B: jax.Array
    target_BxO: jax.Array | None  # what a transcoder predicts; None: an autoencoder


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


def linear_penalty(coefficient: jax.Array) -> Penalty:
    """λ‖f‖₀ (Gemma Scope, equation 4)."""
    return lambda sparsity: coefficient * sparsity.l0


def quadratic_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """(λ / 2L0*)(‖f‖₀ − L0*)², as hard as λ‖f‖₀ where L0 is twice its target (Gemma Scope 2, equation 5).

    Of the batch's mean L0, so that tokens may differ in theirs. The equation is printed with 2 in place of ½, which
    is four times as hard as its text says: to use such a λ, multiply it by four.
    """
    return lambda sparsity: coefficient / (2 * target_l0) * jnp.square(sparsity.l0 - target_l0)


def off_target(l0: jax.Array, target_l0: jax.Array) -> jax.Array:
    """How far L0 is above its target, in e-folds, from -1 to 1."""
    return jnp.clip(jnp.log(l0 / target_l0), -1, 1)


def controlled_penalty(coefficient: jax.Array, target_l0: jax.Array) -> Penalty:
    """λ‖f‖₀, λ being stronger above the target and weaker below it, by the square of L0 over its target.

    The part of a controller that acts at once; the other moves λ itself, until nothing is left for this one.
    """

    def penalty(sparsity: Sparsity) -> jax.Array:
        strength = jax.lax.stop_gradient(jnp.exp(2 * off_target(sparsity.l0, target_l0)))
        return coefficient * strength * sparsity.l0

    return penalty


# How fast a controller's λ moves, in learning rates an update for each e-fold that L0 is off its target: faster than
# the thresholds that L0 follows with, which move by about one. `controlled_penalty` acts at once and damps it.
CONTROLLER_SPEED = 5


def controlled_coefficient(
    coefficient: jax.Array, l0: jax.Array, target_l0: jax.Array, rate: jax.Array
) -> jax.Array:
    """λ for the next update, by how far L0 is off its target in this one."""
    return coefficient * jnp.exp(CONTROLLER_SPEED * rate * off_target(l0, target_l0))


# The definition: a loss whose threshold has pseudo-derivatives. Readable, but `jax.grad` of it costs half as
# much again as `loss_gradient` below, which is what trains; tests hold the two equal.
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
    """The weighted mean over rows of ‖x − x̂‖², or of ‖y − ŷ‖² with a target, plus the penalty on the mean of ‖f‖₀."""
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
    # Nothing to learn from rows without weight, not even that their L0 is off its target.
    return jnp.sum(row_weight_B * error_B) + row_weight_B.sum() * penalty(sparsity)


def normalized(weight_B: jax.Array) -> jax.Array:
    """Weights that add up to 1, or zeros."""
    total = weight_B.sum()
    return weight_B / jnp.where(total > 0, total, 1)


def loss_gradient(
    params: jumprelu.Params,
    x_BxD: jax.Array,
    weight_B: jax.Array,
    penalty: Penalty,
    bandwidth: float,
    target_BxO: jax.Array | None = None,
    precision: jax.lax.Precision | None = None,
) -> tuple[jumprelu.Params, BatchSums]:
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
    sparsity = Sparsity(jnp.sum(row_weight_B * l0_B), jnp.where(active_BxM, row_weight_B[:, None], 0).sum(0))
    penalty_value, slope = jax.value_and_grad(penalty)(sparsity)
    slope_M = slope.l0 + slope.frequency_M  # By each latent's frequency, of which L0 is the sum.

    g_recon_BxO = 2 * row_weight_B[:, None] * error_BxO
    g_f_BxM = matmul(g_recon_BxO, params.W_dec.T)
    g_pre_BxM = jnp.where(active_BxM, g_f_BxM, 0)
    g_b_enc_M = g_pre_BxM.sum(0)
    g_b_dec_O = g_recon_BxO.sum(0)
    kernel_BxM = _in_kernel(pre_BxM, threshold_M[None], bandwidth)
    # θ's gradient in its two parts: what the error wants, and what sparsity wants.
    g_error_M = -(threshold_M / bandwidth) * jnp.where(kernel_BxM, g_f_BxM, 0).sum(0)
    reached_M = jnp.where(kernel_BxM, row_weight_B[:, None], 0).sum(0)
    g_sparsity_M = -slope_M / bandwidth * reached_M

    gradient = jumprelu.Params(
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


# From λ, warmed up, the target L0 and the objective's own options to the penalty of one SAE in one update.
MakePenalty = Callable[[jax.Array, jax.Array, Mapping[str, float]], Penalty]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an SAE is trained on, and what that takes; `loss_gradient` of its penalty unless it says otherwise.

    Args:
      penalty: what sparsity costs.
      needs_target: whether each SAE has a target L0.
      options: its own numbers with their defaults, which `objective_options` of a bank may change.
      next_coefficient: λ for the next update, of λ, the batch's L0, its target and the learning rate; None: λ stays.
      loss: in place of the squared error, of parameters, examples, penalty and bandwidth; it is differentiated, so
        that thresholds learn by `jump_relu` and `heaviside`.
      gradient: its gradient, of the same and the precision of matmuls, where it is written by hand.
    """

    penalty: MakePenalty
    needs_target: bool = False
    options: Mapping[str, float] = types.MappingProxyType({})
    next_coefficient: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    loss: Callable[[jumprelu.Params, Examples, Penalty, float], jax.Array] | None = None
    gradient: (
        Callable[[jumprelu.Params, Examples, Penalty, float, jax.lax.Precision | None], jumprelu.Params]
        | None
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
    """Makes an objective known by a name, for `objective` of a bank; one that was registered so far is replaced.

    Raises:
      ValueError: the name is that of one of the package's own, or could not stand in an SAE's.
    """
    if not name.isidentifier():
        raise ConfigError(f"an objective cannot be called {quoted(name)}; choose letters, digits and _")
    if name in _OWN and OBJECTIVES[name] != objective:
        raise ConfigError(f"another objective is called {name!r}; choose another name")
    OBJECTIVES[name] = objective


def objective_of(name: str) -> Objective:
    """The objective of a name.

    Raises:
      ValueError: none is known by it.
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
    precision: jax.lax.Precision | None = None,
) -> tuple[jumprelu.Params, BatchSums]:
    """An objective's gradient for one SAE, and what the batch adds to its metrics."""
    x_BxD, weight_B, target_BxO = examples
    gradient, sums = loss_gradient(params, x_BxD, weight_B, penalty, bandwidth, target_BxO, precision)
    if objective.gradient is None and objective.loss is None:
        return gradient, sums
    # What is not used of the gradient above the compiler leaves out.
    if objective.gradient is not None:
        gradient = objective.gradient(params, examples, penalty, bandwidth, precision)
    else:
        with jax.default_matmul_precision(None if precision is None else precision.name.lower()):
            gradient = jax.grad(objective.loss)(params, examples, penalty, bandwidth)
    # Of a batch without weight nothing is learnt, whatever the loss makes of it.
    return jax.tree.map(lambda leaf: jnp.where(sums.weight > 0, leaf, 0), gradient), sums
