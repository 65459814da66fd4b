"""How a site's activations become what SAEs are trained on: calibrated once, before training."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import DataError


@flax.struct.dataclass
class Normalizer:
    """How a site's activations become SAE inputs, (x - mean) / scale, and how much each counts.

    A few tokens of Gemma 3 have a squared norm thousands of times the median: squared errors would be about
    them alone. A token above `max_squared_norm` weighs less, so that none counts for more than one at the limit.
    """

    mean_D: jax.Array  # Subtracted; zeros in Gemma Scope's own recipe.
    scale: jax.Array  # [], the weighted root mean square norm of x - mean: inputs have mean square norm 1.
    max_squared_norm: jax.Array  # [], of x - mean; infinite where every token weighs the same.
    ablation_mean_D: jax.Array  # The mean over all unmasked positions, outliers included, for mean ablation.


def outlier_weight(squared_norm: jax.Array, max_squared_norm: jax.Array) -> jax.Array:
    """The weight of tokens by the squared norm of x - mean: 1 up to the limit, then in inverse proportion."""
    return jnp.minimum(1, max_squared_norm / jnp.maximum(squared_norm, jnp.finfo(squared_norm.dtype).tiny))


class Sample(NamedTuple):
    """What must be known of a sample before it is calibrated on; see `check`."""

    kept: jax.Array  # [], positions that count
    nonfinite_N: jax.Array  # bool: of those, which have an activation that is not finite
    mean_square: jax.Array  # [], the mean of ‖x‖² over all others
    variance: jax.Array  # [], that of ‖x − mean‖²


def is_finite(x_NxD: jax.Array) -> jax.Array:
    """Which activations [N] are finite, as is the square of their norm."""
    return jnp.isfinite(jnp.square(x_NxD).sum(1))


def inspect(x_NxD: jax.Array, weight_N: jax.Array) -> Sample:
    """What `check` takes, of activations and their weights, 0 where masked."""
    x_NxD = x_NxD.astype(jnp.float32)
    nonfinite_N = ~is_finite(x_NxD) & (weight_N > 0)
    counts_N = (weight_N > 0) & ~nonfinite_N
    share_N = counts_N / jnp.maximum(counts_N.sum(), 1)
    x_NxD = jnp.where(counts_N[:, None], x_NxD, 0)
    mean_D = (share_N[:, None] * x_NxD).sum(0)
    variance = (share_N * jnp.square(x_NxD - mean_D[None]).sum(1)).sum()
    return Sample((weight_N > 0).sum(), nonfinite_N, (share_N * jnp.square(x_NxD).sum(1)).sum(), variance)


def check(site: str, sample: Sample) -> None:
    """Raises ValueError if nothing can be learned of a site's activations, from a sample on the host."""
    kept, nonfinite = int(sample.kept), int(sample.nonfinite_N.sum())
    if not kept:
        raise DataError(
            "no position of the rows that activations are measured on counts: all are BOS, EOS, PAD or the chat "
            "template's; give longer rows (data.context_length), more of them (normalizer.rows) or another text"
        )
    if kept == nonfinite:
        raise DataError(
            f"no activation of {site} is finite, at {kept:,} positions; look at the weights, or compute in another "
            "gemma_dtype"
        )
    at = f"at all {kept:,} positions that activations are measured on; look at the weights and the text"
    if sample.mean_square < ranges.POSITIVE.low:
        raise DataError(f"the activations of {site} are zero {at}")
    if sample.variance <= ranges.CONSTANT * sample.mean_square:
        raise DataError(f"the activations of {site} are the same {at}: there is nothing to learn")


def calibrate(x_NxD: jax.Array, weight_N: jax.Array, center: bool, outlier_medians: float) -> Normalizer:
    """A site's normaliser from a sample of its activations.

    Args:
      x_NxD: activations; those that are not finite are left out.
      weight_N: 0 where masked.
      center: subtract the mean, outliers weighed less; Gemma Scope does not.
      outlier_medians: the largest centred squared norm of full weight, in medians; 0 for no limit.
    """
    x_NxD = x_NxD.astype(jnp.float32)
    is_finite_N = is_finite(x_NxD)
    x_NxD, weight_N = jnp.where(is_finite_N[:, None], x_NxD, 0), jnp.where(is_finite_N, weight_N, 0)

    def mean(values: jax.Array, weight_N: jax.Array) -> jax.Array:
        # At full precision: a matmul of float32 is rounded to bfloat16 on TPU.
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
