"""The results of evaluating SAEs: metrics, verdicts, and the model and rows that they were measured on."""

import contextlib
import dataclasses
import pathlib
import typing
from collections.abc import Mapping

import jax
import matplotlib.figure

from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.evaluation import (
    baselines,
    evaluate,
    metrics,
    opening,
    output,
    page,
    plots,
    side_by_side,
)
from gemma_scope_jax.models import registry, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import extras, ranges, reporting, resumable
from gemma_scope_jax.runtime.printing import printable, shareable
from gemma_scope_jax.saes import attached, evaluation_file, naming
from gemma_scope_jax.saes import verdicts as verdicts_lib
from gemma_scope_jax.saes.evaluation_file import Evaluation

if typing.TYPE_CHECKING:
    import pandas

# The number of activations of training rows that baselines are fitted to.
BASELINE_ACTIVATIONS = 8192


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an evaluation."""

    rows: int = 512  # rows to evaluate on; all rows of the split if it has fewer
    rows_per_batch: int = 8  # rows in one pass of the model
    split: str = token_rows.HELD_OUT  # the split of the rows: `token_rows.HELD_OUT` or `token_rows.TRAIN`
    turns: str | None = None  # the chat turns that count: all, user or model; None: as in the config
    is_fast: bool = False  # leaves out KL and r_L0, the slowest metrics; see `evaluate.evaluate`
    has_baselines: bool = False  # also evaluates the `baselines` of each SAE


@dataclasses.dataclass(frozen=True, eq=False)
class Results(side_by_side.Suite):
    """The evaluations of SAEs on one text."""

    results: Mapping[str, Evaluation]
    verdicts: Mapping[str, verdicts_lib.Verdict] = dataclasses.field(
        default_factory=dict
    )  # by SAE, without baselines
    remarks: tuple[str, ...] = ()  # remarks on the whole evaluation, a sentence each
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by SAE
    # The lines of the Pareto plot, by label: for each SAE on the line the label of its point.
    sweeps: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    rows_of: str = ""  # the rows in words, such as held-out
    command: str = ""  # the command that makes the results again

    def __repr__(self) -> str:
        return f"Results of {len(self.results)} SAEs on {self.about['text']}: {', '.join(self.results)}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """A table with a row of metrics for each SAE, and standard errors in separate columns."""
        with extras.needed():
            import pandas

        rows = {name: evaluation_file.numbers(result) for name, result in self.results.items()}
        return pandas.DataFrame.from_dict(rows, orient="index")

    def show(self) -> None:
        """Prints the metrics of every SAE, and the verdicts."""
        print_table(dict(self.results), f"{self.about['text']}, {self.rows_of}")
        for line in [*verdicts_lib.lines(self.verdicts), *self.remarks]:
            print(printable(line, 2000), flush=True)

    def figure(self) -> matplotlib.figure.Figure:
        """A histogram of firing frequencies for each SAE."""
        return plots.frequencies(self.results)

    def save(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes evaluation.json, .csv, .npz, .html and .png to a folder, and pareto.png for a sweep.

        Returns:
          The paths of the files.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page.write_json(folder / "evaluation.json", self.results, self.about, self.verdicts)
        page.write_arrays(folder / "evaluation.npz", self.results)
        page.write_csv(folder / "evaluation.csv", self.results)
        plotting.write_png(folder / "evaluation.png", self.figure(), 120)
        written = [folder / f"evaluation.{kind}" for kind in ("json", "npz", "csv", "png")]
        pictures = {}
        if self.sweeps:
            written.append(folder / "pareto.png")
            plotting.write_png(written[-1], plots.pareto(self.results, self.sweeps), 120)
            pictures["Delta loss and FVU against L0"] = written[-1]
        written.append(folder / "evaluation.html")
        page.write_html(
            written[-1],
            self.results,
            self.about,
            self.command,
            self.layers,
            pictures,
            self.verdicts,
            self.remarks,
        )
        return written


def evaluate_opened(
    opened: opening.Opened, gemma: Gemma, options: Options, parts: resumable.Parts | None = None
) -> Results:
    """Evaluates SAEs on the rows that they were opened with.

    Args:
      opened: the SAEs, with any baselines; see `with_baselines`.
      gemma: the whole model.
      options: the options of the evaluation.
      parts: stores the measurements of each batch, to resume from; None: they are not stored.

    Raises:
      ValueError: if an option is out of range, or no prediction counts.
      FloatingPointError: if an activation, a reconstruction or a loss is not finite.
    """
    for name in ("rows", "rows_per_batch"):
        ranges.check(name, getattr(options, name), ranges.COUNT)
    config = opened.config
    held_out = token_rows.open_rows(opened.rows, options.split)
    training = held_out
    if config.data.held_out_fraction < 1:
        training = token_rows.open_rows(opened.rows, token_rows.TRAIN)
    results, cost = evaluate.evaluate(
        gemma,
        opened.subjects,
        training,
        held_out,
        options.rows,
        options.rows_per_batch,
        batching.counts_of(config, options.turns),
        options.is_fast,
        parts,
    )
    judged = [name for name in opened.subjects if name not in opened.baselines]
    judgements = {
        name: verdicts_lib.verdict(
            evaluation_file.numbers(results[name]),
            opened.subjects[name].sae.b_enc.size,
            opened.members[name].target_l0 if name in opened.members else 0,
        )
        for name in judged
    }
    remarks = _remarks(opened, results) if opened.is_other_text else []
    remarks += [f"{sentence}." for sentence in metrics.undefined(results)]
    rows_of = {token_rows.HELD_OUT: "held-out", token_rows.TRAIN: "training"}[options.split]
    if opened.is_other_text:
        rows_of = "not the training text"
    elif not opened.is_text_known:
        rows_of = f"{options.split}; training text not known"
    # Baselines are not part of a sweep.
    is_of_files = not opened.members and not opened.baselines
    return Results(
        about(opened, options) | {"cost": dataclasses.asdict(cost) if cost else None},
        results,
        judgements,
        tuple(remarks),
        {name: subject.spliced.layer for name, subject in opened.subjects.items()},
        sweeps(opened.members) or (_lines(opened.subjects, results) if is_of_files else {}),
        rows_of,
    )


def with_baselines(opened: opening.Opened, gemma: Gemma, per_batch: int) -> opening.Opened:
    """The same SAEs, each followed by its baselines."""
    split = token_rows.TRAIN if opened.config.data.held_out_fraction < 1 else token_rows.HELD_OUT
    sites = {s for subject in opened.subjects.values() for s in (subject.site, subject.spliced)}
    count = -(-BASELINE_ACTIVATIONS // opened.config.data.context_length)
    rows = token_rows.open_rows(opened.rows, split)
    reporting.say(f"Fitting the baselines to activations of {min(count, len(rows))} rows …")
    found = evaluate.activations(
        gemma, tuple(sorted(sites, key=str)), rows, count, per_batch, batching.counts_of(opened.config)
    )
    subjects, added = {}, []
    for name, subject in opened.subjects.items():
        subjects[name] = subject
        made = baselines.of(subject, found[subject.site], found[subject.spliced])
        subjects |= {f"{name}_{kind}": baseline for kind, baseline in made.items()}
        added += [f"{name}_{kind}" for kind in made]
    return dataclasses.replace(opened, subjects=subjects, baselines=tuple(added))


def about(opened: opening.Opened, options: Options) -> dict[str, object]:
    """The model, text, rows and step of an evaluation, as its files name them."""
    config, trained_on = opened.config, opened.text_trained_on
    return {
        "model": config.model,
        "weights": shareable(config.weights),
        "tokenizer": shareable(config.tokenizer),
        "dtype": config.gemma_dtype,
        "text": shareable(config.data.text),
        "text_trained_on": None if trained_on is None else shareable(trained_on),
        "is_other_text": opened.is_other_text,
        "rows_of": token_rows.name_of(opened.rows),
        "split": options.split,
        "turns": options.turns,
        "context_length": config.data.context_length,
        "step": opened.step,
    }


def identity(opened: opening.Opened, mesh: jax.sharding.Mesh, options: Options) -> dict[str, object]:
    """A value that changes whenever the measurements of a batch would, so that old ones are not resumed."""
    config = opened.config
    return about(opened, options) | {
        "weights": weights.fingerprint(registry.weights_path(config.model, config.weights)),
        "rows": options.rows,
        "rows_in_a_batch": batching.padded_rows(mesh, options.rows, options.rows_per_batch),
        "is_fast": options.is_fast,
        "measures": [evaluate.MEASURES, *metrics.definitions()],
        "saes": {name: attached.identity(subject) for name, subject in opened.subjects.items()},
    }


def _remarks(opened: opening.Opened, results: Mapping[str, Evaluation]) -> list[str]:
    """Remarks on an evaluation on a text other than the training text."""
    texts = [shareable(text) for text in (opened.config.data.text, opened.text_trained_on)]
    remarks = [f"Evaluated on {texts[0]}, trained on {texts[1]}. {side_by_side.FVU_OF_TEXTS}"]
    own: dict | None = None
    others: dict[str, object] = {}
    with contextlib.suppress(ValueError):  # A damaged own evaluation must not stop this one.
        own, others = evaluation_file.own_evaluation(
            output.own_folder(opened.location), opened.own, opened.step
        )
    for name, of in own["sae"].items() if own and not others else ():
        if name in results and (said := verdicts_lib.beside_own(evaluation_file.numbers(results[name]), of)):
            remarks.append(f"{name}: {said}.")
    return remarks


def sweeps(members: Mapping[str, naming.Member]) -> dict[str, dict[str, str]]:
    """The sweeps among members, which differ only in λ or target L0: by label, the settings by member, in order."""
    found: dict[str, dict[str, str]] = {}
    by_setting = sorted(members.items(), key=lambda item: (item[1].target_l0, item[1].sparsity_coefficient))
    for name, member in by_setting:
        seed = f", seed {member.seed}" if member.seed else ""
        skip = ", skip" if member.skip else ""
        aim = "" if member.objective == "linear" else f", {member.objective}"
        label = f"{member.place}{skip}, {naming.width_name(member.width)}{aim}{seed}"
        setting = f"L0* {member.target_l0:g}" if member.target_l0 else f"λ {member.sparsity_coefficient:g}"
        found.setdefault(label, {})[name] = setting
    return {label: points for label, points in found.items() if len(points) > 1}


def _lines(
    subjects: Mapping[str, attached.Subject], results: Mapping[str, Evaluation]
) -> dict[str, dict[str, str]]:
    """The lines of SAEs in files, whose λ is not known: SAEs of one site and width, in the order of their L0."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(subjects, key=lambda name: results[name].l0):
        subject = subjects[name]
        place = (
            str(subject.site) if subject.site == subject.spliced else f"{subject.site} to {subject.spliced}"
        )
        label = f"{place}, {naming.width_name(subject.sae.b_enc.size)}"
        found.setdefault(label, {})[name] = f"{results[name].l0:.0f}"
    return {label: points for label, points in found.items() if len(points) > 1}


