"""`probe`: how well a few latents predict the classes of labelled texts."""

import pathlib

import numpy as np

from gemma_scope_jax.cli.common import refresh, say
from gemma_scope_jax.evaluation import opening, probing
from gemma_scope_jax.models import placement, tokenizer
from gemma_scope_jax.runtime import files, printing, ranges
from gemma_scope_jax.runtime.errors import DataError


def probe_path(
    path: str | pathlib.Path,
    labelled: pathlib.Path,
    seed: int = 0,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    **overrides: str | None,
) -> dict[str, list[probing.Task]]:
    """Probes the SAEs at a path; writes probing.json and prints a table.

    Args:
      path: of a run or of SAEs; see `opening.open_path`.
      labelled: the file of labelled texts; see `probing.read_labelled`.
      seed: of the split into training and test texts.
      rows_per_batch: texts in one forward pass; None: the config's.
      out: the folder to write to; None: see `opening.results_folder`.
      **overrides: settings that override the run's; see `opening.open_path`.

    Returns:
      The tasks of each SAE.
    """
    ranges.check("--seed", seed, ranges.SEED)
    given = probing.read_labelled(labelled)
    is_test_T = probing.split(given, seed)
    refresh(path)
    opened = opening.open_path(path, **overrides)
    config = opened.config
    per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    ranges.check("--rows-per-batch", per_batch, ranges.COUNT)
    given_out, out = out, opening.results_folder(opened, path, out)
    if given_out is None and (out / "probing.json").exists():
        before = printing.shareable(files.read_json(out / "probing.json").get("labelled"))
        if before != printing.shareable(labelled):
            raise DataError(
                f"{out / 'probing.json'} has the results of {printing.printable(before)}; give another --out"
            )
    encode = tokenizer.load(config.model, config.tokenizer, config.weights).encode
    tokens_TxL, cut = probing.rows_of(given.texts, encode, config.data.context_length)
    gemma = placement.load_gemma(config)
    latents, values = probing.pool(gemma, opened.subjects, tokens_TxL, per_batch)
    say("Fitting the probes …")
    results = {
        name: probing.tasks(latents[name], values[subject.site], given.labels, is_test_T)
        for name, subject in opened.subjects.items()
    }
    labels, counts = np.unique(given.labels, return_counts=True)
    about = {
        "model": config.model,
        "step": opened.step,
        "labelled": printing.shareable(labelled),
        "classes": {str(label): int(count) for label, count in zip(labels, counts, strict=True)},
        "test_texts": int(is_test_T.sum()),
        "cut_texts": cut,
        "seed": seed,
    }
    written = {name: [probing.as_numbers(task) for task in of] for name, of in results.items()}
    files.write_json(out / "probing.json", about | {"sae": written})
    probing.print_table(results, len(given.texts))
    if cut:
        say(f"{cut:,} texts are longer than {config.data.context_length} tokens and were cut.")
    say(f"Wrote {out / 'probing.json'}")
    return results
