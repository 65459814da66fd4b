"""Integrated gradients: what latents have a part in, as they grow from nothing to what they are.

Shapes: S rows, which are points of the path, L tokens, N of the points, D and O widths of the sites read and given.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.attribution import gradients
from gemma_scope_jax.analysis.attribution.gradients import Attribution
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.runtime import distributed, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.saes import jumprelu


def integrate(
    scope: Scope,
    prompt: str,
    name: str,
    answer: str | None = None,
    against: str | None = None,
    token: int = -1,
    tolerance: float = 1e-3,
    most_nodes: int = 64,
    rows_per_batch: int = 8,
) -> Attribution:
    """Integrated gradients by one SAE, on a path where its latents and error grow from nothing to what they are.

    Where the path begins the site is b_dec, and what a skip connection passes, at all tokens. The parts add up to
    what the difference of logits gains on the path. Gauss and Legendre's nodes are doubled until they do.

    Args:
      scope: the model and SAEs.
      prompt: see `attribute`, also for the next three.
      name: of the SAE.
      answer: see above.
      against: see above.
      token: see above.
      tolerance: the gap that may be left, as a share of the gain.
      most_nodes: beyond which nodes are not doubled; the result says what gap is left.
      rows_per_batch: nodes that are run together.

    Raises:
      ValueError: see `attribute`; or there is no such SAE.
    """
    if name not in scope.subjects:
        raise InputError(f"there is no SAE {quoted(name)}; there are {', '.join(scope.subjects)}")
    ids, chosen = gradients.ask(scope, prompt, answer, against, token)
    site = scope.subjects[name].spliced
    placed = scope_lib.place_copies(scope, ids, rows_per_batch)
    rows = len(placed)
    whole = gradients.differentiate(
        scope,
        placed,
        gradients.metric_behind(ids, *chosen),
        gradients.zeros(scope, placed, [site]),
    )
    fixed = gradients.metric_behind(ids, int(whole.answer_S[0]), int(whole.against_S[0]))

    def mean(alphas: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, jax.Array]:
        """The metric [N] at points of the path, and the gradient [L, O] in shares of each."""
        metrics, gradient = [], 0.0
        for start in range(0, len(alphas), rows):
            alpha_S, share_S = np.ones(rows, np.float32), np.zeros(rows, np.float32)
            here = slice(start, start + rows)
            alpha_S[: len(alphas[here])], share_S[: len(alphas[here])] = alphas[here], shares[here]
            read = (whole.values[scope.subjects[name].site], whole.values[site])
            added = _from_whole(scope.gemma.mesh, scope.placed[name], *read, alpha_S, np.int32(len(ids)))
            passed = gradients.differentiate(scope, placed, fixed, {site: added})
            metrics.append(distributed.fetch(passed.metric_S))
            gradient += _shared(scope.gemma.mesh, share_S, passed.gradients[site])
        return np.concatenate(metrics)[: len(alphas)], gradient

    nodes = 2
    while True:
        nodes *= 2
        x, weight = np.polynomial.legendre.leggauss(nodes)
        # The path's beginning goes with the nodes, without a share.
        metrics, g_LxO = mean(np.append(0, (x + 1) / 2), np.append(0, weight / 2))
        parts = gradients.parts_of(scope, name, whole.values, g_LxO[None], len(ids) - 1)
        # What does not change on the path has no part.
        none_L = np.zeros_like(parts.bias_L)
        total_L = parts.total_L - parts.bias_L - parts.skip_L
        parts = parts._replace(bias_L=none_L, skip_L=none_L, total_L=total_L)
        gain = float(whole.metric_S[0]) - float(metrics[0])
        gap = float(parts.part_N.sum(dtype=np.float64) + parts.error_L.sum(dtype=np.float64)) - gain
        if abs(gap) <= tolerance * abs(gain) or 2 * nodes > most_nodes:
            integral = gradients.Integral(float(metrics[0]), nodes, gap)
            return gradients.tell(scope, ids, whole, {name: parts}, integral)


@functools.partial(jax.jit, static_argnames="mesh")
def _from_whole(
    mesh: jax.sharding.Mesh,
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    alpha_S: jax.Array,
    length: jax.Array,
) -> jax.Array:
    """What leads from y [S, L, O] to where latents and error are α times what they are, behind BOS."""
    base_SxLxO = jnp.broadcast_to(subject.b_dec[None, None], y_SxLxO.shape)
    if subject.W_skip is not None:
        x_SxLxD = x_SxLxD.astype(jnp.float32)
        base_SxLxO += jnp.matmul(x_SxLxD, subject.W_skip, precision=jax.lax.Precision.HIGHEST)
    index_L = jnp.arange(y_SxLxO.shape[1])
    is_meant_1xLx1 = ((index_L > 0) & (index_L < length))[None, :, None]
    lost_SxLxO = (alpha_S[:, None, None] - 1) * (y_SxLxO.astype(jnp.float32) - base_SxLxO)
    return sharding.constrain(mesh, jnp.where(is_meant_1xLx1, lost_SxLxO, 0), sharding.TOKENS)


@functools.partial(jax.jit, static_argnames="mesh")
def _shared(mesh: jax.sharding.Mesh, share_S: jax.Array, g_SxLxO: jax.Array) -> jax.Array:
    """The sum over rows, each by its share."""
    return sharding.constrain(mesh, (share_S[:, None, None] * g_SxLxO).sum(0), sharding.REPLICATED)
