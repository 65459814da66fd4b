"""`evaluate`: measures the SAEs at a path on one or several texts, and writes files, tables and pages."""

import contextlib
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence

from gemma_scope_jax.cli.common import refresh, say
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.evaluation import opening, output, report, side_by_side
from gemma_scope_jax.models import placement
from gemma_scope_jax.runtime import distributed, files, ranges, resumable
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable, shareable
from gemma_scope_jax.saes.evaluation_file import Evaluation

_PARTS = "evaluation.parts"


def texts_of(given: Sequence[str]) -> dict[str, str]:
    """Text sources by label, parsed from `SOURCE` or `LABEL=SOURCE`.

    Raises:
      ValueError: if two texts have the same label, or a label cannot be the name of a folder.
    """
    texts: dict[str, str] = {}
    for value in given:
        match = re.fullmatch(r"([\w.-]+)=(.+)", value)
        if match and not pathlib.Path(value).exists():  # The name of a file can contain =.
            label, source = match.groups()
        else:
            label, source = opening.text_label(value), value
        if label.startswith("."):
            raise InputError(
                f"a text cannot have the name {label!r}; choose another with --text=NAME={source}"
            )
        if label.lower() in map(str.lower, texts):  # Some file systems ignore case.
            raise InputError(f"two texts have the name {label!r}; choose another with --text=NAME={source}")
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
    """Evaluates the SAEs at a path; writes evaluation.json, .csv, .npz, .html and .png, and prints a table.

    If it is interrupted and called again, it continues after the last complete batch.

    Args:
      path: of a run or of SAEs; see `opening.open_path`.
      rows: the number of rows to evaluate on, at most all of the split; None: the config's.
      rows_per_batch: rows in one forward pass; None: the config's.
      out: the folder to write to; None: the run directory or the SAE's folder, or for another text or model a
        subfolder of it, see `opening.results_folder`.
      is_fast: whether to leave out the slowest metrics; see `evaluate.evaluate`.
      split: of the rows, `token_rows.TRAIN` or `token_rows.HELD_OUT`.
      text: the texts to evaluate on; None: the run's. Each of several texts gets a subfolder of `out`, and a table
        compares them.
      has_baselines: whether to evaluate the `baselines` of each SAE too.
      **overrides: settings that override the run's; see `opening.open_path`.

    Returns:
      The numbers by SAE; for several texts, those of the last text.
    """
    texts = texts_of([text] if isinstance(text, str) else text or ())
    refresh(path)
    opened = opening.open_path(path, text=next(iter(texts.values()), None), **overrides)
    config = opened.config
    # All texts are opened first, so that mistakes show before anything takes long.
    by_label = {
        label: opening.on_text(opened, source) for label, source in (texts or {"": config.data.text}).items()
    }
    for one in by_label.values():
        token_rows.open_rows(one.rows, split)
    rows = config.evaluation.rows if rows is None else rows
    rows_per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    for name, value in (("rows", rows), ("rows_per_batch", rows_per_batch)):
        ranges.check(f"--{name.replace('_', '-')}", value, ranges.COUNT)
    given_out, kind = out, "baselines" if has_baselines else ""
    out, places = _places(path, out, by_label, split, kind, overrides)
    options = report.Options(rows, rows_per_batch, split, overrides.get("turns"), is_fast, has_baselines)
    flags = {
        "rows": rows, "rows_per_batch": rows_per_batch, "split": split, **overrides,
        "fast": is_fast or None, "baselines": has_baselines or None, "out": given_out,
    }  # fmt: skip
    with contextlib.ExitStack() as held:
        for place in places.values():
            held.enter_context(resumable.holding_parts(place / _PARTS))
        gemma = placement.load_gemma(config)
        if has_baselines:
            extended = report.with_baselines(opened, gemma, rows_per_batch)
            subjects, added = extended.subjects, extended.baselines
            by_label = {
                label: dataclasses.replace(one, subjects=subjects, baselines=added)
                for label, one in by_label.items()
            }
        found, parts = {}, []
        for label, one in by_label.items():
            place = places[label]
            parts.append(resumable.Parts(place / _PARTS, report.identity(one, gemma.mesh, options)))
            of_text = flags | {"text": f"{label}={texts[label]}" if label else None}
            of_text["out"] = given_out if place == out else place
            results = report.evaluate_opened(one, gemma, options, parts[-1])
            found[label] = dataclasses.replace(results, command=_command(path, of_text))
            if distributed.is_first():
                _save(found[label], place)
        if len(found) > 1 and distributed.is_first():
            made = side_by_side.comparison(found)
            written = made.save(out, _command(path, flags | {"text": list(map("=".join, texts.items()))}))
            made.show()
            say(f"Wrote {', '.join(map(str, written))}")
        # Only now that all texts are done: otherwise a repeated command would begin with the first text again.
        for of_one in parts:
            of_one.remove()
        return dict(found[label].results)


def _save(results: report.Results, place: pathlib.Path) -> None:
    """Writes and prints the results."""
    say("Writing the results …")
    written = results.save(place)
    results.show()
    if cost := results.about["cost"]:
        say(
            f"A batch took {cost['seconds']:.1f} s. At the speed of its clean pass, that pass with two ablations per "
            f"site and one splice per SAE would take {cost['bound_seconds']:.1f} s."
        )
    say(f"Wrote {', '.join(map(str, written))}")


def _places(
    path: str | pathlib.Path,
    given_out: pathlib.Path | None,
    by_label: Mapping[str, opening.Opened],
    split: str,
    kind: str,
    overrides: Mapping[str, str | None],
) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """The folder of the results, and the folder of each text: a subfolder for each of several texts, else the same.

    Raises:
      ValueError: if the folder of a text contains something else.
    """
    first = next(iter(by_label.values()))
    of = opening.options_of(first, split, overrides.get("turns"), kind)
    if len(by_label) > 1:  # Also the run's own text gets a subfolder.
        out = output.made_folder(path, given_out, pathlib.Path(of))
        places = {label: out / label for label in by_label}
    else:
        (label,) = by_label
        out = opening.results_folder(first, path, given_out, label, of)
        places = {label: out}
    for label, place in places.items():
        is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        if given_out is not None and place != out and not is_free and not list(place.glob("evaluation.*")):
            raise InputError(f"{place} contains files, but no evaluation; give the text another name")
        if given_out is None and place != output.own_folder(path):
            options = report.Options(split=split, turns=overrides.get("turns"))
            _check_same(place, report.about(by_label[label], options))
    return out, places


def _check_same(place: pathlib.Path, about: Mapping[str, object]) -> None:
    """Raises ValueError if the folder contains an evaluation with other settings."""
    path = place / "evaluation.json"
    found = {}
    with contextlib.suppress(ValueError):  # A damaged file is overwritten.
        found = files.read_json(path) if path.exists() else {}
    names = ("model", "weights", "tokenizer", "dtype", "text", "split", "turns")
    # Files of older versions contain full paths.
    differs = [name for name in names if name in found and shareable(found[name]) != shareable(about[name])]
    if differs:
        said = ", ".join(f"{name} {printable(found[name])}" for name in differs)
        raise InputError(
            f"{path} is an evaluation with {said}; to keep it, give --text=NAME=SOURCE with a new name, or "
            "another --out"
        )


def _command(path: str | pathlib.Path, options: Mapping[str, object]) -> str:
    """The command line that repeats this evaluation."""
    flags = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                flag = f"--{name.replace('_', '-')}"
                flags.append(flag if one is True else f"{flag}={shareable(one)}")
    return shlex.join(["gemma-scope", "evaluate", shareable(path), *flags])
