"""Normalisation of a site's activations into SAE inputs, calibrated once before training."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import DataError


@flax.struct.dataclass
class Normalizer:
    """How a site's activations become SAE inputs, (x - mean) / scale, and above which norm a token weighs less.

    A few tokens of Gemma 3 have a squared norm thousands of times the median and would dominate the squared error.
    A token above `max_squared_norm` weighs less, so that it counts no more than a token at the limit.
    """

    mean_D: jax.Array  # Subtracted; zeros in Gemma Scope's recipe.
    scale: (
        jax.Array
    )  # [], the weighted root mean square norm of x - mean, so that inputs have mean square norm 1.
    max_squared_norm: jax.Array  # [], of x - mean; infinite if all tokens weigh the same.
    ablation_mean_D: jax.Array  # The mean over all unmasked positions, outliers included, for mean ablation.


def outlier_weight(squared_norm: jax.Array, max_squared_norm: jax.Array) -> jax.Array:
    """The weight of tokens by the squared norm of x - mean: 1 up to the limit, then inversely proportional."""
    return jnp.minimum(1, max_squared_norm / jnp.maximum(squared_norm, jnp.finfo(squared_norm.dtype).tiny))


class Sample(NamedTuple):
    """Statistics of a sample of activations that `check` needs before calibration."""

    kept: jax.Array  # [], number of unmasked positions
    nonfinite_N: jax.Array  # bool: unmasked positions whose activation is not finite
    mean_square: jax.Array  # [], mean of ‖x‖² over the other unmasked positions
    variance: jax.Array  # [], mean of ‖x − mean‖² over the same positions


def is_finite(x_NxD: jax.Array) -> jax.Array:
    """Whether each activation [N] and its squared norm are finite."""
    return jnp.isfinite(jnp.square(x_NxD).sum(1))


def inspect(x_NxD: jax.Array, weight_N: jax.Array) -> Sample:
    """The statistics for `check`, from activations and their weights (0 where masked)."""
    x_NxD = x_NxD.astype(jnp.float32)
    nonfinite_N = ~is_finite(x_NxD) & (weight_N > 0)
    counts_N = (weight_N > 0) & ~nonfinite_N
    share_N = counts_N / jnp.maximum(counts_N.sum(), 1)
    x_NxD = jnp.where(counts_N[:, None], x_NxD, 0)
    mean_D = (share_N[:, None] * x_NxD).sum(0)
    variance = (share_N * jnp.square(x_NxD - mean_D[None]).sum(1)).sum()
    return Sample((weight_N > 0).sum(), nonfinite_N, (share_N * jnp.square(x_NxD).sum(1)).sum(), variance)


def check(site: str, sample: Sample) -> None:
    """Checks that an SAE can learn from a site's activations; `sample` is on the host.

    Raises:
      ValueError: if all positions are masked, or no activation is finite, or all are zero or the same.
    """
    kept, nonfinite = int(sample.kept), int(sample.nonfinite_N.sum())
    if not kept:
        raise DataError(
            "all positions of the calibration rows are masked: they are BOS, EOS, PAD or part of the chat template; "
            "give longer rows (data.context_length), more rows (normalizer.rows) or another text"
        )
    if kept == nonfinite:
        raise DataError(
            f"no activation of {site} is finite at any of the {kept:,} calibration positions; check the weights, or "
            "set another gemma_dtype"
        )
    at = f"at all {kept:,} calibration positions; check the weights and the text"
    if sample.mean_square < ranges.POSITIVE.low:
        raise DataError(f"the activations of {site} are zero {at}")
    if sample.variance <= ranges.CONSTANT * sample.mean_square:
        raise DataError(f"the activations of {site} are the same {at}")


def calibrate(x_NxD: jax.Array, weight_N: jax.Array, center: bool, outlier_medians: float) -> Normalizer:
    """Calibrates a site's normaliser on a sample of its activations.

    Args:
      x_NxD: the activations; those that are not finite are ignored.
      weight_N: the weight of each activation, 0 where masked.
      center: whether to subtract the mean, in which outliers weigh less; Gemma Scope does not.
      outlier_medians: the largest squared norm of x - mean that has full weight, as a multiple of the median; 0 for
        no limit.
    """
    x_NxD = x_NxD.astype(jnp.float32)
    is_finite_N = is_finite(x_NxD)
    x_NxD, weight_N = jnp.where(is_finite_N[:, None], x_NxD, 0), jnp.where(is_finite_N, weight_N, 0)

    def mean(values: jax.Array, weight_N: jax.Array) -> jax.Array:
        # Full precision, because a TPU rounds float32 matmuls to bfloat16 by default.
        return jnp.matmul(weight_N, values, precision=jax.lax.Precision.HIGHEST) / weight_N.sum()

    ablation_mean_D = mean(x_NxD, weight_N)
    squared_N = jnp.square(x_NxD - center * ablation_mean_D[None]).sum(1)
    median = jnp.nanmedian(jnp.where(weight_N > 0, squared_N, jnp.nan))
    limit = outlier_medians * median if outlier_medians else jnp.asarray(jnp.inf)
    weight_N = weight_N * outlier_weight(squared_N, limit)
    mean_D = center * mean(x_NxD, weight_N)
    return Normalizer(
        mean_D=mean_D,
        scale=jnp.sqrt(mean(jnp.square(x_NxD - mean_D[None]).sum(1), weight_N)),
        max_squared_norm=limit,
        ablation_mean_D=ablation_mean_D,
    )
