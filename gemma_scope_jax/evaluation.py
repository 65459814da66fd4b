"""What an SAE or a transcoder costs the model that it is spliced into, and how sparse and faithful it is.

Definitions are Gemma Scope's (section 3.3.2 and appendix C). Every position but BOS, EOS and PAD (and the
user prefix of the chat template) is spliced, and only predictions made from such positions are scored.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from gemma import gm

from gemma_scope_jax import data, files, gemma, sae, weights

# The rows of a held-out split that are evaluated are the first of this order, whatever the run's seed.
ORDER_SEED = 0

# What takes a site's place beside what SAEs make of it: itself, zeros, or its mean.
REFERENCES = ("clean", "zero", "mean")


@dataclasses.dataclass(frozen=True)
class Subject:
    """An SAE to evaluate, on the site of its model; or a transcoder, which takes the place of its target site."""

    sae: sae.SAE
    site: gemma.Site
    mean_O: np.ndarray | None  # The target's mean for mean ablation; None: measured on training rows.
    target_site: gemma.Site | None = None  # Of a transcoder: what it predicts, at the same layer.

    @property
    def spliced(self) -> gemma.Site:
        """The site whose place is taken."""
        return self.target_site or self.site


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one SAE. Losses are in nats per prediction; `_se` is a standard error over rows."""

    l0: float
    fvu: float  # ‖y − ŷ‖² over ‖y − mean‖², y being what is spliced and the mean that of the evaluated activations
    delta_loss: float
    delta_loss_se: float
    clean_loss: float
    spliced_loss: float
    zero_ablation_loss: float
    mean_ablation_loss: float
    loss_recovered_zero: float
    loss_recovered_mean: float
    dead_fraction: float  # of latents that never fire on the evaluated tokens
    dense_fraction: float  # of latents that fire on more than a tenth of them
    rows: int
    activations: int  # positions that L0, FVU and frequencies are over
    tokens: int  # predictions scored
    frequency: np.ndarray  # [M], of each latent's firing


@functools.partial(jax.jit, static_argnames=("model", "sites"))
def _lower_half(
    model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array, sites: tuple[gemma.Site, ...]
) -> tuple[jax.Array, dict[gemma.Site, jax.Array]]:
    """The residual stream before the block of some sites, all of one layer, and their activations."""
    (layer,) = {site.layer for site in sites}
    before_SxLxD = gemma.embed(model, params, tokens_SxL)
    if layer > 0:
        before_SxLxD, _ = gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, range(layer))
    _, values = gemma.run_blocks(
        model, params, before_SxLxD, tokens_SxL, range(layer, layer + 1), read=list(sites)
    )
    return before_SxLxD, values


@functools.partial(jax.jit, static_argnames=("model", "site", "prefix"))
def _upper_half(
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    site: gemma.Site,
    replacement_SxLxD: jax.Array,
    prefix: int,
) -> jax.Array:
    """The residual stream behind the last block, with something else in the site's place."""
    is_kept_SxLx1 = gemma.is_kept(tokens_SxL, prefix)[..., None]

    def replace(x_SxLxD: jax.Array) -> jax.Array:
        return jnp.where(is_kept_SxLx1, replacement_SxLxD.astype(x_SxLxD.dtype), x_SxLxD)

    layers = range(site.layer, model.config.num_layers)
    return gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, layers, write={site: replace})[0]


# Apart from the blocks: XLA's CPU backend makes the two together slower than they are one after the other.
_loss = jax.jit(gemma.next_token_loss, static_argnames=("model", "prefix", "chunk"))


