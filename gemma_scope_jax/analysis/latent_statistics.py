"""How often and how strongly latents fire on held-out text: the scale for judging and choosing activations."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.data import batching
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.saes import attached, jumprelu
from gemma_scope_jax.saes.attached import alone

ROWS = 64  # Default number of held-out rows; enough for a rare latent to fire a few dozen times.
# Only the sums are needed here, so as few firings as possible are kept.
_LEAST = collect.Options(top=1, sample=1, before=1, after=0)


@dataclasses.dataclass(frozen=True)
class Activity:
    """Statistics [M] of each latent of an SAE; 0 for latents that never fired."""

    sae: str
    rows: int  # held-out rows measured
    frequency_M: np.ndarray  # the share of activations on which it fires
    mean_M: np.ndarray  # its mean activation where it fires
    largest_M: np.ndarray  # its largest activation


def activity(scope: Scope, rows: int = ROWS, names: Sequence[str] = ()) -> dict[str, Activity]:
    """Measures how often and how strongly latents fire, for several SAEs in the same passes over held-out rows.

    Args:
      scope: the model and the SAEs.
      rows: how many held-out rows to use, in the order of an evaluation; at most all of them.
      names: the names of the SAEs to measure; if empty, all SAEs.

    Returns:
      The statistics, by SAE.

    Raises:
      ValueError: if there is no such SAE, or `rows` is less than 1.
    """
    for name in names:
        scope.check_latent(name, 0)
    subjects = {name: subject for name, subject in scope.subjects.items() if not names or name in names}
    gathered = _gather(scope, subjects, rows, scope.placed)
    return {
        name: Activity(name, g.rows, g.frequency_M, g.mean_M, np.where(g.is_dead_M, 0, g.max_M))
        for name, g in gathered.items()
    }


def _gather(
    scope: Scope,
    subjects: Mapping[str, attached.Subject],
    rows: int,
    placed: Mapping[str, jumprelu.SAE] | None = None,
) -> dict[str, collect.Gathered]:
    ranges.check("rows", rows, ranges.COUNT)
    per_batch, counts = scope.config.evaluation.rows_per_batch, batching.counts_of(scope.config)
    return collect.gather(
        scope.gemma,
        subjects,
        scope.held_out(),
        rows,
        per_batch,
        counts,
        _LEAST,
        placed=placed,
    )


def typical(scope: Scope, name: str, latent: int, rows: int = ROWS) -> float:
    """A latent's mean activation where it fires, on `rows` held-out rows: the unit of edits and sweeps.

    Raises:
      ValueError: if there is no such SAE or latent, or the latent never fires on these rows.
    """
    scope.check_latent(name, latent)
    found = _gather(scope, {name: alone(scope.subjects[name], [latent])}, rows)[name]
    if not found.count_M[0]:
        raise InputError(
            f"latent {latent} of {name} never fires on {found.rows} held-out rows, so its typical activation is "
            "unknown; measure on more rows or choose another latent"
        )
    return float(found.mean_M[0])
