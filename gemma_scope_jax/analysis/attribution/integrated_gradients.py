"""Integrated gradients: attributions from the mean gradient on a path from zero latents to their values.

Shapes: S rows, each a point of the path, L tokens, N points, D and O widths of an SAE's input and output sites.
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
from gemma_scope_jax.runtime.reporting import say
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
    """Integrated gradients for one SAE, on a path that scales its latents and error from 0 to their values.

    At the start of the path the site's activation is b_dec plus the skip connection's output, at all tokens. The
    attributions of latents and error sum to the gain: the change of the logit difference along the path. The number
    of Gauss-Legendre nodes is doubled until the sum is within `tolerance`.

    Args:
      scope: the model and SAEs.
      prompt: the text.
      name: the name of the SAE.
      answer: the token whose logit is attributed, as in `attribute`.
      against: the token whose logit is subtracted, as in `attribute`.
      token: the index of the token whose next-token logits are used, as in `attribute`.
      tolerance: the largest gap between sum and gain, as a fraction of the gain.
      most_nodes: the largest number of nodes; the result contains the gap that remains.
      rows_per_batch: how many nodes run in one batch.

    Raises:
      ValueError: if there is no such SAE, or as `attribute` raises it.
    """
    if name not in scope.subjects:
        raise InputError(f"there is no SAE {quoted(name)}; choose from {', '.join(scope.subjects)}")
    ids, chosen = gradients.ask(scope, prompt, answer, against, token)
    site = scope.subjects[name].spliced
    placed = scope_lib.place_copies(scope, ids, rows_per_batch)
    rows = len(placed)
    say(scope_lib.RUNNING)
    whole = gradients.differentiate(
        scope,
        placed,
        gradients.metric_after(ids, *chosen),
        gradients.zeros(scope, placed, [site]),
    )
    fixed = gradients.metric_after(ids, int(whole.answer_S[0]), int(whole.against_S[0]))

    def mean(alphas: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, jax.Array]:
        """The metric [N] at points of the path, and their weighted sum of gradients [L, O]."""
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
        say(f"Integrating the gradient over {nodes} points …")
        x, weight = np.polynomial.legendre.leggauss(nodes)
        # The start of the path runs with the nodes, at weight 0.
        metrics, g_LxO = mean(np.append(0, (x + 1) / 2), np.append(0, weight / 2))
        parts = gradients.parts_of(scope, name, whole.values, g_LxO[None], len(ids) - 1)
        # b_dec and the skip connection are constant on the path, so their attribution is 0.
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
    """The change [S, L, O] to y that scales latents and error by α, at the tokens after BOS."""
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
    """The weighted sum over rows."""
    return sharding.constrain(mesh, (share_S[:, None, None] * g_SxLxO).sum(0), sharding.REPLICATED)
