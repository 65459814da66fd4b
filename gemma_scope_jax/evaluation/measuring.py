"""The measurements of an SAE on each token: made on the devices, a batch at a time, and summed on the host.

Definitions follow Gemma Scope (section 3.3.2, appendix C) where it has them; docs/metrics.md lists them all.
`metrics` computes the metrics from the sums, in float64 on the host.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import jumprelu


class Tokens(NamedTuple):
    """An SAE on all B positions of a batch, including those that do not count; all in float32."""

    x_BxD: jax.Array  # the SAE's input
    y_BxO: jax.Array  # the activations that the reconstruction replaces
    recon_BxO: jax.Array  # the reconstruction
    f_BxM: jax.Array  # the latents
    mean_O: jax.Array  # the site's mean


# From a batch to one number for each of its tokens, [B].
OfTokens = Callable[[Tokens], jax.Array]


def measure(
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    mean_O: jax.Array,
    is_kept_SxL: jax.Array,
    importance_SxLxO: jax.Array | None,
    top_k: int | None = None,
    others: tuple[tuple[str, OfTokens], ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The reconstruction of y from x, and its measurements by token, row, dimension and latent.

    Args:
      subject: the SAE or transcoder.
      x_SxLxD: the SAE's input.
      y_SxLxO: the activations that the reconstruction replaces.
      mean_O: the site's mean.
      is_kept_SxL: which positions count.
      importance_SxLxO: the gradient of the centred logits; see `passes.importance`. None: r_L0 is not measured.
      top_k: the number of latents that fire on each activation, the strongest ones; None: all above their thresholds.
      others: further measurements, by name.

    Returns:
      The reconstruction [S, L, O], and the measurements: `_SxL` for each token, 0 where it does not count; `_SxO` and
      `_M` summed over the positions that count.
    """
    shape = is_kept_SxL.shape
    weight_B = is_kept_SxL.reshape(-1).astype(jnp.float32)
    x_BxD, y_BxO = (v.reshape(weight_B.size, -1).astype(jnp.float32) for v in (x_SxLxD, y_SxLxO))
    f_BxM = jumprelu.encode(subject, x_BxD)
    if top_k is not None:
        f_BxM = jumprelu.keep_top(f_BxM, top_k)
    recon_BxO = jumprelu.decode(subject, f_BxM, x_BxD)
    fired_BxM = (f_BxM > 0) * weight_B[:, None]
    error_BxO = recon_BxO - y_BxO
    # Sums, since matmuls on TPU round their inputs to bfloat16.
    error_B, y_B, recon_B = (jnp.square(v).sum(1) for v in (error_BxO, y_BxO, recon_BxO))
    norms_B = jnp.sqrt(y_B * recon_B)
    distance_B = jnp.square(y_BxO - mean_O[None]).sum(1)
    unexplained_B = error_B / jnp.where(distance_B > 0, distance_B, 1)

    def of_tokens(value_B: jax.Array) -> jax.Array:
        return jnp.where(weight_B > 0, value_B, 0).reshape(shape)

    found = {
        "count_SxL": of_tokens(jnp.ones_like(weight_B)),
        "l0_SxL": of_tokens(fired_BxM.sum(1)),
        "error_SxL": of_tokens(error_B),
        "explained_SxL": of_tokens(1 - unexplained_B),
        "cosine_SxL": of_tokens((y_BxO * recon_BxO).sum(1) / jnp.where(norms_B > 0, norms_B, 1)),
        "norm_ratio_SxL": of_tokens(jnp.sqrt(recon_B / jnp.where(y_B > 0, y_B, 1))),
        "error_SxO": (weight_B[:, None] * jnp.square(error_BxO)).reshape(*shape, -1).sum(1),
        "fired_M": fired_BxM.sum(0),
    }
    tokens = Tokens(x_BxD, y_BxO, recon_BxO, f_BxM, mean_O)
    found |= {f"{name}_SxL": of_tokens(of(tokens)) for name, of in others}
    if importance_SxLxO is not None:
        g_BxO = importance_SxLxO.reshape(y_BxO.shape).astype(jnp.float32)
        active = jnp.abs(f_BxM * jnp.matmul(g_BxO, subject.W_dec.T, precision=jax.lax.Precision.HIGHEST))
        uniformity_B, has_active_B = uniformity(active)
        found["r_l0_SxL"] = of_tokens(uniformity_B)
        found["active_SxL"] = of_tokens(has_active_B.astype(jnp.float32))
    return recon_BxO.reshape(y_SxLxO.shape), found


