"""An evaluation as one page that needs no network: tables, plots, definitions, and how to make it again."""

import base64
import csv
import io
import pathlib
from collections.abc import Mapping

import jinja2
import numpy as np

from gemma_scope_jax import files, metrics
from gemma_scope_jax.metrics import Evaluation

_TEMPLATE = pathlib.Path(__file__).parent / "evaluation.html.jinja"

# Each number: its label, how it is shown, and what it is.
NUMBERS = {
    "l0": ("L0", ".1f", "Mean number of latents that fire on an activation."),
    "fvu": ("FVU", ".4f", "Σ‖y − ŷ‖² / Σ‖y − mean‖², the mean being that of the activations evaluated on."),
    "delta_loss": (
        "delta loss, nats",
        ".4f",
        "Mean cross-entropy of next tokens with the reconstruction in the activations' place, less that without.",
    ),
    "kl": (
        "KL, nats",
        ".4f",
        "Mean KL divergence of the spliced from the clean prediction, KL(clean ‖ spliced).",
    ),
    "r_l0": (
        "r_L0",
        ".3f",
        "Uniformity of active latent importance: exp(entropy of p) / ‖p‖₀ with p = |y| / Σ|y|, y = f ⊙ W_dec ∇L and "
        "L the sum of next tokens' logits less the mean logit, nothing spliced; the mean over activations. 1: all "
        "active latents matter alike.",
    ),
    "loss_recovered_mean": (
        "loss recovered, mean",
        ".4f",
        "1 − delta loss / (loss with the site's mean in the activations' place − clean loss).",
    ),
    "loss_recovered_zero": ("loss recovered, zero", ".4f", "The same with zeros in their place."),
    "cosine": ("cosine", ".4f", "Mean cosine of activation and reconstruction."),
    "norm_ratio": ("norm ratio", ".4f", "Mean of ‖ŷ‖ / ‖y‖."),
    "fvu_per_dimension": (
        "FVU, per dimension",
        ".4f",
        "Mean over dimensions of each one's squared error over its variance.",
    ),
    "explained_variance_elements": (
        "explained variance, elements",
        ".4f",
        "1 − mean squared error / variance of all elements of all activations, as in Gemma Scope's tutorials.",
    ),
    "explained_variance_tokens": (
        "explained variance, tokens",
        ".4f",
        "Mean over activations of 1 − ‖y − ŷ‖² / ‖y − site's mean‖², as SAELens once had it.",
    ),
    "clean_loss": ("clean loss", ".4f", "Mean cross-entropy of next tokens, nothing spliced."),
    "spliced_loss": ("spliced loss", ".4f", "The same with the reconstruction spliced."),
    "zero_ablation_loss": ("zero ablation", ".4f", "The same with zeros spliced."),
    "mean_ablation_loss": ("mean ablation", ".4f", "The same with the site's mean spliced."),
    "dead_fraction": ("never fired here", ".2%", "Share of latents that fired on none of these activations."),
    "dense_fraction": (
        "fired on over 10%",
        ".2%",
        "Share of latents that fired on more than a tenth of them.",
    ),
    "decoder_cosine": (
        "nearest decoder cosine",
        ".3f",
        "Median over latents of the largest cosine with another's decoder.",
    ),
}
_IN_TABLE = (
    "l0",
    "fvu",
    "delta_loss",
    "kl",
    "r_l0",
    "loss_recovered_mean",
    "dead_fraction",
    "dense_fraction",
)


def shown(result: Evaluation, name: str) -> str:
    """A number with its standard error, if it has one; a dash where it was not measured."""
    value, error = getattr(result, name), getattr(result, f"{name}_se", None)
    form = NUMBERS[name][1]
    if value is None or not np.isfinite(value):
        return "–"
    return (
        f"{value:{form}} ± {error:{form}}" if error is not None and np.isfinite(error) else f"{value:{form}}"
    )


