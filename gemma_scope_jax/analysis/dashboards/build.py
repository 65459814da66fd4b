"""Builds dashboards for a path: opens the SAEs, runs them on held-out text and writes the pages."""

import pathlib
from collections.abc import Sequence

from gemma_scope_jax.analysis import decoder_directions
from gemma_scope_jax.analysis.dashboards import collect, neuronpedia, website
from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import placement, registry, tokenizer, weights
from gemma_scope_jax.runtime import distributed, files, printing, ranges, resumable
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import attached, geometry

_MARK = "dashboards.json"  # Marks a folder as a folder of dashboards.


def build(
    path: str | pathlib.Path,
    rows: int = 512,
    saes: Sequence[str] = (),
    out: pathlib.Path | None = None,
    options: collect.Options = collect.DEFAULTS,
    rows_per_batch: int | None = None,
    is_for_neuronpedia: bool = False,
    **overrides: str | None,
) -> dict[str, website.Dashboards]:
    """Writes dashboards of the SAEs at a path.

    After an interruption, the same call resumes from the last saved state; see `collect.SAVE_EVERY`.

    Args:
      path: a run or SAE files; see `opening.open_path`.
      rows: how many rows of held-out text to read; at most all of them.
      saes: the names of the SAEs; if empty, all SAEs.
      out: the folder to write to, which must be new or hold dashboards; None: `dashboards` in the folder of
        `opening.results_folder`.
      options: how much to keep of each latent.
      rows_per_batch: rows in one forward pass; None: the value in the config.
      is_for_neuronpedia: whether to write Neuronpedia's batch files too.
      **overrides: options of the model and the text; see `opening.open_path`.

    Returns:
      The contents of the dashboards, by SAE.

    Raises:
      ValueError: if there is no such SAE, or the folder holds other files.
    """
    opened = opening.open_path(path, **overrides)
    config, subjects = opened.config, opened.subjects
    if unknown := set(saes) - subjects.keys():
        raise InputError(f"there is no SAE {', '.join(sorted(unknown))}; choose from {', '.join(subjects)}")
    subjects = {name: subject for name, subject in subjects.items() if not saes or name in saes}
    rows_per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    for name, value in (("rows", rows), ("rows_per_batch", rows_per_batch)):
        ranges.check(f"--{name.replace('_', '-')}", value, ranges.COUNT)
    out = out or opening.results_folder(opened, path, None) / "dashboards"
    if not (out / _MARK).exists():
        files.check_new(out)
    held_out = token_rows.open_rows(opened.rows, token_rows.HELD_OUT)
    text = printing.shareable(config.data.text)
    about = {
        "model": config.model,
        "dtype": config.gemma_dtype,
        "weights": printing.shareable(
            weights.fingerprint(registry.weights_path(config.model, config.weights))
        ),
        "text": text,
        "rows_of": token_rows.name_of(opened.rows),
        "rows": min(rows, len(held_out)),
        "context_length": config.data.context_length,
        "options": vars(options),
        "saes": {name: attached.identity(subject) for name, subject in subjects.items()},
    }
    if distributed.is_first():
        files.write_json(out / _MARK, about)
    with resumable.holding_parts(out / "partial"):
        gemma = placement.load_gemma(config)
        parts = resumable.Parts(out / "partial", about)
        counts = batching.counts_of(config)
        gathered = collect.gather(gemma, subjects, held_out, rows, rows_per_batch, counts, options, parts)
        passages = collect.Passages(collect.read_tokens(held_out, rows))
        words = tokenizer.load(config.model, config.tokenizer, config.weights)
        text_of = tokenizer.token_texts(words.decode)
        # No SAE's folder can take the name of another file in `out`.
        names = files.folder_names([_MARK, "partial", "index.html", *subjects])
        folders = {name: names[name] for name in subjects} if len(subjects) > 1 else {}
        all_shown = {}
        for name, subject in subjects.items():
            say(f"{name}: comparing the decoder directions of its latents …")
            in_stream = decoder_directions.in_stream(gemma.params, subject.spliced, subject.sae.W_dec)
            logits = None if in_stream is None else decoder_directions.logits(gemma, in_stream)
            nearest = geometry.nearest(subject.sae.W_dec)
            shown = website.Dashboards(
                name, config.model, subject, text, gathered[name], logits, *nearest, passages
            )
            all_shown[name] = shown
            if distributed.is_first():
                with files.filling_folder(out / folders.get(name, "")) as folder:
                    website.write(folder, shown, text_of)
                    if is_for_neuronpedia:
                        say(f"{name}: writing Neuronpedia's files …")
                        neuronpedia.write(folder / "neuronpedia", shown, config.data.context_length, text_of)
        if distributed.is_first() and folders:
            website.write_links(out / "index.html", folders, all_shown)
        _tell(out, all_shown)
        parts.remove()
        return all_shown


def _tell(out: pathlib.Path, all_shown: dict[str, website.Dashboards]) -> None:
    for name, shown in all_shown.items():
        g = shown.gathered
        say(
            f"{printable(name)}: {shown.width:,} latents on {g.activations:,} activations; "
            f"{g.is_dead_M.sum():,} never fired, "
            f"{g.is_dense_M.sum():,} fired on more than a tenth of them."
        )
    say(f"Wrote {out / 'index.html'}")
