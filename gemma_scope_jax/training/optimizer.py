"""The optimizer of Gemma Scope (section 3.2) as an optax chain, and its schedules.

All functions are for one SAE. A bank applies them to its members with `jax.vmap`, and each member counts its own
updates.
"""

import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.saes import jumprelu


def learning_rate(
    config: config_lib.OptimizerConfig, total_updates: int, update: jax.Array, own_update: jax.Array
) -> jax.Array:
    """The learning rate: a cosine rise from 0.1 to 1 times the peak, a plateau, and an optional linear fall to zero.

    Args:
      config: the optimizer's settings.
      total_updates: the number of updates in the run.
      update: the run's updates so far, which determine the fall.
      own_update: the SAE's updates so far, which determine the rise; fewer than the run's if the SAE joined later.
    """
    rise = jnp.ones(jnp.shape(own_update))
    if config.warmup_updates:
        rise = 1.1 - optax.cosine_decay_schedule(1.0, config.warmup_updates, alpha=0.1)(own_update)
    fall = 1.0
    if decay_updates := round(config.decay_fraction * total_updates):
        begin = total_updates - decay_updates
        fall = optax.linear_schedule(1.0, 0.0, decay_updates, transition_begin=begin)(update)
    return jnp.asarray(config.learning_rate * rise * fall)


def sparsity_warmup(config: config_lib.OptimizerConfig) -> optax.Schedule:
    """The warm-up factor on the sparsity coefficient λ, linear from 0 to 1."""
    if not config.sparsity_warmup_updates:
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(0.0, 1.0, config.sparsity_warmup_updates)


def project_decoder_gradient() -> optax.GradientTransformation:
    """Removes from each decoder row's gradient the component along the row, which renormalising would undo."""

    def update(gradient: jumprelu.Params, state: optax.EmptyState, params: jumprelu.Params) -> tuple:
        norm = jnp.linalg.norm(params.W_dec, axis=-1, keepdims=True)
        direction = params.W_dec / (norm + 1e-6)
        along = jnp.sum(gradient.W_dec * direction, axis=-1, keepdims=True)
        return gradient.replace(W_dec=gradient.W_dec - along * direction), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: config_lib.OptimizerConfig) -> optax.GradientTransformation:
    """Projection, then Adam with β₁ = 0. Its output must still be multiplied by the learning rate.

    With β₁ = 0 Adam's first moment is the gradient itself, so only the second moment is stored.
    """
    return optax.chain(
        project_decoder_gradient(),
        optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True),
    )


def apply_gradient(
    optimizer: optax.GradientTransformation,
    gradient: jumprelu.Params,
    state: optax.OptState,
    params: jumprelu.Params,
    rate: jax.Array,
) -> tuple[jumprelu.Params, optax.OptState]:
    """One update at the given learning rate, after which every decoder row is rescaled to unit norm."""
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
    norm = jnp.linalg.norm(params.W_dec, axis=-1, keepdims=True)
    return params.replace(W_dec=params.W_dec / norm), state
