"""From a path to a report: opens a run or an exported SAE, evaluates it, and shows and stores the numbers."""

import contextlib
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence

import jax

from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.display import tables
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
from gemma_scope_jax.models import placement, registry, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import distributed, files, ranges, resumable
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable, shareable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import attached, evaluation_file, naming, verdicts
from gemma_scope_jax.saes.evaluation_file import Evaluation
from gemma_scope_jax.training import runs

# Of the training rows so many activations are what baselines are fitted to.
BASELINE_ACTIVATIONS = 8192
_PARTS = "evaluation.parts"


def texts_of(given: Sequence[str]) -> dict[str, str]:
    """Texts by their labels, of `SOURCE` or `LABEL=SOURCE` each.

    Raises:
      ValueError: two have one label, or one is none that a folder may have.
    """
    texts: dict[str, str] = {}
    for value in given:
        match = re.fullmatch(r"([\w.-]+)=(.+)", value)
        if match and not pathlib.Path(value).exists():  # A file's name may have a = in it.
            label, source = match.groups()
        else:
            label, source = opening.text_label(value), value
        if label.startswith("."):
            raise InputError(f"a text cannot be called {label!r}; name it, as in --text=NAME={source}")
        if label.lower() in map(str.lower, texts):  # A disk may not keep them apart.
            raise InputError(f"two texts are called {label!r}; name them, as in --text=NAME={source}")
        texts[label] = source
    return texts


def evaluate_path(
    path: str | pathlib.Path,
    rows: int | None = None,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    is_fast: bool = False,
    split: str = token_rows.HELD_OUT,
    text: Sequence[str] | str | None = None,
    has_baselines: bool = False,
    **overrides: str | None,
) -> dict[str, Evaluation]:
    """Evaluates what lies at a path; writes evaluation.json, .csv, .npz, .html and .png, and prints a table.

    Cut off and called again, it goes on behind the last batch that was whole.

    Args:
      path: see `opening.open_path`.
      rows: how many, at most all of the split; None: as the config says.
      rows_per_batch: in one pass; likewise.
      out: the folder to write to; None: beside the SAE or in the run; of what is not its own, below it, see
        `opening.results_folder`.
      is_fast: without what costs most; see `evaluate.evaluate`.
      split: of the rows, one of `token_rows.TRAIN` and `token_rows.HELD_OUT`.
      text: to evaluate on; of several, each has a folder of its own in `out`, and there is a table by text.
      has_baselines: with the `baselines` of each SAE.
      **overrides: see `opening.open_path`.

    Returns:
      The numbers by SAE; of several texts those of the last.
    """
    texts = texts_of([text] if isinstance(text, str) else text or ())
    opened = opening.open_path(path, text=next(iter(texts.values()), None), **overrides)
    config = opened.config
    # All of them before anything takes long.
    by_label = {
        label: opening.on_text(opened, source) for label, source in (texts or {"": config.data.text}).items()
    }
    for one in by_label.values():
        token_rows.open_rows(one.rows, split)
    rows = config.evaluation.rows if rows is None else rows
    rows_per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    for name, value in (("rows", rows), ("rows_per_batch", rows_per_batch)):
        ranges.check(f"--{name}", value, ranges.COUNT)
    given_out, own_folder = out, output.own_folder(path)
    kind = "baselines" if has_baselines else ""
    out, places = _places(path, out, by_label, split, kind, overrides)
    with contextlib.ExitStack() as held:
        for place in places.values():
            held.enter_context(resumable.holding_parts(place / _PARTS))
        gemma = placement.load_gemma(config)
        judged = tuple(opened.subjects)
        if has_baselines:
            subjects = _with_baselines(opened, gemma, rows_per_batch)
            by_label = {label: dataclasses.replace(one, subjects=subjects) for label, one in by_label.items()}
        options = {
            "rows": rows, "rows_per_batch": rows_per_batch, "split": split, **overrides,
            "fast": is_fast or None, "baselines": has_baselines or None, "out": given_out,
        }  # fmt: skip
        found, parts = {}, []
        for label, one in by_label.items():
            place = places[label]
            of_text = options | {"text": f"{label}={texts[label]}" if label else None}
            of_text["out"] = given_out if place == out else place
            parts.append(resumable.Parts(place / _PARTS, _identity_of_all(one, gemma.mesh, options)))
            found[label] = _evaluate(
                one, gemma, options, place, _command(path, of_text), parts[-1], judged, own_folder
            )
        if len(found) > 1 and distributed.is_first():
            side_by_side.write(
                out, found, _command(path, options | {"text": list(map("=".join, texts.items()))})
            )
        # Not before all texts are done, or the same command would begin with the first again.
        for of_one in parts:
            of_one.remove()
        return dict(found[label].results)