@functools.partial(jax.jit, static_argnames="prefix")
def _reconstruct(
    subject: sae.SAE, x_SxLxD: jax.Array, y_SxLxO: jax.Array, tokens_SxL: jax.Array, prefix: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What an SAE makes of x in place of y, and what that adds to L0, FVU and firing frequencies."""
    weight_B = gemma.is_kept(tokens_SxL, prefix).reshape(-1).astype(jnp.float32)
    x_BxD, y_BxO = (v.reshape(weight_B.size, -1).astype(jnp.float32) for v in (x_SxLxD, y_SxLxO))
    f_BxM = sae.encode(subject, x_BxD, jax.lax.Precision.HIGHEST)
    recon_BxO = sae.decode(subject, f_BxM, x_BxD, jax.lax.Precision.HIGHEST)
    fired_BxM = (f_BxM > 0) * weight_B[:, None]
    sums = {
        "count": weight_B.sum(),
        "l0": fired_BxM.sum(),
        "fired_M": fired_BxM.sum(0),
        # Sums and not matmuls, which on TPU would round their inputs to bfloat16.
        "squared_error": (weight_B * jnp.square(recon_BxO - y_BxO).sum(1)).sum(),
        "y_O": (weight_B[:, None] * y_BxO).sum(0),
        "y_squared": (weight_B * jnp.square(y_BxO).sum(1)).sum(),
    }
    return recon_BxO.reshape(y_SxLxO.shape), sums


def site_mean(
    loaded: gemma.Gemma, site: gemma.Site, rows: data.Rows, count: int, per_batch: int, prefix: int = 0
) -> np.ndarray:
    """The mean of a site over the unmasked positions of the first `count` training rows."""
    total, n = 0.0, 0
    for tokens_SxL in _token_batches(rows, count, per_batch):
        _, values = _lower_half(loaded.model, loaded.params, tokens_SxL, (site,))
        kept = np.asarray(gemma.is_kept(tokens_SxL, prefix))
        total = total + np.asarray(values[site], np.float64)[kept].sum(0)
        n += kept.sum()
    return (total / n).astype(np.float32)


def _token_batches(rows: data.Rows, count: int, per_batch: int) -> list[jax.Array]:
    chosen = data.order(len(rows), ORDER_SEED, 0, count)
    return [jnp.asarray(rows.read(chosen[i : i + per_batch]).tokens) for i in range(0, count, per_batch)]


def evaluate(
    loaded: gemma.Gemma,
    subjects: Mapping[str, Subject],
    training_rows: data.Rows,
    held_out_rows: data.Rows,
    count: int,
    per_batch: int,
    prefix: int = 0,
) -> dict[str, Evaluation]:
    """Evaluates SAEs on the first `count` held-out rows in a fixed order.

    Args:
      loaded: the whole model.
      subjects: the SAEs by name.
      training_rows: on which a site's mean is measured where it is not known.
      held_out_rows: what is evaluated on.
      count: how many of them, at most all.
      per_batch: rows in one pass.
      prefix: positions behind BOS that are neither spliced nor scored; see `gemma.is_kept`.
    """
    count = min(count, len(held_out_rows))
    batches = _token_batches(held_out_rows, count, per_batch)
    # What is no SAE's own, a pass through the model each, is done once for all that are spliced at one site.
    by_site: dict[gemma.Site, dict[str, Subject]] = {}
    for name, subject in subjects.items():
        by_site.setdefault(subject.spliced, {})[name] = subject
    results = {}
    passes = len(batches) * ((1 + len(REFERENCES)) * len(by_site) + len(subjects))
    with tqdm.tqdm(total=passes, desc="Evaluating", unit="pass", dynamic_ncols=True) as bar:
        for site, group in by_site.items():
            means = [subject.mean_O for subject in group.values() if subject.mean_O is not None]
            mean_O = (
                means[0]
                if means
                else site_mean(loaded, site, training_rows, min(64, len(training_rows)), per_batch, prefix)
            )
            results |= _evaluate_site(loaded, site, group, jnp.asarray(mean_O), batches, prefix, bar)
    return {name: results[name] for name in subjects}


def _row_losses(
    loaded: gemma.Gemma,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    site: gemma.Site,
    prefix: int,
    bar: tqdm.tqdm,
    replacement_SxLxO: jax.Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, the summed loss with something in the site's place, and how many predictions were scored."""
    model, params = loaded.model, loaded.params
    final_SxLxD = _upper_half(model, params, before_SxLxD, tokens_SxL, site, replacement_SxLxO, prefix)
    loss_SxL, scored_SxL = _loss(model, params, final_SxLxD, tokens_SxL, prefix)
    bar.update()
    return np.asarray((loss_SxL * scored_SxL).sum(1), np.float64), np.asarray(scored_SxL.sum(1), np.float64)


def _evaluate_site(
    loaded: gemma.Gemma,
    site: gemma.Site,
    subjects: Mapping[str, Subject],
    mean_O: jax.Array,
    batches: list[jax.Array],
    prefix: int,
    bar: tqdm.tqdm,
) -> dict[str, Evaluation]:
    """SAEs that are spliced at one site."""
    model, params = loaded.model, loaded.params
    sites = tuple(dict.fromkeys([site, *(subject.site for subject in subjects.values())]))
    device_saes = {name: jax.tree.map(jnp.asarray, subject.sae) for name, subject in subjects.items()}
    sums = {name: [] for name in subjects}
    # Of each row, summed over its predictions.
    losses = {name: [] for name in (*REFERENCES, *subjects)}
    scored = []
    for tokens_SxL in batches:
        before_SxLxD, values = _lower_half(model, params, tokens_SxL, sites)
        bar.update()

        measure = functools.partial(_row_losses, loaded, before_SxLxD, tokens_SxL, site, prefix, bar)
        y_SxLxO = values[site]
        references = {
            "clean": y_SxLxO,
            "zero": jnp.zeros_like(y_SxLxO),
            "mean": jnp.broadcast_to(mean_O[None, None].astype(y_SxLxO.dtype), y_SxLxO.shape),
        }
        for name, replacement_SxLxO in references.items():
            loss_S, scored_S = measure(replacement_SxLxO)
            losses[name].append(loss_S)
        scored.append(scored_S)  # The same whatever is spliced.
        for name, subject in subjects.items():
            recon_SxLxO, added = _reconstruct(
                device_saes[name], values[subject.site], y_SxLxO, tokens_SxL, prefix
            )
            sums[name].append(jax.device_get(added))
            losses[name].append(measure(recon_SxLxO)[0])

    rows = {name: np.concatenate(parts) for name, parts in losses.items()}
    return {
        name: _summarize(sums[name], rows[name], {r: rows[r] for r in REFERENCES}, np.concatenate(scored))
        for name in subjects
    }


def _summarize(
    sums: list[dict], spliced_S: np.ndarray, reference: Mapping[str, np.ndarray], scored_S: np.ndarray
) -> Evaluation:
    """The numbers of one SAE, from sums over batches and from each row's losses."""
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *sums)
    tokens = scored_S.sum()
    loss = {variant: values.sum() / tokens for variant, values in reference.items()}
    spliced = spliced_S.sum() / tokens
    delta = spliced - loss["clean"]
    frequency_M = total["fired_M"] / total["count"]
    variance = total["y_squared"] - np.square(total["y_O"]).sum() / total["count"]
    return Evaluation(
        l0=float(total["l0"] / total["count"]),
        fvu=float(total["squared_error"] / variance),
        delta_loss=delta,
        delta_loss_se=ratio_standard_error(spliced_S - reference["clean"], scored_S),
        clean_loss=loss["clean"],
        spliced_loss=spliced,
        zero_ablation_loss=loss["zero"],
        mean_ablation_loss=loss["mean"],
        loss_recovered_zero=1 - delta / (loss["zero"] - loss["clean"]),
        loss_recovered_mean=1 - delta / (loss["mean"] - loss["clean"]),
        dead_fraction=float((frequency_M == 0).mean()),
        dense_fraction=float((frequency_M > sae.DENSE).mean()),
        rows=scored_S.size,
        activations=int(total["count"]),
        tokens=int(tokens),
        frequency=frequency_M,
    )


