"""The numbers of an SAE, from the sums of what was measured of it: `METRICS` has each with its label and definition.

`register` adds one (docs/extending.md). Definitions are Gemma Scope's (section 3.3.2, appendix C) where it has them;
docs/metrics.md writes them all out.
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


class Sums:
    """What was measured of one SAE, and of its site without it, over all rows: what a number is made of."""

    def __init__(
        self,
        subject: jumprelu.SAE,
        of_sae: Totals,
        references: Totals,
        nearest_cosine_M: np.ndarray | None = None,
    ) -> None:
        """Takes the sums; see `summarize`."""
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
        """Of what was measured of each token, over those that count; None where it was not."""
        value_S = self.of_sae.of_rows(f"{name}_S")
        return (None, None) if value_S is None else ratio(value_S, self.count_S if per_S is None else per_S)

    def distance(self, centre_O: np.ndarray | float) -> np.ndarray:
        """Each row's part of the squared distance from a centre, rows by dimensions."""
        return self._within_SxO + self.count_S[:, None] * np.square(self._row_mean_SxO - centre_O)

    @functools.cached_property
    def variance_SxO(self) -> np.ndarray:
        return self.distance(self.mean_O)

    @functools.cached_property
    def varies_O(self) -> np.ndarray:
        """Where what is spliced is always the same there is no variance to explain, but for rounding."""
        return self.variance_SxO.sum(0) > ranges.CONSTANT * self.count_S.sum() * np.square(self.mean_O)

    @functools.cached_property
    def is_constant(self) -> bool:
        """The same of all dimensions together."""
        square = self.count_S.sum() * np.square(self.mean_O).sum()
        return bool(self.variance_SxO.sum() <= ranges.CONSTANT * square)

    @functools.cached_property
    def variance_S(self) -> np.ndarray:
        return 0 * self.count_S if self.is_constant else self.variance_SxO.sum(1)

    @functools.cached_property
    def nearest_cosine_M(self) -> np.ndarray:
        """See `geometry.nearest_cosine`."""
        if self._nearest_cosine_M is not None:
            return self._nearest_cosine_M
        return geometry.nearest_cosine(np.asarray(self.subject.W_dec))


