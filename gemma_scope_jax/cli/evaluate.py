"""`evaluate`: SAEs at a path on some texts, with files, tables and pages of what is measured."""

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
    refresh(path)
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
        # Not before all texts are done, or the same command would begin with the first again.
        for of_one in parts:
            of_one.remove()
        return dict(found[label].results)


def _save(results: report.Results, place: pathlib.Path) -> None:
    """Writes and prints what was found."""
    written = results.save(place)
    results.show()
    if cost := results.about["cost"]:
        say(
            f"A batch took {cost['seconds']:.1f} s. Its clean pass, two ablations a site and one splice an SAE, at "
            f"the speed of the clean pass, would take {cost['bound_seconds']:.1f} s."
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
    """The folder of the results, and that of each text: a folder in it for each of several, else itself.

    Raises:
      ValueError: a text's folder holds results of something else.
    """
    first = next(iter(by_label.values()))
    of = opening.options_of(first, split, overrides.get("turns"), kind)
    if len(by_label) > 1:  # A folder for each, of the text that was trained on too.
        out = output.made_folder(path, given_out, pathlib.Path(of))
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
            options = report.Options(split=split, turns=overrides.get("turns"))
            _check_same(place, report.about(by_label[label], options))
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
                flag = f"--{name.replace('_', '-')}"
                flags.append(flag if one is True else f"{flag}={shareable(one)}")
    return shlex.join(["gemma-scope", "evaluate", shareable(path), *flags])