def print_table(results: dict[str, Evaluation], of: str) -> None:
    """Prints the metrics: a column for each SAE, or for more than three a row each with the main metrics."""
    first = next(iter(results.values()))
    counts = f"{first.rows:,} rows, {first.activations:,} activations, {first.tokens:,} predictions"
    table = tables.Table("", title=f"{printable(of)}: {counts}")
    # The metrics that have a `reading` come first.
    ordered = sorted(metrics.METRICS, key=lambda number: not metrics.METRICS[number].reading)
    if len(results) > 3:
        chosen = [number for number in ordered if number in metrics.shown_in("terminal")]
        for number in chosen:
            table.add_column(metrics.METRICS[number].label, justify="right")
        for name, result in results.items():
            table.add_row(name, *(_short(result, number) for number in chosen))
    else:
        for name in results:
            table.add_column(name, justify="right")
        for number in ordered:
            shown = (page.shown(result, number) for result in results.values())
            table.add_row(metrics.METRICS[number].label, *shown)
    tables.show(table)


def _short(result: Evaluation, number: str) -> str:
    """A metric as text for a narrow column: of the standard errors, only that of delta loss."""
    if number == "delta_loss":
        return page.shown(result, number)
    return page.with_error(evaluation_file.number(result, number), None, metrics.METRICS[number].form)
