"""Evaluations side by side: of several suites of SAEs, or of one suite on several texts."""

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np

from gemma_scope_jax.display import html, plotting, tables
from gemma_scope_jax.evaluation import metrics, page, plots
from gemma_scope_jax.runtime import extras, files
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import evaluation_file
from gemma_scope_jax.saes.evaluation_file import Evaluation

if typing.TYPE_CHECKING:
    import pandas

FVU_OF_TEXTS = "FVU is relative to each text's own variance: between texts, compare delta loss, not FVU."


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """An evaluation of SAEs, as written by `report`."""

    about: Mapping[str, object]  # the model, text and rows; see `report.about`
    # By SAE: objects with the metrics of `evaluation_file.Evaluation`, and its `by_row`.
    results: Mapping[str, Evaluation | types.SimpleNamespace]


_MAX_ROWS = 2**24


def by_row() -> set[str]:
    """The names of the sums of each row that `metrics.difference` needs."""
    return {"activations", *(name for of in metrics.paired().values() for name in of if name)}


def read(folder: pathlib.Path) -> Suite:
    """Reads the evaluation in a folder.

    Raises:
      ValueError: if there is no evaluation, or it is damaged.
    """
    path, arrays = folder / "evaluation.json", folder / "evaluation.npz"
    if not path.exists():
        raise FormatError(f"{folder} has no evaluation.json; run gemma-scope evaluate on the SAEs to compare")
    about = evaluation_file.read_numbers(path)
    saes = about.pop("sae")
    for name, numbers in saes.items():
        if not isinstance(numbers["rows"], int) or not 0 < numbers["rows"] <= _MAX_ROWS:
            raise FormatError(
                f"{path} is not a valid evaluation: {printable(name)} has {numbers['rows']} rows"
            )
    shapes = {
        f"{name}/by_row/{quantity}": (numbers["rows"],)
        for name, numbers in saes.items()
        for quantity in by_row()
    }
    found = files.read_npz(arrays, shapes) if arrays.exists() else {}
    results = {}
    for name, numbers in saes.items():
        of = {quantity: found[key] for quantity in by_row() if (key := f"{name}/by_row/{quantity}") in found}
        # Plots need numbers here.
        drawn = {key: np.nan for key in ("l0", "fvu", "delta_loss") if numbers[key] is None}
        of = of if of.keys() == by_row() else {}
        results[name] = types.SimpleNamespace(**numbers | drawn, by_row=of)
    return Suite(about, results)


def labels(folders: list[pathlib.Path]) -> list[str]:
    """A label for each folder: as many last parts of its path as make the labels distinct."""
    for depth in range(1, 20):
        labels = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    raise FormatError("the same evaluation is given twice; give different folders")


def rows_of(columns: Mapping[str, Suite]) -> list[dict[str, str]]:
    """The SAEs to compare: for each row, the SAE's name in each column."""
    names = [list(suite.results) for suite in columns.values()]
    common = set(names[0]).intersection(*names[1:])
    if not common and len({len(each) for each in names}) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*names, strict=True)]
    every = dict.fromkeys(name for each in names for name in each)
    return [{label: name for label, suite in columns.items() if name in suite.results} for name in every]


def difference(number: str, a: object, b: object, is_same_text: bool) -> tuple[float, float] | None:
    """A metric of `b` minus that of `a`, and its standard error, NaN unless both were evaluated on the same rows.

    None if one of them lacks the metric.
    """
    first, second = (evaluation_file.number(one, number) for one in (a, b))
    if first is None or second is None:
        return None
    if number in metrics.paired() and is_same_text and _same_counts(a.by_row, b.by_row):
        return metrics.difference(number, a.by_row, b.by_row)
    return second - first, float("nan")


def _same_text(a: Suite, b: Suite) -> bool:
    """Whether both used the same split of the same text, so that they begin with the same rows."""
    return all(
        name in a.about and a.about[name] == b.about.get(name)
        for name in ("rows_of", "split", "turns", "context_length")
    )


def _same_counts(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return all(
        name in a and name in b and np.array_equal(a[name], b[name]) for name in ("activations", "tokens")
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Evaluations side by side."""

    columns: Mapping[str, Suite]  # by label
    # By metric: the rows of its table, each the first SAE's name and the text of each column.
    tables: Mapping[str, Sequence[tuple[str, Mapping[str, str]]]]
    headings: tuple[str, ...]
    cells: Sequence[
        Mapping[str, object]
    ]  # every value, with its standard error and its difference from the first column
    remark: str = ""

    def to_dataframe(self) -> "pandas.DataFrame":
        """A table with a row for each metric, SAE and column."""
        with extras.needed():
            import pandas

        return pandas.DataFrame(self.cells)

    def show(self) -> None:
        """Prints a table for each metric."""
        for number, rows in self.tables.items():
            table = tables.Table("", title=metrics.METRICS[number].label)
            for heading in self.headings:
                table.add_column(heading, justify="right")
            for name, row in rows:
                table.add_row(name, *(row.get(heading, "") for heading in self.headings))
            tables.show(table)
        if self.remark:
            print(printable(self.remark), flush=True)

    def figure(self) -> matplotlib.figure.Figure:
        """Delta loss, FVU and r_L0 against L0, with a colour for each column."""
        return plots.side_by_side({label: suite.results for label, suite in self.columns.items()})

    def save(self, out: pathlib.Path, command: str = "") -> list[pathlib.Path]:
        """Writes side_by_side.html and .csv to a folder and returns their paths.

        Args:
          out: the folder.
          command: the command that makes them again, shown on the page.
        """
        written = [out / "side_by_side.html", out / "side_by_side.csv"]
        html.render(
            written[0],
            "evaluation/side_by_side.html.jinja",
            tables=self.tables,
            numbers=metrics.METRICS,
            headings=self.headings,
            about={label: suite.about for label, suite in self.columns.items()},
            remark=self.remark,
            picture=html.data_url(plotting.png(self.figure(), 120)),
            command=command,
        )
        files.write_csv(written[1], self.cells)
        return written


def comparison(columns: Mapping[str, Suite], is_compared: bool = False) -> Comparison:
    """Puts evaluations side by side.

    SAEs are matched by name. If no name is in all evaluations and each has the same number of SAEs, they are matched
    by order. A difference has a standard error if both SAEs were evaluated on the same rows.

    Args:
      columns: the evaluations by label.
      is_compared: also computes the difference of each column from the first.
    """
    first = next(iter(columns))
    shown_of: dict[str, list[tuple[str, dict[str, str]]]] = {}
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
            shown_of[number] = table
    texts = {str(suite.about.get("text")) for suite in columns.values()}
    remark = FVU_OF_TEXTS if len(texts) > 1 else ""
    headings = list(columns)
    if is_compared:
        headings += [f"{column} − {first}" for column in headings[1:]]
    return Comparison(columns, shown_of, tuple(headings), cells, remark)
