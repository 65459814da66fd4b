"""The numbers of an SAE, from what was measured of each token.

Definitions are Gemma Scope's (section 3.3.2, appendix C) where it has them; docs/metrics.md writes them all out.
`measure`, `measure_target` and what is compiled of them run on devices, a batch at a time; the rest is float64 on the
host. The numbers themselves are the fields of `evaluation_file.Evaluation`.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import evaluation_file, geometry, jumprelu
from gemma_scope_jax.training.normalizer import CONSTANT


def measure(
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    mean_O: jax.Array,
    is_kept_SxL: jax.Array,
    importance_SxLxO: jax.Array | None,
    top_k: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What an SAE makes of x in place of y, and what is measured of every token, row, dimension and latent.

    Args:
      subject: the SAE or transcoder.
      x_SxLxD: what it reads.
      y_SxLxO: what is spliced.
      mean_O: the site's mean.
      is_kept_SxL: which positions count.
      importance_SxLxO: the gradient of the centred logits; see `importance`.
      top_k: only so many latents of an activation fire, the strongest; None: those above their thresholds.

    Returns:
      The reconstruction [S, L, O], and sums: `_SxL` of each token, 0 where it does not count.
    """
    shape = is_kept_SxL.shape
    weight_B = is_kept_SxL.reshape(-1).astype(jnp.float32)
    x_BxD, y_BxO = (v.reshape(weight_B.size, -1).astype(jnp.float32) for v in (x_SxLxD, y_SxLxO))
    f_BxM = jumprelu.encode(subject, x_BxD, jax.lax.Precision.HIGHEST)
    if top_k is not None:
        f_BxM = jumprelu.keep_top(f_BxM, top_k)
    recon_BxO = jumprelu.decode(subject, f_BxM, x_BxD, jax.lax.Precision.HIGHEST)
    fired_BxM = (f_BxM > 0) * weight_B[:, None]
    error_BxO = recon_BxO - y_BxO
    # Sums and not matmuls, which on TPU would round their inputs to bfloat16.
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
    if importance_SxLxO is not None:
        g_BxO = importance_SxLxO.reshape(y_BxO.shape).astype(jnp.float32)
        active = jnp.abs(f_BxM * jnp.matmul(g_BxO, subject.W_dec.T, precision=jax.lax.Precision.HIGHEST))
        uniformity_B, has_active_B = uniformity(active)
        found["r_l0_SxL"] = of_tokens(uniformity_B)
        found["active_SxL"] = of_tokens(has_active_B.astype(jnp.float32))
    return recon_BxO.reshape(y_SxLxO.shape), found


def measure_target(y_SxLxO: jax.Array, is_kept_SxL: jax.Array) -> dict[str, jax.Array]:
    """Of what is spliced, the sum and the squared distance from the row's mean, by row and dimension.

    Both are sums over the positions that count. Not of squares, of which a large mean would leave rounding alone.
    """
    is_kept_SxLx1, y_SxLxO = is_kept_SxL[..., None], y_SxLxO.astype(jnp.float32)
    y_SxO = jnp.where(is_kept_SxLx1, y_SxLxO, 0).sum(1)
    mean_SxO = y_SxO / jnp.maximum(is_kept_SxL.sum(1), 1)[:, None]
    within_SxLxO = jnp.where(is_kept_SxLx1, jnp.square(y_SxLxO - mean_SxO[:, None]), 0)
    return {"y_SxO": y_SxO, "y_within_SxO": within_SxLxO.sum(1)}