def ratio_standard_error(numerator_S: np.ndarray, denominator_S: np.ndarray) -> float:
    """The standard error of Σ numerator / Σ denominator over independent rows (linearised); nan for one row."""
    n = numerator_S.size
    if n < 2:
        return float("nan")
    residual_S = numerator_S - numerator_S.sum() / denominator_S.sum() * denominator_S
    return float(np.sqrt(np.square(residual_S).sum() * n / (n - 1)) / denominator_S.sum())


def write_json(path: pathlib.Path, results: Mapping[str, Evaluation], about: Mapping) -> None:
    """Writes the numbers of every SAE, with what they were measured on."""
    saes = {}
    for name, result in results.items():
        numbers = {key: value for key, value in vars(result).items() if key != "frequency"}
        # JSON knows no NaN: the standard error of a single row is null.
        saes[name] = {key: None if np.isnan(value) else value for key, value in numbers.items()}
    with files.replacing_file(path) as partial:
        partial.write_text(json.dumps({**about, "sae": saes}, indent=1) + "\n", encoding="utf-8")


def _save(figure: object, path: pathlib.Path) -> None:
    with files.replacing_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple:
    """A figure and its axes; `width` and `height` are those of a panel, in inches."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )


def write_plot(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Draws each SAE's histogram of firing frequencies."""
    columns = 1 if len(results) < 4 else 3
    figure, axes = _figure(-(-len(results) // columns), columns, 7 if columns == 1 else 5, 3.2)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for (name, result), axis in zip(results.items(), axes.flat, strict=False):
        alive = result.frequency[result.frequency > 0]
        axis.hist(np.log10(alive), bins=60, color="#1a73e8")
        axis.set_xlabel("log₁₀ of the share of tokens a latent fires on")
        axis.set_ylabel("latents")
        axis.set_title(
            f"{name}\nL0 {result.l0:.1f}, FVU {result.fvu:.3f}, delta loss {result.delta_loss:.3f} ± "
            f"{result.delta_loss_se:.3f} nats, {result.dead_fraction:.1%} dead",
            fontsize=10 if columns == 1 else 8,
        )
    _save(figure, path)


def write_pareto(
    path: pathlib.Path, results: Mapping[str, Evaluation], sweeps: Mapping[str, Mapping[str, str]]
) -> None:
    """Draws L0 against delta loss and FVU, with a line through each sweep in the order given.

    Args:
      path: of the PNG.
      results: by SAE.
      sweeps: by the label of a line, its SAEs in order, each with the label of its point.
    """
    figure, ((left, right),) = _figure(1, 2, 5.5, 4.2)
    for label, points in sweeps.items():
        chosen = [results[name] for name in points]
        l0 = [result.l0 for result in chosen]
        left.errorbar(
            l0,
            [result.delta_loss for result in chosen],
            [result.delta_loss_se for result in chosen],
            marker="o",
            capsize=3,
            label=label,
        )
        right.plot(l0, [result.fvu for result in chosen], marker="o", label=label)
        for axis, key in ((left, "delta_loss"), (right, "fvu")):
            for result, text in zip(chosen, points.values(), strict=True):
                place = (result.l0, getattr(result, key))
                axis.annotate(text, place, (6, 6), textcoords="offset points", fontsize=7)
    left.set_ylabel("delta loss, nats")
    right.set_ylabel("FVU")
    everything = [results[name] for points in sweeps.values() for name in points]
    for axis, key in ((left, "delta_loss"), (right, "fvu")):
        # A splice may lower the loss, and an SAE may be silent.
        if min(result.l0 for result in everything) > 0:
            axis.set_xscale("log")
        if min(getattr(result, key) for result in everything) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.15)  # Room for the points' labels.
        axis.set_xlabel("L0")
        axis.grid(alpha=0.3, which="both")
    if len(sweeps) > 1:
        left.legend(fontsize=7)
    _save(figure, path)
