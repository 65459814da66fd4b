"""The evaluation of SAEs and transcoders: how well they reconstruct, and what that costs Gemma's predictions.

Activations are replaced ("spliced") at every position that counts: by default all except BOS, EOS and PAD. Only
predictions made from these positions are scored. `passes` has the compiled passes, `metrics` the metrics.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import measuring, metrics
from gemma_scope_jax.models import passes
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import distributed, reporting, resumable, sharding
from gemma_scope_jax.runtime.errors import InputError, NonFiniteError
from gemma_scope_jax.saes import attached, jumprelu
from gemma_scope_jax.saes.evaluation_file import Evaluation

CALIBRATION_ROWS = 64  # The number of training rows on which an unknown site mean is measured.
MEASURES = 2  # Raised whenever a batch's stored measurements change, so that old parts are not resumed.


def site_means(
    gemma: Gemma,
    sites: tuple[Site, ...],
    rows: token_rows.Rows,
    per_batch: int,
    counts: batching.Counts = batching.all_but_special,
) -> dict[Site, np.ndarray]:
    """The mean activations [O] of sites over the positions that count in the first training rows.

    All sites are measured in the same passes.

    Raises:
      ValueError: if no position counts.
      FloatingPointError: if an activation is not finite.
    """
    totals, n = dict.fromkeys(sites, 0.0), 0

    @jax.jit
    def sums(values: dict, is_kept_SxL: jax.Array) -> dict:
        means = {site: measuring.measure_target(v, is_kept_SxL)["y_SxO"].sum(0) for site, v in values.items()}
        return sharding.constrain(gemma.mesh, (means, is_kept_SxL.sum()), P())

    count = min(CALIBRATION_ROWS, len(rows))
    if sites:
        reporting.say(f"Measuring the mean activations on {count} training rows, sites: {len(sites)} …")
    for batch in batching.batches(gemma.mesh, rows, count, per_batch, counts) if sites else ():
        _, values, _ = passes.clean(gemma, batch.tokens_SxL, sites)
        found, kept = distributed.fetch(sums(values, batch.is_kept_SxL))
        totals = {site: totals[site] + np.asarray(found[site], np.float64) for site in sites}
        n += int(kept)
    if sites and not n:
        raise InputError(f"no position counts in the first {count} training rows: {_NONE_COUNTS}")
    for site, total in totals.items():
        if not np.isfinite(total).all():
            raise NonFiniteError(
                f"activations of {site} on the first {count} training rows are not finite: {_NOT_FINITE}"
            )
    return {site: (total / n).astype(np.float32) for site, total in totals.items()}


def activations(
    gemma: Gemma,
    sites: tuple[Site, ...],
    rows: token_rows.Rows,
    count: int,
    per_batch: int,
    counts: batching.Counts = batching.all_but_special,
) -> dict[Site, np.ndarray]:
    """The activations [B, D] of sites at the positions that count in the first `count` rows, in float32."""
    found: dict[Site, list[np.ndarray]] = {site: [] for site in sites}
    for batch in batching.batches(gemma.mesh, rows, min(count, len(rows)), per_batch, counts):
        _, values, _ = passes.clean(gemma, batch.tokens_SxL, sites)
        values, is_kept_SxL = distributed.fetch((values, batch.is_kept_SxL))
        for site in sites:
            found[site].append(values[site][is_kept_SxL].astype(np.float32))
    return {site: np.concatenate(parts) for site, parts in found.items()}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The median time of a batch in seconds, without the first batch, which compiles."""

    seconds: float
    # The time if every pass ran its blocks and its loss as fast as the clean pass does. The passes are the clean one,
    # two ablations for each site, and one splice for each SAE; ablations and splices begin at the site's block.
    bound_seconds: float