# A number and its standard error over rows; None for what was not measured, or has no error.
Number = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of an evaluation.

    Args:
      label: as tables and pages call it.
      definition: what it is, in a sentence or two.
      reduce: it and its standard error, from the sums over all rows. None: the mean of what `measure` gives over the
        positions that count.
      form: how it is shown, as a format of Python.
      measure: what it takes of each token beyond what is measured anyway; compiled into the pass over each batch.
      paired: numerator, what is subtracted of it (or None), and denominator: keys of `Evaluation.by_row`, by which
        two evaluations of the same rows are compared. Empty: they are not.
      shown_in: "page", the table of a page; "terminal", that of many SAEs; "comparison", side by side.
    """

    label: str
    definition: str
    reduce: Callable[[Sums], Number] | None = None
    form: str = ".4f"
    measure: OfTokens | None = None
    paired: tuple[str, str | None, str] | tuple[()] = ()
    shown_in: tuple[str, ...] = ("page",)


def _recovered(delta_S: np.ndarray, ablated_S: np.ndarray, clean_S: np.ndarray) -> tuple[float, float]:
    """1 − delta loss over what the ablation costs, and its standard error; NaN where that is rounding alone."""
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
        "Mean number of latents that fire on an activation.",
        lambda s: s.mean("l0"),
        ".1f",
        paired=("l0", None, "activations"),
        shown_in=("page", "terminal", "comparison"),
    ),
    "fvu": Metric(
        "FVU",
        "Σ‖y − ŷ‖² / Σ‖y − mean‖², the mean being that of the activations evaluated on.",
        lambda s: ratio(s.error_SxO.sum(1), s.variance_S),
        paired=("error", None, "variance"),
        shown_in=("page", "terminal", "comparison"),
    ),
    "delta_loss": Metric(
        "delta loss, nats",
        "Mean cross-entropy of next tokens with the reconstruction in the activations' place, less that without.",
        lambda s: ratio(s.delta_S, s.scored_S),
        paired=("spliced_loss", "clean_loss", "tokens"),
        shown_in=("page", "terminal", "comparison"),
    ),
    "kl": Metric(
        "KL, nats",
        "Mean KL divergence of the spliced from the clean prediction, KL(clean ‖ spliced).",
        lambda s: s.mean("kl", s.scored_S),
        shown_in=("page", "comparison"),
    ),
    "r_l0": Metric(
        "r_L0",
        "Uniformity of active latent importance: exp(entropy of p) / ‖p‖₀ with p = |y| / Σ|y|, y = f ⊙ W_dec ∇L and "
        "L the sum of next tokens' logits less the mean logit, nothing spliced; the mean over activations. 1: all "
        "active latents matter alike.",
        lambda s: s.mean("r_l0", s.of_sae.of_rows("active_S")),
        ".3f",
        shown_in=("page", "comparison"),
    ),
    "loss_recovered_mean": Metric(
        "loss recovered, mean",
        "1 − delta loss / (loss with the site's mean in the activations' place − clean loss).",
        lambda s: _recovered(s.delta_S, s.loss["mean"], s.loss["clean"]),
        shown_in=("page", "terminal", "comparison"),
    ),
    "loss_recovered_zero": Metric(
        "loss recovered, zero",
        "The same with zeros in their place.",
        lambda s: _recovered(s.delta_S, s.loss["zero"], s.loss["clean"]),
        shown_in=(),
    ),
    "cosine": Metric(
        "cosine", "Mean cosine of activation and reconstruction.", lambda s: s.mean("cosine"), shown_in=()
    ),
    "norm_ratio": Metric("norm ratio", "Mean of ‖ŷ‖ / ‖y‖.", lambda s: s.mean("norm_ratio"), shown_in=()),
    "fvu_per_dimension": Metric(
        "FVU, per dimension",
        "Mean over dimensions of each one's squared error over its variance.",
        _per_dimension,
        shown_in=(),
    ),
    "explained_variance_elements": Metric(
        "explained variance, elements",
        "1 − mean squared error / variance of all elements of all activations, as in Gemma Scope's tutorials.",
        _of_elements,
        shown_in=(),
    ),
    "explained_variance_tokens": Metric(
        "explained variance, tokens",
        "Mean over activations of 1 − ‖y − ŷ‖² / ‖y − site's mean‖², as SAELens once had it.",
        lambda s: (NAN, NAN) if s.is_constant else s.mean("explained"),
        shown_in=(),
    ),
    "clean_loss": Metric(
        "clean loss",
        "Mean cross-entropy of next tokens, nothing spliced.",
        lambda s: ratio(s.loss["clean"], s.scored_S),
        paired=("clean_loss", None, "tokens"),
        shown_in=(),
    ),
    "spliced_loss": Metric(
        "spliced loss",
        "The same with the reconstruction spliced.",
        _loss("spliced"),
        paired=("spliced_loss", None, "tokens"),
        shown_in=(),
    ),
    "zero_ablation_loss": Metric("zero ablation", "The same with zeros spliced.", _loss("zero"), shown_in=()),
    "mean_ablation_loss": Metric(
        "mean ablation", "The same with the site's mean spliced.", _loss("mean"), shown_in=()
    ),
    "dead_fraction": Metric(
        "never fired here",
        "Share of latents that fired on none of these activations.",
        lambda s: (float((s.frequency_M == 0).mean()), None),
        ".2%",
        shown_in=("page", "terminal"),
    ),
    "dense_fraction": Metric(
        "fired on over 10%",
        "Share of latents that fired on more than a tenth of them.",
        lambda s: (float((s.frequency_M > jumprelu.DENSE).mean()), None),
        ".2%",
        shown_in=("page", "terminal"),
    ),
    "decoder_cosine": Metric(
        "nearest decoder cosine",
        "Median over latents of the largest cosine with another's decoder.",
        lambda s: (float(np.median(s.nearest_cosine_M)), None),
        ".3f",
        shown_in=(),
    ),
}
_OWN = frozenset(METRICS)
_FIELDS = {field.name for field in dataclasses.fields(evaluation_file.Evaluation)}
# What `measuring.measure` and `by_row` call what is summed anyway.
_SUMS = {
    "count", "error", "explained", "active", "loss", "variance", "clean_loss", "spliced_loss", "frequency", "fired",
}  # fmt: skip


def register(name: str, metric: Metric) -> None:
    """Adds a number to every evaluation from now on, or replaces one that was added.

    It stands in the files, on the page, and in the tables that `shown_in` names.

    Raises:
      ValueError: the name is taken, or the metric is neither measured nor reduced.
    """
    is_taken = METRICS[name] != metric if name in _OWN else name in _FIELDS | _SUMS
    if is_taken:
        raise InputError(f"another number is called {name!r}; choose another name")
    if not name.isidentifier():
        raise InputError(f"a metric cannot be called {name!r}; choose letters, digits and _")
    if metric.measure is None and metric.reduce is None:
        raise InputError(f"the metric {name} has neither measure nor reduce; give one of them")
    METRICS[name] = metric


def measures() -> tuple[tuple[str, OfTokens], ...]:
    """What metrics take of each token beyond what is measured anyway, by name."""
    return tuple((name, metric.measure) for name, metric in METRICS.items() if metric.measure is not None)


def definitions() -> list[list[str]]:
    """Each of `measures` by its name and a digest of its code, which is "" of a callable that is no function."""
    return [[name, _digest(getattr(inspect.unwrap(of), "__code__", None))] for name, of in measures()]


def _digest(code: types.CodeType | None) -> str:
    """The same in every process; functions that it calls are not part of it."""
    if code is None:
        return ""
    constants = [_digest(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()


def shown_in(place: str) -> tuple[str, ...]:
    """The names of the metrics that a place shows; see `Metric`."""
    return tuple(name for name, metric in METRICS.items() if place in metric.shown_in)


def paired() -> dict[str, tuple[str, str | None, str]]:
    """The numbers that two evaluations are compared by, row by row: what is summed, less what, over what."""
    own = {name: (name, None, "activations") for name, _ in measures()}
    return own | {name: metric.paired for name, metric in METRICS.items() if metric.paired}


def summarize(
    subject: jumprelu.SAE, of_sae: Totals, references: Totals, nearest_cosine_M: np.ndarray | None = None
) -> evaluation_file.Evaluation:
    """The numbers of one SAE.

    Args:
      subject: the SAE.
      of_sae: from `measuring.measure`, and its `loss_SxL` and perhaps `kl_SxL`.
      references: from `measuring.measure_target`; `scored_SxL`, and the losses `clean_SxL`, `zero_SxL` and
        `mean_SxL`, 0 where they are not scored.
      nearest_cosine_M: see `geometry.nearest_cosine`; None: it is computed.
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


def difference(number: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """What a number is of `b` less what it is of `a`, and its standard error over rows, the same rows of both.

    NaN where there is nothing to divide by.

    Args:
      number: of `paired()`.
      a: `by_row` of one evaluation.
      b: of another.
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