def measure_target(y_SxLxO: jax.Array, is_kept_SxL: jax.Array) -> dict[str, jax.Array]:
    """The sum of the spliced activations, and their squared distance from the row's mean, by row and dimension.

    Both are sums over the positions that count. They are no sums of squares, from which a large mean could not be
    subtracted without rounding errors.
    """
    is_kept_SxLx1, y_SxLxO = is_kept_SxL[..., None], y_SxLxO.astype(jnp.float32)
    y_SxO = jnp.where(is_kept_SxLx1, y_SxLxO, 0).sum(1)
    mean_SxO = y_SxO / jnp.maximum(is_kept_SxL.sum(1), 1)[:, None]
    within_SxLxO = jnp.where(is_kept_SxLx1, jnp.square(y_SxLxO - mean_SxO[:, None]), 0)
    return {"y_SxO": y_SxO, "y_within_SxO": within_SxLxO.sum(1)}


def uniformity(importance_BxM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r_L0 = exp(entropy of p) / ‖p‖₀ with p = importance / Σ importance (Gemma Scope, appendix C).

    It is 1 if all active latents matter equally, and approaches 1 / L0 as one latent dominates.

    Returns:
      r_L0 [B], 0 where no latent is important, and whether any latent is [B].
    """
    total_B = importance_BxM.sum(1)
    is_active_B = total_B > 0
    p_BxM = importance_BxM / jnp.where(is_active_B, total_B, 1)[:, None]
    entropy_B = -jnp.where(p_BxM > 0, p_BxM * jnp.log(jnp.where(p_BxM > 0, p_BxM, 1)), 0).sum(1)
    count_B = (importance_BxM > 0).sum(1)
    return jnp.where(is_active_B, jnp.exp(entropy_B) / jnp.maximum(count_B, 1), 0), is_active_B


class Totals:
    """The measurements of `measure`, summed over batches on the host."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}
        self.positions: dict[str, np.ndarray] = {}
        self.latents: dict[str, np.ndarray] = {}
        self.l0_counts = np.zeros(1, np.int64)

    def add(self, found: Mapping[str, np.ndarray], position_SxL: np.ndarray) -> None:
        """Adds a batch's measurements: `_SxL` summed by row and by position, `_SxO` by row, `_M` over all rows."""
        for name, value in found.items():
            quantity, _, kind = name.rpartition("_")
            value = np.asarray(value, np.float64)
            if kind == "M":
                self.latents[quantity] = self.latents.get(quantity, 0) + value
                continue
            if kind == "SxL":
                length = value.shape[1]
                at = np.bincount(position_SxL.reshape(-1), value.reshape(-1), minlength=length)
                self.positions[quantity] = self.positions.get(quantity, 0) + at
                value = value.sum(1)
            self.rows.setdefault(f"{quantity}_{'S' if kind == 'SxL' else 'SxO'}", []).append(value)
        if "l0_SxL" in found:
            l0 = np.asarray(found["l0_SxL"])[np.asarray(found["count_SxL"]) > 0].astype(np.int64)
            counts = np.bincount(l0, minlength=self.l0_counts.size)
            counts[: self.l0_counts.size] += self.l0_counts
            self.l0_counts = counts

    def of_rows(self, name: str) -> np.ndarray | None:
        """A quantity [S] or [S, O] of all rows; None if it was not measured."""
        return np.concatenate(self.rows[name]) if name in self.rows else None


@functools.partial(jax.jit, static_argnames=("mesh", "top_k", "others"))
def reconstruct(
    mesh: jax.sharding.Mesh,
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    mean_O: jax.Array,
    is_kept_SxL: jax.Array,
    importance_SxLxO: jax.Array | None,
    top_k: int | None,
    others: tuple[tuple[str, OfTokens], ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compiled `measure`; every chip holds all measurements."""
    recon_SxLxO, found = measure(
        subject, x_SxLxD, y_SxLxO, mean_O, is_kept_SxL, importance_SxLxO, top_k, others
    )
    return sharding.constrain(mesh, recon_SxLxO, sharding.TOKENS), sharding.constrain(mesh, found, P())


@functools.partial(jax.jit, static_argnames="mesh")
def target(mesh: jax.sharding.Mesh, y_SxLxO: jax.Array, is_kept_SxL: jax.Array) -> dict[str, jax.Array]:
    """Compiled `measure_target`; every chip holds all of the result."""
    return sharding.constrain(mesh, measure_target(y_SxLxO, is_kept_SxL), P())