def evaluate(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    training_rows: token_rows.Rows,
    held_out_rows: token_rows.Rows,
    count: int,
    per_batch: int,
    counts: batching.Counts = batching.all_but_special,
    is_fast: bool = False,
    parts: resumable.Parts | None = None,
) -> tuple[dict[str, Evaluation], Cost | None]:
    """Evaluates SAEs on the first `count` held-out rows in a fixed order.

    One forward pass computes the activations of all sites and the clean predictions. From each spliced site's block
    on, there is one pass for zero ablation, one for mean ablation, one gradient, and one pass for each SAE.

    Args:
      gemma: the whole model.
      subjects: the SAEs by name.
      training_rows: the rows on which unknown site means are measured.
      held_out_rows: the rows to evaluate on.
      count: the number of rows to evaluate on, at most all.
      per_batch: rows in one pass.
      counts: which positions are spliced and scored.
      is_fast: leaves out KL, which computes logits twice, and r_L0, which needs the gradient.
      parts: stores the measurements of each batch, to resume from; None: they are not stored.

    Returns:
      The evaluations by SAE, and the time of a batch; None if fewer than two batches were measured.

    Raises:
      ValueError: if no prediction counts.
      FloatingPointError: if an activation, a reconstruction or a loss is not finite.
    """
    count = min(count, len(held_out_rows))
    spliced = tuple(dict.fromkeys(subject.spliced for subject in subjects.values()))
    said = {site: [s.mean_O for s in subjects.values() if s.spliced == site] for site in spliced}
    # If the SAEs of a site have different means, or one has none, all are compared with one measured mean.
    known = {
        site: means[0]
        for site, means in said.items()
        if means[0] is not None and all(np.array_equal(means[0], mean) for mean in means)
    }
    unknown = tuple(site for site in spliced if site not in known)
    means = known | site_means(gemma, unknown, training_rows, per_batch, counts)
    placed = {name: attached.place(gemma.mesh, subject.sae) for name, subject in subjects.items()}
    totals = {name: measuring.Totals() for name in (*map(_reference, spliced), *subjects)}
    seconds: list[dict[str, float]] = []

    per_batch = batching.padded_rows(gemma.mesh, count, per_batch)
    passes_of_batch = 1 + (2 if is_fast else 3) * len(spliced) + len(subjects)
    total = -(-count // per_batch) * passes_of_batch
    speaks = distributed.is_first()
    with reporting.bar("Evaluating", "pass", total, speaks=speaks, compiles=passes_of_batch) as bar:
        for index, rows in enumerate(batching.batches(gemma.mesh, held_out_rows, count, per_batch, counts)):
            found = parts.read(index) if parts else None
            if found is None:
                found, took = _measure(gemma, subjects, placed, means, rows, is_fast, bar.update)
                _check_finite(found, held_out_rows, index * per_batch)
                seconds.append(took)
                if parts:
                    parts.write(index, found)
            else:
                bar.update(passes_of_batch)
            for name, sums in found.items():
                totals[name].add(sums, rows.position_SxL)
    if not totals[_reference(spliced[0])].of_rows("scored_S").sum():
        raise InputError(f"no prediction counts in these rows: {_NONE_COUNTS}")
    if speaks:
        reporting.say("Computing the metrics …")
    results = {
        name: metrics.summarize(subject.sae, totals[name], totals[_reference(subject.spliced)])
        for name, subject in subjects.items()
    }
    return results, _cost(subjects, gemma.num_layers, seconds)


_NONE_COUNTS = "prompts and templates may fill them; use longer rows or other turns"
_NOT_FINITE = "check Gemma's weights, and try --dtype=float32"


def _check_finite(found: Mapping[str, Mapping[str, np.ndarray]], rows: token_rows.Rows, start: int) -> None:
    """Raises FloatingPointError with the row and the position if a measurement of a batch is not finite."""
    for name, sums in found.items():
        for quantity in ("clean_SxL", "error_SxL", "loss_SxL"):
            places = np.argwhere(~np.isfinite(sums.get(quantity, 0.0)))
            if not places.size:
                continue
            number, position = places[0]
            (row,) = token_rows.order(len(rows), batching.ORDER_SEED, start + int(number), 1)
            of, mend = (
                f"the reconstruction by {name}",
                f"check its weights. If they are finite, {_NOT_FINITE}",
            )
            if quantity == "clean_SxL":
                of, mend = "Gemma's own loss", _NOT_FINITE
            raise NonFiniteError(f"{of} is not finite at row {row}, position {position}; {mend}")


def _reference(site: Site) -> str:
    """The name for a site's own measurements, which no SAE has."""
    return f"site:{site}"


def _measure(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    placed: Mapping[str, jumprelu.SAE],
    means: Mapping[Site, np.ndarray],
    rows: batching.PlacedRows,
    is_fast: bool,
    done: Callable[[], object],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """The measurements of one batch, by SAE and by spliced site; and the seconds that `Cost` is computed from."""
    tokens = (rows.tokens_SxL, rows.is_kept_SxL)
    sites = tuple(dict.fromkeys(s for subject in subjects.values() for s in (subject.site, subject.spliced)))
    start = time.perf_counter()
    clean_pass = passes.clean(gemma, rows.tokens_SxL, sites)
    streams, values, clean_SxLxD = jax.block_until_ready(clean_pass)
    blocks = time.perf_counter()
    clean = jax.block_until_ready(passes.loss(gemma, clean_SxLxD, *tokens))
    took = {"blocks": blocks - start, "loss": time.perf_counter() - blocks}
    done()

    all_found: dict[str, dict[str, np.ndarray]] = {}

    def keep(name: str, found: dict[str, jax.Array]) -> None:
        fetched = distributed.fetch(found)
        all_found[name] = {k: v if k.endswith("_M") else v[: rows.count] for k, v in fetched.items()}

    for site in dict.fromkeys(subject.spliced for subject in subjects.values()):
        y_SxLxO, before_SxLxD = values[site], streams[site.layer]
        mean_O = np.asarray(means[site])
        splice = functools.partial(passes.spliced, gemma, before_SxLxD, *tokens, site)
        # On the host, since an array on this host's devices cannot be combined with one on all hosts' devices.
        ablations = {"zero": np.zeros_like(mean_O), "mean": mean_O}
        found = measuring.target(gemma.mesh, y_SxLxO, rows.is_kept_SxL)
        found |= {"clean_SxL": clean["loss_SxL"], "scored_SxL": clean["scored_SxL"]}
        for name, value_O in ablations.items():
            found[f"{name}_SxL"] = passes.loss(gemma, splice(value_O[None, None]), *tokens)["loss_SxL"]
            done()
        keep(_reference(site), found)
        importance_SxLxO = None
        if not is_fast:
            importance_SxLxO = passes.importance(gemma, before_SxLxD, y_SxLxO, *tokens, site)
            done()
        for name, subject in subjects.items():
            if subject.spliced != site:
                continue
            recon_SxLxO, found = measuring.reconstruct(
                gemma.mesh, placed[name], values[subject.site], y_SxLxO, mean_O, rows.is_kept_SxL, importance_SxLxO,
                subject.top_k, metrics.measures(),
            )  # fmt: skip
            final_SxLxD = splice(recon_SxLxO)
            if is_fast:
                found["loss_SxL"] = passes.loss(gemma, final_SxLxD, *tokens)["loss_SxL"]
            else:
                found |= passes.divergence(gemma, final_SxLxD, clean_SxLxD, *tokens)
            keep(name, found)
            done()
    return all_found, took | {"all": time.perf_counter() - start}


def _cost(
    subjects: Mapping[str, attached.Subject], num_layers: int, seconds: list[dict[str, float]]
) -> Cost | None:
    if len(seconds) < 2:
        return None
    took = {name: float(np.median([one[name] for one in seconds[1:]])) for name in seconds[0]}
    sites = {subject.spliced for subject in subjects.values()}
    from_blocks = [*sites, *sites, *(subject.spliced for subject in subjects.values())]
    whole = 1 + sum(1 - site.layer / num_layers for site in from_blocks)
    return Cost(took["all"], whole * took["blocks"] + (1 + len(from_blocks)) * took["loss"])