def _places(
    path: str | pathlib.Path,
    given_out: pathlib.Path | None,
    by_label: Mapping[str, opening.Opened],
    split: str,
    kind: str,
    overrides: Mapping[str, str | None],
) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """The folder of the results, and that of each text: a folder in it for each of several, else itself.

    Raises:
      ValueError: a text's folder holds results of something else.
    """
    first = next(iter(by_label.values()))
    of = opening.options_of(first, split, overrides.get("turns"), kind)
    if len(by_label) > 1:  # A folder for each, of the text that was trained on too.
        out = output.results_folder(path, given_out, pathlib.Path(of))
        places = {label: out / label for label in by_label}
    else:
        (label,) = by_label
        out = opening.results_folder(first, path, given_out, label, of)
        places = {label: out}
    for label, place in places.items():
        is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        if given_out is not None and place != out and not is_free and not list(place.glob("evaluation.*")):
            raise InputError(f"{place} holds something that is no evaluation; give the text another name")
        if given_out is None and place != output.own_folder(path):
            _check_same(place, _about(by_label[label], {"split": split, **overrides}))
    return out, places


def _check_same(place: pathlib.Path, about: Mapping[str, object]) -> None:
    """Raises ValueError if the evaluation in a folder, if there is one, is of something else."""
    path = place / "evaluation.json"
    found = {}
    with contextlib.suppress(ValueError):  # A damaged one is made again.
        found = files.read_json(path) if path.exists() else {}
    names = ("model", "weights", "tokenizer", "dtype", "text", "split", "turns")
    # Older ones have their paths in full.
    differs = [name for name in names if name in found and shareable(found[name]) != shareable(about[name])]
    if differs:
        said = ", ".join(f"{name} {printable(found[name])}" for name in differs)
        raise InputError(
            f"{path} is of {said}; to keep it, call this text otherwise, as in --text=NAME=SOURCE, or give an --out"
        )


def _command(path: str | pathlib.Path, options: Mapping[str, object]) -> str:
    """What makes it again, as it is typed."""
    flags = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                flags.append(f"--{name}" if one is True else f"--{name}={shareable(one)}")
    return shlex.join(["python", "evaluate.py", shareable(path), *flags])


def _with_baselines(opened: opening.Opened, gemma: Gemma, per_batch: int) -> dict[str, attached.Subject]:
    """Each SAE followed by its baselines."""
    split = token_rows.TRAIN if opened.config.data.held_out_fraction < 1 else token_rows.HELD_OUT
    sites = {s for subject in opened.subjects.values() for s in (subject.site, subject.spliced)}
    count = -(-BASELINE_ACTIVATIONS // opened.config.data.context_length)
    rows = token_rows.open_rows(opened.rows, split)
    found = evaluate.activations(
        gemma, tuple(sorted(sites, key=str)), rows, count, per_batch, batching.counts_of(opened.config)
    )
    subjects = {}
    for name, subject in opened.subjects.items():
        subjects[name] = subject
        made = baselines.of(subject, found[subject.site], found[subject.spliced])
        subjects |= {f"{name}_{kind}": baseline for kind, baseline in made.items()}
    return subjects


def _about(opened: opening.Opened, options: Mapping[str, object]) -> dict[str, object]:
    """What was evaluated, and on what."""
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
        "split": options["split"],
        "turns": options.get("turns"),
        "context_length": config.data.context_length,
        "step": opened.step,
    }


def _identity_of_all(
    opened: opening.Opened, mesh: jax.sharding.Mesh, options: Mapping[str, object]
) -> dict[str, object]:
    """What changes whenever what would be measured of a batch does."""
    config = opened.config
    return _about(opened, options) | {
        "weights": weights.fingerprint(registry.weights_path(config.model, config.weights)),
        "rows": options["rows"],
        "rows_in_a_batch": batching.padded_rows(mesh, options["rows"], options["rows_per_batch"]),
        "is_fast": bool(options["fast"]),
        "measures": [evaluate.MEASURES, *(name for name, _ in metrics.measures())],
        "saes": {name: attached.identity(subject) for name, subject in opened.subjects.items()},
    }


