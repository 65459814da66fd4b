"""Evaluations side by side: of two suites of SAEs, or of one on several texts."""

import csv
import dataclasses
import pathlib
import shlex
import types
from collections.abc import Mapping

import numpy as np

from gemma_scope_jax.display import html, tables
from gemma_scope_jax.evaluation import metrics, page, plots
from gemma_scope_jax.runtime import files, printing
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import evaluation_file
from gemma_scope_jax.saes.evaluation_file import Evaluation

FVU_OF_TEXTS = "FVU is against each text's own variance: of different texts compare delta loss, not FVU."


@dataclasses.dataclass(frozen=True)
class Suite:
    """An evaluation of some SAEs, as `report` wrote it."""

    about: Mapping[str, object]  # what it was made of
    # By SAE: objects with the numbers of `evaluation_file.Evaluation`, and its `by_row`.
    results: Mapping[str, Evaluation | types.SimpleNamespace]


_MAX_ROWS = 2**24


def by_row() -> set[str]:
    """The sums of each row that `metrics.difference` takes."""
    return {"activations", *(name for of in metrics.paired().values() for name in of if name)}


def read(folder: pathlib.Path) -> Suite:
    """The evaluation in a folder.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path, arrays = folder / "evaluation.json", folder / "evaluation.npz"
    if not path.exists():
        raise FormatError(
            f"{folder} has no evaluation.json; run python evaluate.py on what is to be compared"
        )
    about = evaluation_file.read_numbers(path)
    saes = about.pop("sae")
    for name, numbers in saes.items():
        if not isinstance(numbers["rows"], int) or not 0 < numbers["rows"] <= _MAX_ROWS:
            raise FormatError(f"{path} is no evaluation: {printable(name)} has {numbers['rows']} rows")
    shapes = {
        f"{name}/by_row/{quantity}": (numbers["rows"],)
        for name, numbers in saes.items()
        for quantity in by_row()
    }
    found = files.read_npz(arrays, shapes) if arrays.exists() else {}
    results = {}
    for name, numbers in saes.items():
        of = {quantity: found[key] for quantity in by_row() if (key := f"{name}/by_row/{quantity}") in found}
        # Plots take these for numbers.
        drawn = {key: np.nan for key in ("l0", "fvu", "delta_loss") if numbers[key] is None}
        of = of if of.keys() == by_row() else {}
        results[name] = types.SimpleNamespace(**numbers | drawn, by_row=of)
    return Suite(about, results)


def compare(folders: list[pathlib.Path], out: pathlib.Path) -> None:
    """Writes and prints evaluations side by side, each compared with the first.

    SAEs are compared where they have one name in both; where no name is in both and there are as many in each, in
    their order. Differences have a standard error where both were evaluated on the same rows.

    Raises:
      ValueError: a folder holds no evaluation, there is but one, or `out` is no folder.
    """
    if len(folders) < 2:
        raise FormatError(f"{folders[0]} alone cannot be compared; give two folders or more")
    files.check_output(out, is_folder=True)
    shortest = _labels(folders)
    columns = {label: read(folder) for label, folder in zip(shortest, folders, strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "gemma_scope_jax", "compare", *map(str, folders), f"--out={out}"]
    command = shlex.join(map(printing.shareable, command))
    write(out, columns, command, is_compared=True)


def _labels(folders: list[pathlib.Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    for depth in range(1, 20):
        labels = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    raise FormatError("an evaluation is given twice; give different ones")


def rows_of(columns: Mapping[str, Suite]) -> list[dict[str, str]]:
    """Which SAEs stand side by side: by column, their names."""
    names = [list(suite.results) for suite in columns.values()]
    common = set(names[0]).intersection(*names[1:])
    if not common and len({len(each) for each in names}) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*names, strict=True)]
    every = dict.fromkeys(name for each in names for name in each)
    return [{label: name for label, suite in columns.items() if name in suite.results} for name in every]


def difference(number: str, a: object, b: object, is_same_text: bool) -> tuple[float, float] | None:
    """What a number is of `b` less what it is of `a`; nan for the error where they are not of the same rows."""
    first, second = (evaluation_file.number(one, number) for one in (a, b))
    if first is None or second is None:
        return None
    if number in metrics.paired() and is_same_text and _same_counts(a.by_row, b.by_row):
        return metrics.difference(number, a.by_row, b.by_row)
    return second - first, float("nan")


def _same_text(a: Suite, b: Suite) -> bool:
    """Whether both took their rows from one split of one text; then they begin with the same ones."""
    return all(
        name in a.about and a.about[name] == b.about.get(name)
        for name in ("rows_of", "split", "turns", "context_length")
    )


def _same_counts(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return all(
        name in a and name in b and np.array_equal(a[name], b[name]) for name in ("activations", "tokens")
    )


def write(out: pathlib.Path, columns: Mapping[str, Suite], command: str, is_compared: bool = False) -> None:
    """Writes side_by_side.html and .csv, and prints the table.

    Args:
      out: the folder.
      columns: by label.
      command: that makes it again.
      is_compared: with the difference of each to the first.
    """
    first = next(iter(columns))
    tables: dict[str, list[tuple[str, dict[str, str]]]] = {}
    cells = []
    for number in metrics.shown_in("comparison"):
        form = metrics.METRICS[number].form
        table = []
        for row in rows_of(columns):
            shown = {}
            for column, name in row.items():
                result = columns[column].results[name]
                shown[column] = page.shown(result, number)
                cell = {
                    "number": number,
                    "sae": name,
                    "column": column,
                    "value": evaluation_file.number(result, number),
                }
                cell["se"] = evaluation_file.number(result, f"{number}_se")
                if is_compared and column != first and first in row:
                    base = columns[first].results[row[first]]
                    is_same = _same_text(columns[first], columns[column])
                    found = difference(number, base, result, is_same)
                    cell |= dict(zip(("difference", "difference_se"), found or (None, None), strict=True))
                    shown[f"{column} − {first}"] = page.with_error(*(found or (None, None)), f"+{form}")
                cells.append(cell)
            table.append((next(iter(row.values())), shown))
        if any(value != "–" for _, row in table for value in row.values()):
            tables[number] = table
    texts = {str(suite.about.get("text")) for suite in columns.values()}
    remark = FVU_OF_TEXTS if len(texts) > 1 else ""
    headings = list(columns)
    if is_compared:
        headings += [f"{column} − {first}" for column in headings[1:]]
    html.render(
        out / "side_by_side.html",
        "evaluation/side_by_side.html.jinja",
        tables=tables,
        headings=headings,
        numbers=metrics.METRICS,
        about={label: suite.about for label, suite in columns.items()},
        remark=remark,
        picture=html.data_url(plots.side_by_side({c: suite.results for c, suite in columns.items()})),
        command=command,
    )
    names = ("number", "sae", "column", "value", "se", "difference", "difference_se")
    with (
        files.replacing_file(out / "side_by_side.csv") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(cells)
    _print(tables, headings)
    if remark:
        say(remark)
    say(f"Wrote {out / 'side_by_side.html'}, {out / 'side_by_side.csv'}")


def _print(found: Mapping[str, list[tuple[str, dict[str, str]]]], headings: list[str]) -> None:
    names = tables.width(name for rows in found.values() for name, _ in rows)
    # Wider than a narrow terminal, where a row then takes two lines, rather than a digit on each.
    width = names + sum(max(tables.width([heading]), 20) + 3 for heading in headings) + 5
    for number, rows in found.items():
        table = tables.Table(title=metrics.METRICS[number].label)
        table.add_column("", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", overflow="fold")
        for name, row in rows:
            table.add_row(name, *(row.get(heading, "") for heading in headings))
        tables.show(table, least_width=width)
