"""How a site's activations become what SAEs are trained on: calibrated once, before training."""

import flax.struct
import jax
import jax.numpy as jnp


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


def calibrate(x_NxD: jax.Array, weight_N: jax.Array, center: bool, outlier_medians: float) -> Normalizer:
    """A site's normaliser from a sample of its activations.

    Args:
      x_NxD: activations.
      weight_N: 0 where masked.
      center: subtract the mean, outliers weighed less; Gemma Scope does not.
      outlier_medians: the largest centred squared norm of full weight, in medians; 0 for no limit.
    """
    x_NxD = x_NxD.astype(jnp.float32)

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
