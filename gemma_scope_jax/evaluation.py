"""What an SAE costs the model that it is spliced into, and how sparse and faithful it is.

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

from gemma_scope_jax import data, gemma, sae, weights
from gemma_scope_jax.formats import files

# The rows of a held-out split that are evaluated are the first of this order, whatever the run's seed.
ORDER_SEED = 0

# What takes the site's place: itself, its reconstruction, zeros, or the site's mean.
VARIANTS = ("clean", "spliced", "zero", "mean")


@dataclasses.dataclass(frozen=True)
class Subject:
    """An SAE to evaluate, on the site of its model."""

    sae: sae.SAE
    site: gemma.Site
    mean_D: np.ndarray | None  # The site's mean for mean ablation; None: measured on training rows.


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one SAE. Losses are in nats per prediction; `_se` is a standard error over rows."""

    l0: float
    fvu: float  # ‖x − x̂‖² over ‖x − mean‖², the mean being that of the evaluated activations
    delta_loss: float
    delta_loss_se: float
    clean_loss: float
    spliced_loss: float
    zero_ablation_loss: float
    mean_ablation_loss: float
    loss_recovered_zero: float
    loss_recovered_mean: float
    dead_fraction: float  # of latents that never fire on the evaluated tokens
    rows: int
    activations: int  # positions that L0, FVU and frequencies are over
    tokens: int  # predictions scored
    frequency: np.ndarray  # [M], of each latent's firing


@functools.partial(jax.jit, static_argnames=("model", "site"))
def _lower_half(
    model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array, site: gemma.Site
) -> tuple[jax.Array, jax.Array]:
    """The residual stream before the site's block, and the site's activations."""
    before_SxLxD = gemma.embed(model, params, tokens_SxL)
    if site.layer > 0:
        before_SxLxD, _ = gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, range(site.layer))
    layers = range(site.layer, site.layer + 1)
    _, values = gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, layers, read=[site])
    return before_SxLxD, values[site]


@functools.partial(jax.jit, static_argnames=("model", "site", "prefix"))
def _upper_half(
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    site: gemma.Site,
    subject: sae.SAE,
    mean_D: jax.Array,
    variant: jax.Array,
    prefix: int,
) -> jax.Array:
    """The residual stream behind the last block, with one of `VARIANTS` in the site's place."""
    is_kept_SxLx1 = gemma.is_kept(tokens_SxL, prefix)[..., None]

    def reconstruct(x_SxLxD: jax.Array) -> jax.Array:
        x_BxD = x_SxLxD.reshape(-1, x_SxLxD.shape[-1]).astype(jnp.float32)
        f_BxM = sae.encode(subject, x_BxD, jax.lax.Precision.HIGHEST)
        return sae.decode(subject, f_BxM, jax.lax.Precision.HIGHEST).reshape(x_SxLxD.shape)

    def replace(x_SxLxD: jax.Array) -> jax.Array:
        replacements = [
            lambda x: x,
            lambda x: reconstruct(x).astype(x.dtype),
            jnp.zeros_like,
            lambda x: jnp.broadcast_to(mean_D[None, None].astype(x.dtype), x.shape),
        ]
        return jnp.where(is_kept_SxLx1, jax.lax.switch(variant, replacements, x_SxLxD), x_SxLxD)

    layers = range(site.layer, model.config.num_layers)
    write = {site: replace}
    return gemma.run_blocks(model, params, before_SxLxD, tokens_SxL, layers, write=write)[0]


# Apart from the blocks: XLA's CPU backend makes the two together slower than they are one after the other.
_loss = jax.jit(gemma.next_token_loss, static_argnames=("model", "prefix", "chunk"))


@functools.partial(jax.jit, static_argnames="prefix")
def _sae_sums(
    subject: sae.SAE, x_SxLxD: jax.Array, tokens_SxL: jax.Array, prefix: int
) -> dict[str, jax.Array]:
    """What one batch of rows adds to L0, FVU and firing frequencies."""
    weight_B = gemma.is_kept(tokens_SxL, prefix).reshape(-1).astype(jnp.float32)
    x_BxD = x_SxLxD.reshape(weight_B.size, -1).astype(jnp.float32)
    f_BxM = sae.encode(subject, x_BxD, jax.lax.Precision.HIGHEST)
    recon_BxD = sae.decode(subject, f_BxM, jax.lax.Precision.HIGHEST)
    fired_BxM = (f_BxM > 0) * weight_B[:, None]
    return {
        "count": weight_B.sum(),
        "l0": fired_BxM.sum(),
        "fired_M": fired_BxM.sum(0),
        # Sums and not matmuls, which on TPU would round their inputs to bfloat16.
        "squared_error": (weight_B * jnp.square(recon_BxD - x_BxD).sum(1)).sum(),
        "x_D": (weight_B[:, None] * x_BxD).sum(0),
        "x_squared": (weight_B * jnp.square(x_BxD).sum(1)).sum(),
    }