def uniformity(importance_BxM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r_L0 = exp(entropy of p) / ‖p‖₀ with p = |y| / Σ|y| (Gemma Scope, appendix C), and where there is any.

    1 where all active latents matter equally, 1 / L0 where one alone does.
    """
    total_B = importance_BxM.sum(1)
    is_active_B = total_B > 0
    p_BxM = importance_BxM / jnp.where(is_active_B, total_B, 1)[:, None]
    entropy_B = -jnp.where(p_BxM > 0, p_BxM * jnp.log(jnp.where(p_BxM > 0, p_BxM, 1)), 0).sum(1)
    count_B = (importance_BxM > 0).sum(1)
    return jnp.where(is_active_B, jnp.exp(entropy_B) / jnp.maximum(count_B, 1), 0), is_active_B


class Totals:
    """What `measure` found, added up over batches on the host."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}
        self.positions: dict[str, np.ndarray] = {}
        self.latents: dict[str, np.ndarray] = {}
        self.l0_counts = np.zeros(1, np.int64)

    def add(self, found: Mapping[str, np.ndarray], position_SxL: np.ndarray) -> None:
        """Takes the sums of a batch; `_SxL` by row and by position, `_SxO` by row, `_M` over all."""
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
        """[S] or [S, O] over all rows; None if it was not measured."""
        return np.concatenate(self.rows[name]) if name in self.rows else None


def ratio(numerator_S: np.ndarray, denominator_S: np.ndarray) -> tuple[float, float]:
    """Σ numerator / Σ denominator, and its standard error over independent rows (linearised).

    nan where there is nothing to divide by, as the standard error is for one row.
    """
    total = denominator_S.sum()
    if total == 0:
        return float("nan"), float("nan")
    value = numerator_S.sum() / total
    return float(value), standard_error((numerator_S - value * denominator_S) / total)


def standard_error(residual_S: np.ndarray) -> float:
    """Of a sum of independent rows' parts, each less its mean; nan for one row."""
    n = residual_S.size
    return float(np.sqrt(np.square(residual_S).sum() * n / (n - 1))) if n > 1 else float("nan")


def summarize(
    subject: jumprelu.SAE, of_sae: Totals, references: Totals, nearest_cosine_M: np.ndarray | None = None
) -> evaluation_file.Evaluation:
    """The numbers of one SAE.

    Args:
      subject: the SAE.
      of_sae: from `measure`, and its `loss_SxL` and perhaps `kl_SxL`.
      references: from `measure_target`; `scored_SxL`, and the losses `clean_SxL`, `zero_SxL` and `mean_SxL`, 0 where
        they are not scored.
      nearest_cosine_M: see `nearest_cosine`; None: it is computed.
    """
    count_S, scored_S = of_sae.of_rows("count_S"), references.of_rows("scored_S")
    loss = {name: references.of_rows(f"{name}_S") for name in ("clean", "zero", "mean")}
    delta_S = of_sae.of_rows("loss_S") - loss["clean"]

    def mean(name: str, weight_S: np.ndarray | None = count_S) -> tuple[float, float] | tuple[None, None]:
        value_S = of_sae.of_rows(f"{name}_S")
        return (None, None) if value_S is None else ratio(value_S, weight_S)

    y_SxO, within_SxO = (references.of_rows(f"{name}_SxO") for name in ("y", "y_within"))
    error_SxO, mean_O = of_sae.of_rows("error_SxO"), y_SxO.sum(0) / count_S.sum()
    row_mean_SxO = y_SxO / np.maximum(count_S, 1)[:, None]

    def distance(centre_O: np.ndarray | float) -> np.ndarray:
        """Each row's part of the squared distance from a centre, rows by dimensions."""
        return within_SxO + count_S[:, None] * np.square(row_mean_SxO - centre_O)

    variance_SxO = distance(mean_O)
    # Where what is spliced is always the same there is no variance to explain, but for rounding.
    square_O = count_S.sum() * np.square(mean_O)
    is_constant = variance_SxO.sum() <= CONSTANT * square_O.sum()
    variance_S = 0 * count_S if is_constant else variance_SxO.sum(1)
    fvu = ratio(error_SxO.sum(1), variance_S)
    varies = variance_SxO.sum(0) > CONSTANT * square_O
    error_O, variance_O = error_SxO.sum(0)[varies], variance_SxO.sum(0)[varies]
    residual_SxO = (error_SxO[:, varies] - error_O / variance_O * variance_SxO[:, varies]) / variance_O
    per_dimension = (float("nan"), float("nan"))
    if varies.any():
        per_dimension = (float((error_O / variance_O).mean()), standard_error(residual_SxO.mean(1)))
    unexplained, unexplained_se = ratio(error_SxO.sum(1), distance(mean_O.mean()).sum(1))
    recovered = {name: _recovered(delta_S, loss[name], loss["clean"]) for name in ("zero", "mean")}
    frequency_M = of_sae.latents["fired"] / count_S.sum()
    cosine_M = (
        geometry.nearest_cosine(np.asarray(subject.W_dec)) if nearest_cosine_M is None else nearest_cosine_M
    )
    cumulative = np.cumsum(of_sae.l0_counts)
    active_S = of_sae.of_rows("active_S")
    pairs = {
        "l0": mean("l0"),
        "fvu": fvu,
        "fvu_per_dimension": per_dimension,
        "explained_variance_elements": (1 - unexplained, unexplained_se),
        "explained_variance_tokens": (float("nan"), float("nan")) if is_constant else mean("explained"),
        "cosine": mean("cosine"),
        "norm_ratio": mean("norm_ratio"),
        "delta_loss": ratio(delta_S, scored_S),
        "clean_loss": ratio(loss["clean"], scored_S),
        "kl": mean("kl", scored_S),
        "r_l0": mean("r_l0", active_S),
        "loss_recovered_zero": recovered["zero"],
        "loss_recovered_mean": recovered["mean"],
    }
    return evaluation_file.Evaluation(
        **{name: value for name, (value, _) in pairs.items()},
        **{f"{name}_se": error for name, (_, error) in pairs.items()},
        l0_quantiles=tuple(
            int(np.searchsorted(cumulative, q / 100 * cumulative[-1])) for q in evaluation_file.QUANTILES
        ),
        spliced_loss=ratio(of_sae.of_rows("loss_S"), scored_S)[0],
        zero_ablation_loss=ratio(loss["zero"], scored_S)[0],
        mean_ablation_loss=ratio(loss["mean"], scored_S)[0],
        dead_fraction=float((frequency_M == 0).mean()),
        dense_fraction=float((frequency_M > jumprelu.DENSE).mean()),
        decoder_cosine=float(np.median(cosine_M)),
        rows=scored_S.size,
        activations=int(count_S.sum()),
        tokens=int(scored_S.sum()),
        frequency=frequency_M,
        nearest_cosine=cosine_M,
        threshold=np.asarray(subject.threshold),
        decoder_norm=np.linalg.norm(subject.W_dec, axis=1),
        encoder_norm=np.linalg.norm(subject.W_enc, axis=0),
        l0_counts=of_sae.l0_counts,
        by_position=at_positions(of_sae, references, float(variance_S.sum() / count_S.sum())),
        by_row={
            "activations": count_S,
            "tokens": scored_S,
            "l0": of_sae.of_rows("l0_S"),
            "error": error_SxO.sum(1),
            "variance": variance_S,
            "clean_loss": loss["clean"],
            "spliced_loss": of_sae.of_rows("loss_S"),
        },
    )


def _recovered(delta_S: np.ndarray, ablated_S: np.ndarray, clean_S: np.ndarray) -> tuple[float, float]:
    """1 − delta loss over what the ablation costs, and its standard error; NaN where that is rounding alone."""
    cost_S = ablated_S - clean_S
    if abs(cost_S.sum()) <= 1e-6 * clean_S.sum():
        return float("nan"), float("nan")
    lost, error = ratio(delta_S, cost_S)
    return 1 - lost, error


def undefined(results: Mapping[str, evaluation_file.Evaluation]) -> list[str]:
    """Sentences on numbers that are not defined for what SAEs were evaluated on, and why."""
    said = []
    for name, result in results.items():
        if not np.isfinite(result.fvu):
            said.append(
                f"FVU and explained variance of {name} are not defined: what it is to reconstruct is the same at "
                f"all {result.activations:,} positions"
            )
        for ablation, by in (("zero", "zeros"), ("mean", "their mean")):
            if not np.isfinite(getattr(result, f"loss_recovered_{ablation}")):
                said.append(
                    f"loss recovered of {name} against {ablation} ablation is not defined: {by} in the place of the "
                    "activations change no prediction"
                )
    return said


# The numbers that two evaluations are compared by, row by row: what is summed, less what, over what.
PAIRED = {
    "l0": ("l0", None, "activations"),
    "fvu": ("error", None, "variance"),
    "delta_loss": ("spliced_loss", "clean_loss", "tokens"),
    "spliced_loss": ("spliced_loss", None, "tokens"),
    "clean_loss": ("clean_loss", None, "tokens"),
}


def difference(number: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """What a number is of `b` less what it is of `a`, and its standard error over rows, the same rows of both.

    NaN where there is nothing to divide by.

    Args:
      number: of `PAIRED`.
      a: `by_row` of one evaluation.
      b: of another.
    """
    values, residuals = [], []
    over, less, per = PAIRED[number]
    if not (a[per].sum() and b[per].sum()):
        return float("nan"), float("nan")
    for rows in (a, b):
        numerator_S = rows[over] - (rows[less] if less else 0)
        value = numerator_S.sum() / rows[per].sum()
        values.append(value)
        residuals.append((numerator_S - value * rows[per]) / rows[per].sum())
    return float(values[1] - values[0]), standard_error(residuals[1] - residuals[0])


def at_positions(of_sae: Totals, references: Totals, variance: float) -> dict[str, np.ndarray]:
    """By position behind a document's BOS: L0, squared error over the variance of all, delta loss; and how many.

    NaN where there is no such position.
    """
    count_L, scored_L = of_sae.positions["count"], references.positions["scored"]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "l0": of_sae.positions["l0"] / count_L,
            "error": of_sae.positions["error"] / count_L / variance,
            "delta_loss": (of_sae.positions["loss"] - references.positions["clean"]) / scored_L,
            "activations": count_L,
            "tokens": scored_L,
        }


@functools.partial(jax.jit, static_argnames=("mesh", "top_k"))
def reconstruct(
    mesh: jax.sharding.Mesh,
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    y_SxLxO: jax.Array,
    mean_O: jax.Array,
    is_kept_SxL: jax.Array,
    importance_SxLxO: jax.Array | None,
    top_k: int | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `measure`; what is measured is whole on every chip."""
    recon_SxLxO, found = measure(subject, x_SxLxD, y_SxLxO, mean_O, is_kept_SxL, importance_SxLxO, top_k)
    return sharding.constrain(mesh, recon_SxLxO, sharding.TOKENS), sharding.constrain(mesh, found, P())


@functools.partial(jax.jit, static_argnames="mesh")
def target(mesh: jax.sharding.Mesh, y_SxLxO: jax.Array, is_kept_SxL: jax.Array) -> dict[str, jax.Array]:
    """See `measure_target`; whole on every chip."""
    return sharding.constrain(mesh, measure_target(y_SxLxO, is_kept_SxL), P())