def _evaluate(
    opened: opening.Opened,
    gemma: Gemma,
    options: Mapping[str, object],
    out: pathlib.Path,
    command: str,
    parts: resumable.Parts,
    judged: Sequence[str],
    own_folder: pathlib.Path,
) -> side_by_side.Suite:
    """Evaluates on one text, and writes and prints what is found, with verdicts on those that are `judged`."""
    config, split = opened.config, options["split"]
    about = _about(opened, options)
    held_out = token_rows.open_rows(opened.rows, split)
    training = (
        token_rows.open_rows(opened.rows, token_rows.TRAIN) if config.data.held_out_fraction < 1 else held_out
    )
    results, cost = evaluate.evaluate(
        gemma,
        opened.subjects,
        training,
        held_out,
        options["rows"],
        options["rows_per_batch"],
        batching.counts_of(config, options.get("turns")),
        bool(options["fast"]),
        parts,
    )
    suite = side_by_side.Suite(about, results)
    if not distributed.is_first():
        return suite
    about["cost"] = dataclasses.asdict(cost) if cost else None
    judgements = {
        name: verdicts.verdict(
            evaluation_file.numbers(results[name]),
            opened.subjects[name].sae.b_enc.size,
            opened.members[name].target_l0 if name in opened.members else 0,
        )
        for name in judged
    }
    remarks = _remarks(opened, results, own_folder) if opened.is_other_text else []
    remarks += [f"{sentence}." for sentence in metrics.undefined(results)]
    page.write_json(out / "evaluation.json", results, about, judgements)
    page.write_arrays(out / "evaluation.npz", results)
    page.write_csv(out / "evaluation.csv", results)
    plots.write_plot(out / "evaluation.png", results)
    written = [f"evaluation.{kind}" for kind in ("json", "npz", "csv", "png")]
    # Baselines are of no sweep.
    is_of_files = not opened.members and not options["baselines"]
    lines = sweeps(opened.members) or (_lines(opened.subjects, results) if is_of_files else {})
    if lines:
        plots.write_pareto(out / "pareto.png", results, lines)
        written.append("pareto.png")
    page.write_html(
        out / "evaluation.html",
        results,
        about,
        command,
        {name: subject.spliced.layer for name, subject in opened.subjects.items()},
        {"Sweeps": out / "pareto.png"} if lines else None,
        judgements,
        remarks,
    )
    written.append("evaluation.html")
    rows_of = {token_rows.HELD_OUT: "held-out", token_rows.TRAIN: "training"}[split]
    if opened.is_other_text:
        rows_of = "all of it"
    elif not opened.is_text_known:
        rows_of = f"{split}; what was trained on is not known"
    print_table(results, f"{about['text']}, {rows_of}")
    for line in [*verdicts.lines(judgements), *remarks]:
        say(line)
    if cost:
        say(
            f"A batch took {cost.seconds:.1f} s. Its clean pass, two ablations a site and one splice an SAE, at the "
            f"speed of the clean pass, would take {cost.bound_seconds:.1f} s."
        )
    say(f"Wrote {', '.join(str(out / name) for name in written)}")
    return suite


def _remarks(
    opened: opening.Opened, results: Mapping[str, Evaluation], own_folder: pathlib.Path
) -> list[str]:
    """What to know of an evaluation on another text than the one trained on."""
    texts = [shareable(text) for text in (opened.config.data.text, opened.text_trained_on)]
    remarks = [f"Evaluated on {texts[0]}, trained on {texts[1]}. {side_by_side.FVU_OF_TEXTS}"]
    own, others = None, {}
    with contextlib.suppress(ValueError):  # A damaged one is no reason to lose this one.
        own, others = runs.own_evaluation(own_folder, opened.own, opened.step)
    for name, of in own["sae"].items() if own and not others else ():
        if name in results and (said := verdicts.beside_own(evaluation_file.numbers(results[name]), of)):
            remarks.append(f"{name}: {said}.")
    return remarks


def sweeps(members: Mapping[str, naming.Member]) -> dict[str, dict[str, str]]:
    """Members that differ only in λ or in their target L0, in that order: by label, names and differences."""
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
    """The same of files, which do not say their λ: those of one place and width, by their L0."""
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
    """The numbers of every SAE: a column each, or of more than three a row each with those that matter most."""
    first = next(iter(results.values()))
    counts = f"{first.rows:,} rows, {first.activations:,} activations, {first.tokens:,} predictions"
    table = tables.Table(title=f"{printable(of)}: {counts}")
    if is_long := len(results) > 3:
        table.add_column("", no_wrap=True)
        for number in metrics.shown_in("terminal"):
            table.add_column(metrics.METRICS[number].label, justify="right")
        for name, result in results.items():
            table.add_row(name, *(page.shown(result, number) for number in metrics.shown_in("terminal")))
    else:
        table.add_column("")
        for name in results:
            table.add_column(name, justify="right", overflow="fold")
        for number, metric in metrics.METRICS.items():
            table.add_row(metric.label, *(page.shown(result, number) for result in results.values()))
    # Wider than a narrow terminal, where a row then takes two lines, rather than without the names.
    tables.show(table, least_width=tables.width(results) + 115 if is_long else 0)