def write_csv(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Writes a row of numbers for each SAE, with standard errors in columns of their own."""
    rows = [{"name": name, **metrics.numbers(result)} for name, result in results.items()]
    for row in rows:
        row["l0_quantiles"] = " ".join(map(str, row["l0_quantiles"]))
    with files.replacing_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_html(
    path: pathlib.Path,
    results: Mapping[str, Evaluation],
    about: Mapping[str, object],
    command: str,
    layers: Mapping[str, int],
    images: Mapping[str, pathlib.Path] | None = None,
) -> None:
    """Writes the page.

    Args:
      path: of the page.
      results: by SAE.
      about: what they were measured on, by name.
      command: that makes it again.
      layers: of each SAE.
      images: plots that are there already, by title.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    plots = {title: _data_url(image.read_bytes()) for title, image in (images or {}).items()}
    if len(set(layers.values())) > 1:
        plots["By layer"] = _by_layer(results, layers)
    rendered = template.render(
        about=about,
        command=command,
        first=next(iter(results.values())),
        numbers=NUMBERS,
        table={
            name: {column: shown(result, column) for column in _IN_TABLE} for name, result in results.items()
        },
        columns=_IN_TABLE,
        details={
            name: {number: shown(result, number) for number in NUMBERS} for name, result in results.items()
        },
        quantiles={
            name: ", ".join(f"{q}%: {v}" for q, v in zip(metrics.QUANTILES, result.l0_quantiles, strict=True))
            for name, result in results.items()
        },
        pictures={name: _details(result) for name, result in results.items()},
        plots=plots,
    )
    with files.replacing_file(path) as partial:
        partial.write_text(rendered, encoding="utf-8")


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(figure: object, dpi: int = 80) -> str:
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    plt.close(figure)
    return _data_url(out.getvalue())


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _details(result: Evaluation) -> str:
    """Distributions of one SAE, and what changes with a token's position."""
    figure, axes = _subplots(2, 4, (15, 5.6))
    (frequency, l0, error, delta), (threshold, decoder, encoder, cosine) = axes
    alive = result.frequency[result.frequency > 0]
    frequency.hist(np.log10(alive), bins=60)
    frequency.set_title("log₁₀ of a latent's firing frequency")
    l0.bar(np.arange(result.l0_counts.size), result.l0_counts, width=1)
    l0.set_title("L0 of an activation")
    position = np.arange(len(result.by_position["error"]))
    for axis, name, title in (
        (error, "error", "squared error / variance, by position"),
        (delta, "delta_loss", "delta loss by position, nats"),
    ):
        values = result.by_position[name]
        axis.plot(position[1:], values[1:], lw=0.8)
        axis.set_title(title)
    for axis, values, title in (
        (threshold, result.threshold, "thresholds"),
        (decoder, result.decoder_norm, "decoder norms"),
        (encoder, result.encoder_norm, "encoder norms"),
        (cosine, result.nearest_cosine, "cosine with the nearest decoder"),
    ):
        # All alike but for rounding, as decoder norms are: one bar, not the shape of rounding.
        low, high = float(values.min()), float(values.max())
        near = high - low < 1e-4 * max(abs(high), 1e-30)
        axis.hist(
            values,
            bins=60,
            range=(low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3) if near else None,
        )
        axis.set_title(title)
    for axis in axes.flat:
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    return _png(figure)


def _by_layer(results: Mapping[str, Evaluation], layers: Mapping[str, int]) -> str:
    """L0, FVU and delta loss against the layer."""
    figure, ((l0, fvu, delta),) = _subplots(1, 3, (13, 3.6))
    # A line for what is otherwise the same, by its name without the layer.
    lines: dict[str, list[str]] = {}
    for name in sorted(results, key=lambda name: layers[name]):
        lines.setdefault(name.replace(f"layer_{layers[name]}_", "", 1), []).append(name)
    for label, names in lines.items():
        x = [layers[name] for name in names]
        l0.plot(x, [results[name].l0 for name in names], marker="o", label=label)
        fvu.plot(x, [results[name].fvu for name in names], marker="o")
        of = [results[name] for name in names]
        delta.errorbar(x, [r.delta_loss for r in of], [r.delta_loss_se for r in of], marker="o", capsize=3)
    for axis, title in ((l0, "L0"), (fvu, "FVU"), (delta, "delta loss, nats")):
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    if 1 < len(lines) <= 8:
        l0.legend(fontsize=7)
    return _png(figure, 100)
