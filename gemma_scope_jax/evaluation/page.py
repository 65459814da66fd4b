"""An evaluation as one page that needs no network: tables, plots, definitions, and how to make it again."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.display import html
from gemma_scope_jax.evaluation import plots
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import evaluation_file, verdicts
from gemma_scope_jax.saes.evaluation_file import Evaluation

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
    return with_error(getattr(result, name), getattr(result, f"{name}_se", None), NUMBERS[name][1])


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A value and its standard error, where there are any, in a format."""
    if value is None or not np.isfinite(value):
        return "–"
    return (
        f"{value:{form}} ± {abs(error):{form.lstrip('+')}}"
        if error is not None and np.isfinite(error)
        else f"{value:{form}}"
    )


def write_json(
    path: pathlib.Path,
    results: Mapping[str, Evaluation],
    about: Mapping,
    judgements: Mapping[str, verdicts.Verdict],
) -> None:
    """Writes the numbers of every SAE and the verdicts on those that have one, with what they were measured on."""
    saes = {}
    for name, result in results.items():
        saes[name] = evaluation_file.numbers(result)
        if name in judgements:
            saes[name]["verdict"] = {"faults": judgements[name].faults, "line": judgements[name].line}
    with files.replacing_file(path) as partial:
        partial.write_text(json.dumps({**about, "sae": saes}, indent=1) + "\n", encoding="utf-8")


def write_arrays(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Writes what is no single number: `SAE/frequency` and so on, `SAE/by_position/…`, `SAE/by_row/…`."""
    arrays = {}
    for name, result in results.items():
        for key, value in vars(result).items():
            if isinstance(value, np.ndarray):
                arrays[f"{name}/{key}"] = value
            elif isinstance(value, Mapping):
                arrays |= {f"{name}/{key}/{inner}": array for inner, array in value.items()}
    with files.replacing_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_csv(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Writes a row of numbers for each SAE, with standard errors in columns of their own."""
    rows = [{"name": name, **evaluation_file.numbers(result)} for name, result in results.items()]
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
    judgements: Mapping[str, verdicts.Verdict] | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Writes the page.

    Args:
      path: of the page.
      results: by SAE.
      about: what they were measured on, by name.
      command: that makes it again.
      layers: of each SAE.
      images: plots that are there already, by title.
      judgements: verdicts, by SAE.
      remarks: on all of it, a sentence each.
    """
    pictures_of = {title: html.data_url(image.read_bytes()) for title, image in (images or {}).items()}
    if len(set(layers.values())) > 1:
        pictures_of["By layer"] = html.data_url(plots.by_layer(results, layers))
    html.render(
        path,
        "evaluation/evaluation.html.jinja",
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
            name: ", ".join(
                f"{q}%: {v}" for q, v in zip(evaluation_file.QUANTILES, result.l0_quantiles, strict=True)
            )
            for name, result in results.items()
        },
        pictures={name: html.data_url(plots.details(result)) for name, result in results.items()},
        plots=pictures_of,
        verdicts=judgements or {},
        remarks=remarks,
    )
