"""The metrics of an SAE, computed from sums over rows: `METRICS` has the label and definition of each.

`register` adds a metric (docs/extending.md). Definitions follow Gemma Scope (section 3.3.2, appendix C) where it has
them; docs/metrics.md lists them all.
"""

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping

import numpy as np

from gemma_scope_jax.evaluation.measuring import OfTokens, Totals
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.saes import evaluation_file, geometry, jumprelu

NAN = float("nan")


def ratio(numerator_S: np.ndarray, denominator_S: np.ndarray) -> tuple[float, float]:
    """Σ numerator / Σ denominator, and its linearised standard error over independent rows.

    Both are NaN if the denominator is 0; the standard error is NaN for a single row.
    """
    total = denominator_S.sum()
    if total == 0:
        return float("nan"), float("nan")
    value = numerator_S.sum() / total
    return float(value), standard_error((numerator_S - value * denominator_S) / total)


def standard_error(residual_S: np.ndarray) -> float:
    """The standard error of a sum over independent rows, from each row's residual; NaN for a single row."""
    n = residual_S.size
    return float(np.sqrt(np.square(residual_S).sum() * n / (n - 1))) if n > 1 else float("nan")


class Sums:
    """The sums over all rows that metrics are computed from: those of one SAE, and those of its site alone."""

    def __init__(
        self,
        subject: jumprelu.SAE,
        of_sae: Totals,
        references: Totals,
        nearest_cosine_M: np.ndarray | None = None,
    ) -> None:
        """Stores the sums; the arguments are those of `summarize`."""
        self.subject, self.of_sae, self.references = subject, of_sae, references
        self.count_S, self.scored_S = of_sae.of_rows("count_S"), references.of_rows("scored_S")
        self.loss = {name: references.of_rows(f"{name}_S") for name in ("clean", "zero", "mean")}
        self.loss["spliced"] = of_sae.of_rows("loss_S")
        self.delta_S = self.loss["spliced"] - self.loss["clean"]
        self.error_SxO = of_sae.of_rows("error_SxO")
        y_SxO, self._within_SxO = (references.of_rows(f"{name}_SxO") for name in ("y", "y_within"))
        self.mean_O = y_SxO.sum(0) / self.count_S.sum()
        self._row_mean_SxO = y_SxO / np.maximum(self.count_S, 1)[:, None]
        self.frequency_M = of_sae.latents["fired"] / self.count_S.sum()
        self._nearest_cosine_M = nearest_cosine_M

    def mean(self, name: str, per_S: np.ndarray | None = None) -> tuple[float | None, float | None]:
        """The mean of a measured quantity over the positions that count, and its standard error.

        Both are None if the quantity was not measured.
        """
        value_S = self.of_sae.of_rows(f"{name}_S")
        return (None, None) if value_S is None else ratio(value_S, self.count_S if per_S is None else per_S)

    def distance(self, centre_O: np.ndarray | float) -> np.ndarray:
        """Each row's share [S, O] of the squared distance of the activations from a centre."""
        return self._within_SxO + self.count_S[:, None] * np.square(self._row_mean_SxO - centre_O)

    @functools.cached_property
    def variance_SxO(self) -> np.ndarray:
        return self.distance(self.mean_O)

    @functools.cached_property
    def varies_O(self) -> np.ndarray:
        """The dimensions [O] in which the spliced activations vary by more than rounding errors."""
        return self.variance_SxO.sum(0) > ranges.CONSTANT * self.count_S.sum() * np.square(self.mean_O)

    @functools.cached_property
    def is_constant(self) -> bool:
        """Whether the spliced activations are constant, all dimensions together, up to rounding errors."""
        square = self.count_S.sum() * np.square(self.mean_O).sum()
        return bool(self.variance_SxO.sum() <= ranges.CONSTANT * square)

    @functools.cached_property
    def variance_S(self) -> np.ndarray:
        return 0 * self.count_S if self.is_constant else self.variance_SxO.sum(1)

    @functools.cached_property
    def nearest_cosine_M(self) -> np.ndarray:
        """Each latent's largest cosine [M] with another decoder direction; see `geometry.nearest_cosine`."""
        if self._nearest_cosine_M is not None:
            return self._nearest_cosine_M
        return geometry.nearest_cosine(np.asarray(self.subject.W_dec))