def site_mean(
    loaded: gemma.Gemma, site: gemma.Site, rows: data.Rows, count: int, per_batch: int, prefix: int = 0
) -> np.ndarray:
    """The mean of a site over the unmasked positions of the first `count` training rows."""
    total, n = 0.0, 0
    for tokens_SxL in _token_batches(rows, count, per_batch):
        _, x_SxLxD = _lower_half(loaded.model, loaded.params, tokens_SxL, site)
        kept = np.asarray(gemma.is_kept(tokens_SxL, prefix))
        total = total + np.asarray(x_SxLxD, np.float64)[kept].sum(0)
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
    passes = len(batches) * sum(2 + len(VARIANTS) for _ in subjects)
    results = {}
    with tqdm.tqdm(total=passes, desc="Evaluating", unit="pass", dynamic_ncols=True) as bar:
        for name, subject in subjects.items():
            mean_D = subject.mean_D
            if mean_D is None:
                mean_D = site_mean(
                    loaded, subject.site, training_rows, min(64, len(training_rows)), per_batch, prefix
                )
            results[name] = _evaluate_one(loaded, subject, jnp.asarray(mean_D), batches, prefix, bar)
    return results


def _evaluate_one(
    loaded: gemma.Gemma,
    subject: Subject,
    mean_D: jax.Array,
    batches: list[jax.Array],
    prefix: int,
    bar: tqdm.tqdm,
) -> Evaluation:
    model, params = loaded.model, loaded.params
    device_sae = jax.tree.map(jnp.asarray, subject.sae)
    sums = []
    loss_rows = {variant: [] for variant in VARIANTS}  # summed over each row's predictions
    scored_rows = []
    for tokens_SxL in batches:
        before_SxLxD, x_SxLxD = _lower_half(model, params, tokens_SxL, subject.site)
        bar.update()
        sums.append(jax.device_get(_sae_sums(device_sae, x_SxLxD, tokens_SxL, prefix)))
        bar.update()
        for index, variant in enumerate(VARIANTS):
            final_SxLxD = _upper_half(
                model, params, before_SxLxD, tokens_SxL, subject.site, device_sae, mean_D, index, prefix
            )
            loss_SxL, scored_SxL = _loss(model, params, final_SxLxD, tokens_SxL, prefix)
            loss_rows[variant].append(np.asarray((loss_SxL * scored_SxL).sum(1), np.float64))
            bar.update()
        scored_rows.append(np.asarray(scored_SxL.sum(1), np.float64))

    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *sums)
    scored_S = np.concatenate(scored_rows)
    tokens = scored_S.sum()
    rows = {variant: np.concatenate(parts) for variant, parts in loss_rows.items()}
    loss = {variant: values.sum() / tokens for variant, values in rows.items()}
    delta = loss["spliced"] - loss["clean"]
    frequency_M = total["fired_M"] / total["count"]
    variance = total["x_squared"] - np.square(total["x_D"]).sum() / total["count"]
    return Evaluation(
        l0=float(total["l0"] / total["count"]),
        fvu=total["squared_error"] / variance,
        delta_loss=delta,
        delta_loss_se=ratio_standard_error(rows["spliced"] - rows["clean"], scored_S),
        clean_loss=loss["clean"],
        spliced_loss=loss["spliced"],
        zero_ablation_loss=loss["zero"],
        mean_ablation_loss=loss["mean"],
        loss_recovered_zero=1 - delta / (loss["zero"] - loss["clean"]),
        loss_recovered_mean=1 - delta / (loss["mean"] - loss["clean"]),
        dead_fraction=float((frequency_M == 0).mean()),
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


def write_plot(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Draws each SAE's histogram of firing frequencies."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 1, figsize=(7, 3.2 * len(results)), squeeze=False, layout="constrained"
    )
    for (name, result), axis in zip(results.items(), axes[:, 0], strict=True):
        alive = result.frequency[result.frequency > 0]
        axis.hist(np.log10(alive), bins=60, color="#1a73e8")
        axis.set_xlabel("log₁₀ of the share of tokens a latent fires on")
        axis.set_ylabel("latents")
        axis.set_title(
            f"{name}\nL0 {result.l0:.1f}, FVU {result.fvu:.3f}, delta loss {result.delta_loss:.3f} ± "
            f"{result.delta_loss_se:.3f} nats, {result.dead_fraction:.1%} dead",
            fontsize=10,
        )
    with files.replacing_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
