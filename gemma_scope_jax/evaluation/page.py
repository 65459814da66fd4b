"""An evaluation as files: JSON, CSV, arrays, and one self-contained page with tables, plots and definitions."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.display import html, plotting
from gemma_scope_jax.evaluation import metrics, plots
from gemma_scope_jax.runtime import files
from gemma_scope_jax.saes import evaluation_file, verdicts
from gemma_scope_jax.saes.evaluation_file import Evaluation


def shown(result: Evaluation, name: str) -> str:
    """A metric as text, with its standard error if it has one; a dash if it was not measured or is undefined."""
    value, error = (evaluation_file.number(result, of) for of in (name, f"{name}_se"))
    return with_error(value, error, metrics.METRICS[name].form)


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A value and its standard error as text, in a Python format; a dash without a value."""
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
    """Writes the metrics of every SAE, the verdicts, and the model and rows that they were measured on."""
    saes = {}
    for name, result in results.items():
        saes[name] = evaluation_file.numbers(result)
        if name in judgements:
            saes[name]["verdict"] = {"faults": judgements[name].faults, "line": judgements[name].line}
    with files.replacing_file(path) as partial:
        partial.write_text(json.dumps({**about, "sae": saes}, indent=1) + "\n", encoding="utf-8")


def write_arrays(path: pathlib.Path, results: Mapping[str, Evaluation]) -> None:
    """Writes the arrays of every SAE: `SAE/frequency` and others, `SAE/by_position/…`, `SAE/by_row/…`."""
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
    """Writes a row of metrics for each SAE, with standard errors in separate columns."""
    rows = [{"name": name, **evaluation_file.numbers(result)} for name, result in results.items()]
    for row in rows:
        row["l0_quantiles"] = " ".join(map(str, row["l0_quantiles"]))
    files.write_csv(path, rows)


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
    """Writes the page of an evaluation.

    Args:
      path: the file to write.
      results: the evaluations by SAE.
      about: the model and rows that they were measured on; see `report.about`.
      command: the command that makes the page again.
      layers: the layer of each SAE.
      images: the files of further plots, by title.
      judgements: the verdicts by SAE.
      remarks: remarks on the whole evaluation, a sentence each.
    """
    pictures_of = {title: html.data_url(image.read_bytes()) for title, image in (images or {}).items()}
    if len(set(layers.values())) > 1:
        pictures_of["L0, FVU and delta loss by layer"] = html.data_url(
            plotting.png(plots.by_layer(results, layers))
        )
    columns = metrics.shown_in("page")
    html.render(
        path,
        "evaluation/evaluation.html.jinja",
        about=about,
        command=command,
        first=next(iter(results.values())),
        numbers=metrics.METRICS,
        table={
            name: {column: shown(result, column) for column in columns} for name, result in results.items()
        },
        summary=[column for column in columns if metrics.METRICS[column].reading],
        further=[column for column in columns if not metrics.METRICS[column].reading],
        details={
            name: {number: shown(result, number) for number in metrics.METRICS}
            for name, result in results.items()
        },
        quantiles={
            name: ", ".join(
                f"{q}%: {v}" for q, v in zip(evaluation_file.QUANTILES, result.l0_quantiles, strict=True)
            )
            for name, result in results.items()
        },
        pictures={
            name: html.data_url(plotting.png(plots.details(result), 80)) for name, result in results.items()
        },
        plots=pictures_of,
        verdicts=judgements or {},
        remarks=remarks,
    )