# A value and its standard error over rows. The value is None if it was not measured, the error if it has none.
Number = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of an evaluation.

    Args:
      label: its name in tables and on pages.
      definition: a plain sentence with the formula and the unit.
      reduce: computes the value and its standard error from the sums over all rows. None: the mean of `measure` over
        the positions that count.
      form: the Python format specification of the value.
      measure: a function from a batch to one number for each token, compiled into the pass over each batch. None:
        the metric needs only the quantities that are always measured.
      paired: how two evaluations of the same rows are compared: the keys of `Evaluation.by_row` of the numerator, of
        the term subtracted from it (or None), and of the denominator. Empty: no paired comparison.
      shown_in: the tables it appears in: "page", the page's; "terminal", the one printed for more than three SAEs;
        "comparison", evaluations side by side.
      reading: how to read the value, in one plain line. The page shows metrics that have one first, with this line.
    """

    label: str
    definition: str
    reduce: Callable[[Sums], Number] | None = None
    form: str = ".4f"
    measure: OfTokens | None = None
    paired: tuple[str, str | None, str] | tuple[()] = ()
    shown_in: tuple[str, ...] = ("page",)
    reading: str = ""


def _recovered(delta_S: np.ndarray, ablated_S: np.ndarray, clean_S: np.ndarray) -> tuple[float, float]:
    """1 − delta loss / (ablated loss − clean loss), and its standard error.

    Both are NaN if the ablation changes the loss by no more than rounding errors.
    """
    cost_S = ablated_S - clean_S
    if abs(cost_S.sum()) <= 1e-6 * clean_S.sum():
        return NAN, NAN
    lost, error = ratio(delta_S, cost_S)
    return 1 - lost, error


def _per_dimension(s: Sums) -> Number:
    if not s.varies_O.any():
        return NAN, NAN
    error_SxO, variance_SxO = s.error_SxO[:, s.varies_O], s.variance_SxO[:, s.varies_O]
    error_O, variance_O = error_SxO.sum(0), variance_SxO.sum(0)
    residual_SxO = (error_SxO - error_O / variance_O * variance_SxO) / variance_O
    return float((error_O / variance_O).mean()), standard_error(residual_SxO.mean(1))


def _of_elements(s: Sums) -> Number:
    unexplained, error = ratio(s.error_SxO.sum(1), s.distance(s.mean_O.mean()).sum(1))
    return 1 - unexplained, error


def _loss(name: str) -> Callable[[Sums], Number]:
    return lambda s: (ratio(s.loss[name], s.scored_S)[0], None)


METRICS: dict[str, Metric] = {
    "l0": Metric(
        "L0",
        "The mean over activations of ‖f‖₀, the number of latents that fire on an activation.",
        lambda s: s.mean("l0"),
        ".1f",
        paired=("l0", None, "activations"),
        shown_in=("page", "terminal", "comparison"),
        reading="How many latents fire on an activation, on average: the lower, the sparser.",
    ),
    "fvu": Metric(
        "FVU",
        "Fraction of variance unexplained, Σ‖y − ŷ‖² / Σ‖y − ȳ‖², where ȳ is the mean of the evaluated activations. "
        "0: perfect; 1: no better than ȳ.",
        lambda s: ratio(s.error_SxO.sum(1), s.variance_S),
        paired=("error", None, "variance"),
        shown_in=("page", "terminal", "comparison"),
    ),
    "delta_loss": Metric(
        "delta loss, nats",
        "Spliced loss − clean loss: the rise in the mean cross-entropy of the next token when the reconstruction "
        "replaces the activations, in nats per prediction.",
        lambda s: ratio(s.delta_S, s.scored_S),
        paired=("spliced_loss", "clean_loss", "tokens"),
        shown_in=("page", "terminal", "comparison"),
        reading="How much worse the model predicts with the reconstruction in place. 0: no worse.",
    ),
    "kl": Metric(
        "KL, nats",
        "The mean over predictions of KL(clean ‖ spliced), the divergence of the spliced from the clean distribution "
        "of the next token, in nats.",
        lambda s: s.mean("kl", s.scored_S),
        shown_in=("page", "comparison"),
    ),
    "r_l0": Metric(
        "r_L0",
        "Uniformity of active latent importance: the mean over activations of exp(H(p)) / ‖p‖₀, where H is the "
        "entropy, p = |a| / Σ|a| and a = f ⊙ (W_dec ∇L). L is the sum, over scored predictions of the clean model, "
        "of the next token's logit minus the mean logit. 1: all active latents matter equally.",
        lambda s: s.mean("r_l0", s.of_sae.of_rows("active_S")),
        ".3f",
        shown_in=("page", "comparison"),
    ),
    "loss_recovered_mean": Metric(
        "loss recovered, mean",
        "The share of the cost of mean ablation that the reconstruction avoids, 1 − delta loss / (mean-ablation "
        "loss − clean loss). 1: it costs nothing; 0: as much as mean ablation.",
        lambda s: _recovered(s.delta_S, s.loss["mean"], s.loss["clean"]),
        shown_in=("page", "terminal", "comparison"),
        reading="1: predictions are as good as with the activations themselves; 0: as bad as with their mean.",
    ),
    "loss_recovered_zero": Metric(
        "loss recovered, zero",
        "The share of the cost of zero ablation that the reconstruction avoids, 1 − delta loss / (zero-ablation "
        "loss − clean loss). 1: it costs nothing; 0: as much as zero ablation.",
        lambda s: _recovered(s.delta_S, s.loss["zero"], s.loss["clean"]),
        shown_in=(),
    ),
    "cosine": Metric(
        "cosine",
        "The mean over activations of y·ŷ / (‖y‖ ‖ŷ‖), the cosine between activation and reconstruction.",
        lambda s: s.mean("cosine"),
        shown_in=(),
    ),
    "norm_ratio": Metric(
        "norm ratio",
        "The mean over activations of ‖ŷ‖ / ‖y‖, the reconstruction's norm relative to the activation's.",
        lambda s: s.mean("norm_ratio"),
        shown_in=(),
    ),
    "fvu_per_dimension": Metric(
        "FVU, per dimension",
        "The mean over dimensions i of Σ(yᵢ − ŷᵢ)² / Σ(yᵢ − ȳᵢ)², the FVU of each dimension.",
        _per_dimension,
        shown_in=(),
    ),
    "explained_variance_elements": Metric(
        "explained variance, elements",
        "1 − mean squared error / variance, both over all elements of all activations, as in Gemma Scope's "
        "tutorials.",
        _of_elements,
        shown_in=(),
    ),
    "explained_variance_tokens": Metric(
        "explained variance, tokens",
        "The mean over activations of 1 − ‖y − ŷ‖² / ‖y − m‖², where m is the site's mean, as in older versions of "
        "SAELens.",
        lambda s: (NAN, NAN) if s.is_constant else s.mean("explained"),
        shown_in=(),
    ),
    "clean_loss": Metric(
        "clean loss, nats",
        "The mean cross-entropy of the next token in the unmodified model, in nats per prediction.",
        lambda s: ratio(s.loss["clean"], s.scored_S),
        paired=("clean_loss", None, "tokens"),
        shown_in=(),
    ),
    "spliced_loss": Metric(
        "spliced loss, nats",
        "The mean cross-entropy of the next token when the reconstruction replaces the activations, in nats per "
        "prediction.",
        _loss("spliced"),
        paired=("spliced_loss", None, "tokens"),
        shown_in=(),
    ),
    "zero_ablation_loss": Metric(
        "zero-ablation loss, nats",
        "The mean cross-entropy of the next token when zeros replace the activations, in nats per prediction.",
        _loss("zero"),
        shown_in=(),
    ),
    "mean_ablation_loss": Metric(
        "mean-ablation loss, nats",
        "The mean cross-entropy of the next token when the site's mean replaces the activations, in nats per "
        "prediction.",
        _loss("mean"),
        shown_in=(),
    ),
    "dead_fraction": Metric(
        "never fired here",
        "The share of latents that fire on none of the evaluated activations.",
        lambda s: (float((s.frequency_M == 0).mean()), None),
        ".2%",
        shown_in=("page", "terminal"),
        reading="The share of latents that never fire on these rows; on few rows, rare latents are among them.",
    ),
    "dense_fraction": Metric(
        "fired on over 10%",
        "The share of latents that fire on more than 10% of the evaluated activations.",
        lambda s: (float((s.frequency_M > jumprelu.DENSE).mean()), None),
        ".2%",
        shown_in=("page", "terminal"),
        reading="The share of latents that fire on over a tenth of the activations; they seldom stand for one thing.",
    ),
    "decoder_cosine": Metric(
        "nearest decoder cosine",
        "The median over latents i of max over j ≠ i of cos(W_dec[i], W_dec[j]), the largest cosine with another "
        "latent's decoder direction.",
        lambda s: (float(np.median(s.nearest_cosine_M)), None),
        ".3f",
        shown_in=(),
    ),
}
_OWN = frozenset(METRICS)
_FIELDS = {field.name for field in dataclasses.fields(evaluation_file.Evaluation)}
# The names of the sums that are always made, in `measuring.measure` and in `by_row`.
_SUMS = {
    "count", "error", "explained", "active", "loss", "variance", "clean_loss", "spliced_loss", "frequency", "fired",
}  # fmt: skip


def register(name: str, metric: Metric) -> None:
    """Adds a metric to every evaluation from now on, or replaces one added before.

    The metric appears in the files, on the page, and in the tables that `shown_in` names.

    Raises:
      ValueError: if the name is taken or no identifier, or the metric has neither `measure` nor `reduce`.
    """
    is_taken = METRICS[name] != metric if name in _OWN else name in _FIELDS | _SUMS
    if is_taken:
        raise InputError(f"the metric name {name!r} is taken; choose another name")
    if not name.isidentifier():
        raise InputError(f"{name!r} is not a valid metric name; use letters, digits and _")
    if metric.measure is None and metric.reduce is None:
        raise InputError(f"the metric {name} has neither measure nor reduce; give at least one")
    METRICS[name] = metric


def measures() -> tuple[tuple[str, OfTokens], ...]:
    """The `measure` functions of the metrics that have one, by name."""
    return tuple((name, metric.measure) for name, metric in METRICS.items() if metric.measure is not None)


def definitions() -> list[list[str]]:
    """The name of each of `measures` and a digest of its code, "" for a callable that is not a function."""
    return [[name, _digest(getattr(inspect.unwrap(of), "__code__", None))] for name, of in measures()]


def _digest(code: types.CodeType | None) -> str:
    """A digest of a function's code, the same in every process, without what the function calls or captures."""
    if code is None:
        return ""

    def constant(value: object) -> str:
        if isinstance(value, types.CodeType):
            return _digest(value)
        # The order of a set of strings differs between processes.
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    constants = [constant(value) for value in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()


def shown_in(place: str) -> tuple[str, ...]:
    """The names of the metrics in a table; see `Metric.shown_in`."""
    return tuple(name for name, metric in METRICS.items() if place in metric.shown_in)


def paired() -> dict[str, tuple[str, str | None, str]]:
    """The metrics that are compared row by row: the numerator, the term subtracted, and the denominator of each."""
    own = {name: (name, None, "activations") for name, _ in measures()}
    return own | {name: metric.paired for name, metric in METRICS.items() if metric.paired}


def summarize(
    subject: jumprelu.SAE, of_sae: Totals, references: Totals, nearest_cosine_M: np.ndarray | None = None
) -> evaluation_file.Evaluation:
    """The evaluation of one SAE, computed from its sums.

    Args:
      subject: the SAE.
      of_sae: the sums of `measuring.measure`, with the spliced `loss_SxL` and optionally `kl_SxL`.
      references: the sums of `measuring.measure_target`, with `scored_SxL` and the losses `clean_SxL`, `zero_SxL` and
        `mean_SxL`, 0 at positions that are not scored.
      nearest_cosine_M: the result of `geometry.nearest_cosine`; None: computed here.
    """
    sums = Sums(subject, of_sae, references, nearest_cosine_M)
    numbers: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        value, error = metric.reduce(sums) if metric.reduce else sums.mean(name)
        numbers[name] = value
        if name not in _FIELDS or f"{name}_se" in _FIELDS:
            numbers[f"{name}_se"] = error
    cumulative = np.cumsum(of_sae.l0_counts)
    count_S, scored_S = sums.count_S, sums.scored_S
    return evaluation_file.Evaluation(
        **{name: value for name, value in numbers.items() if name in _FIELDS},
        more={name: value for name, value in numbers.items() if name not in _FIELDS},
        l0_quantiles=tuple(
            int(np.searchsorted(cumulative, q / 100 * cumulative[-1])) for q in evaluation_file.QUANTILES
        ),
        rows=scored_S.size,
        activations=int(count_S.sum()),
        tokens=int(scored_S.sum()),
        frequency=sums.frequency_M,
        nearest_cosine=sums.nearest_cosine_M,
        threshold=np.asarray(subject.threshold),
        decoder_norm=np.linalg.norm(subject.W_dec, axis=1),
        encoder_norm=np.linalg.norm(subject.W_enc, axis=0),
        l0_counts=of_sae.l0_counts,
        by_position=at_positions(of_sae, references, float(sums.variance_S.sum() / count_S.sum())),
        by_row={
            "activations": count_S,
            "tokens": scored_S,
            "l0": of_sae.of_rows("l0_S"),
            "error": sums.error_SxO.sum(1),
            "variance": sums.variance_S,
            "clean_loss": sums.loss["clean"],
            "spliced_loss": sums.loss["spliced"],
            **{name: of_sae.of_rows(f"{name}_S") for name, _ in measures()},
        },
    )


def undefined(results: Mapping[str, evaluation_file.Evaluation]) -> list[str]:
    """A sentence for each metric of an SAE that is undefined on the evaluated rows, with the reason."""
    said = []
    for name, result in results.items():
        if not np.isfinite(result.fvu):
            said.append(
                f"FVU and explained variance of {name} are undefined: the activations to reconstruct are the same at "
                f"all {result.activations:,} positions"
            )
        for ablation, by in (("zero", "zeros"), ("mean", "their mean")):
            if not np.isfinite(getattr(result, f"loss_recovered_{ablation}")):
                said.append(
                    f"loss recovered of {name} against {ablation} ablation is undefined: replacing the activations "
                    f"with {by} changes no prediction"
                )
    return said


def difference(number: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """A metric of `b` minus that of `a`, and the standard error of the difference over the rows, the same for both.

    Both are NaN if a denominator is 0.

    Args:
      number: the metric's name, a key of `paired()`.
      a: the `by_row` of one evaluation.
      b: the `by_row` of another.
    """
    values, residuals = [], []
    over, less, per = paired()[number]
    if not (a[per].sum() and b[per].sum()):
        return float("nan"), float("nan")
    for rows in (a, b):
        numerator_S = rows[over] - (rows[less] if less else 0)
        value = numerator_S.sum() / rows[per].sum()
        values.append(value)
        residuals.append((numerator_S - value * rows[per]) / rows[per].sum())
    return float(values[1] - values[0]), standard_error(residuals[1] - residuals[0])


def at_positions(of_sae: Totals, references: Totals, variance: float) -> dict[str, np.ndarray]:
    """L0, squared error / overall variance, delta loss and counts, by position after the document's BOS.

    The metrics are NaN at positions that do not occur.
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
